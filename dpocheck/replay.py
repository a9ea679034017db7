"""Is a stored failure still there?  The check it belongs to is run again, on that experiment alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpocheck.asked import parse_objective
from dpocheck.check import CHECKS, Scene
from dpocheck.experiment import from_plain
from dpocheck.piecewise import Piecewise, unsaid, versions
from dpocheck.result import Result
from dpocheck.runner import Options, UsageError


def replay(stored: dict[str, Any]) -> Result:
    """The new result of a stored experiment (`stored.read`).  Raises UsageError where it cannot be asked any more."""
    id, version = stored["check"]["id"], stored["check"]["version"]
    if id not in versions():
        raise UsageError(f"no check has the id {id} any more; `dpocheck list` shows all")
    if version != versions()[id]:
        raise UsageError(f"stored for version {version} of {id}, now at {versions()[id]}: audit the subject again")
    given = stored.get("options") or {}
    limits = {name: float(given[name]) for name in ("timeout", "memory") if name in given}
    objective = parse_objective(given["objective"]) if given.get("objective") else None
    options = Options(
        subject=stored["subject"], tier="full", objective=objective, python=given.get("python"), **limits
    )
    with Piecewise(options) as subject:
        if id in CHECKS:
            scene = Scene(stored.get("scene") or "stored", from_plain(stored["experiments"]))
            return subject.judge(replace(CHECKS[id], scenes=[scene]))
        absent = unsaid(id, "unknown", "this subject no longer shows which choice it makes")
        return subject.answers.get(id, absent)
