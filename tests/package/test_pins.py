"""Does `ci/constraints.txt` pin all that the extras install?"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, exactly, version = line.partition("==")
            assert exactly, f"{line}: not exact"
            found[canonicalize_name(name)] = version
    return found


def wanted() -> set[str]:
    """The requirements of all extras and theirs, as far as their packages are installed here."""
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    todo += [Requirement(text) for some in PROJECT["optional-dependencies"].values() for text in some]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name == "dpocheck" or (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                further = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:
                continue
            todo += [each for each in further if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def test_every_package_that_the_extras_want_is_pinned():
    found = wanted()
    assert {"torch", "transformers", "trl", "tokenizers"} <= found
    # A CUDA build of torch wants packages of its own, which follow from torch's pin.
    unpinned = {name for name in found - set(pins()) if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert not unpinned


def test_a_pin_lies_within_the_range_declared():
    versions = pins()
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)], prereleases=True), text


def test_the_constraints_begin_with_torch():
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("#")).startswith("torch==")
