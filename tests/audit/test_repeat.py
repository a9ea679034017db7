"""Does an audit say the same when it is run again, and when runs are made side by side?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = ("seconds",)


def lines(out: Path) -> list[dict]:
    """The records of a results.jsonl without their times."""
    read = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read]


def audit(subject: str, out: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "dpocheck.cli", "audit", subject, "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ, cwd=out.parent)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return lines(out)


def test_a_loss_audited_twice_gives_the_same_records(tmp_path):
    subject = f"{Path(__file__).with_name('honest.py')}:by_softplus"
    assert audit(subject, tmp_path / "one") == audit(subject, tmp_path / "two")


@pytest.mark.long
@pytest.mark.parametrize("subject", ["zoo:miniature", "zoo:mean-for-sum"])
def test_a_trainer_audited_twice_side_by_side_or_not_gives_the_same_records(tmp_path, subject):
    once, again = (audit(subject, tmp_path / name, "--jobs", "1") for name in ("one", "two"))
    assert once == again
    assert once == audit(subject, tmp_path / "three", "--jobs", "2")
