"""What came of the last `ci/test --all`?  Writes ci/test-all.md from pytest's JUnit file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ci" / "test-all.md"
PACKAGES = ("torch", "transformers", "trl", "numpy", "hypothesis", "pytest")
SLOWEST = 15


def git(*words: str) -> str:
    return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def page(suite: ElementTree.Element) -> str:
    cases = suite.findall("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [found for case in cases if (found := case.find("skipped")) is not None]
    expected = sum(found.get("type") == "pytest.xfail" for found in skips)
    reasons = Counter(found.get("message") for found in skips if found.get("type") != "pytest.xfail")
    dirty = " with changes that are not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    beside = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    minutes = float(suite.get("time", 0)) / 60
    lines = [
        "# The last `ci/test --all`", "",
        f"{suite.get('timestamp', '')[:10]}, commit {git('rev-parse', '--short', 'HEAD')}{dirty}: "
        f"**{len(cases) - len(failed) - len(skips)} passed, {len(failed)} failed, {sum(reasons.values())} skipped, "
        f"{expected} failed as expected**, in {minutes:.0f} minutes on {os.cpu_count()} cores "
        f"({platform.system()}, Python {platform.python_version()}; {beside}).", "",
    ]  # fmt: skip
    lines += [f"- failed: `{case.get('classname')}::{case.get('name')}`" for case in failed]
    lines += [f"- skipped, {count}: {reason}" for reason, count in reasons.most_common()]
    slow = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:SLOWEST]
    lines += ["", "The slowest, in seconds:", ""]
    lines += [f"- {float(case.get('time', 0)):.0f}: `{case.get('classname')}::{case.get('name')}`" for case in slow]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    root = ElementTree.parse(sys.argv[1]).getroot()
    PAGE.write_text(page(root.find("testsuite") if root.tag == "testsuites" else root), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
