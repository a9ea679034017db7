"""Which failures of a release are expected?  Strict: what passes though it was expected to fail is a finding, and so is
an entry that no result answers, unless its check is of the full tier and was not asked.

Results keep the verdicts as they were found.  The entries of `conformance/expected/NAME.toml`
(`dpocheck.known` says their form) are held against them whenever they are read.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from conformance.field.subjects import Trainer
from dpocheck.check import CHECKS
from dpocheck.known import Expected, load
from dpocheck.piecewise import versions


def entries(trainer: Trainer) -> tuple[Expected, ...]:
    """The known failures of a subject.  Raises `dpocheck.known.KnownError` on a file that cannot be used."""
    return load(trainer.expected, versions()) if trainer.expected.is_file() else ()


def judged(trainer: Trainer, result: dict[str, Any]) -> dict[str, Any]:
    """The result with its expected failures marked: "expected-fail", "unexpected-pass" or "stale"."""
    if not result.get("results"):
        return result
    return result | {"results": marked(result["results"], entries(trainer))}


def marked(checks: Sequence[dict[str, Any]], known: Sequence[Expected]) -> list[dict[str, Any]]:
    told, met = [], set()
    for check in checks:
        for entry in known:
            if not _speaks_of(entry, check):
                continue
            met.add(id(entry))
            if check["verdict"] == entry.verdict:
                check = check | {"verdict": "expected-fail", "known": entry.record()}
            elif check["verdict"] in ("pass", "info"):
                check = check | {"verdict": "unexpected-pass", "reason": f"expected to fail: {entry.reason.strip()}"}
        told.append(check)
    asked = {check["id"] for check in checks}
    spared = {id for id, check in CHECKS.items() if check.tier == "full" and id not in asked}
    for entry in known:
        if id(entry) not in met and entry.id not in spared:
            told.append({"id": entry.id, "version": entry.version, "level": "must", "verdict": "stale",
                         "reason": "no result answers this entry of the expected failures"})  # fmt: skip
    return told


def _speaks_of(entry: Expected, check: dict[str, Any]) -> bool:
    inside = entry.until is None or datetime.date.today() <= entry.until
    same = all(check.get("params", {}).get(name) == value for name, value in entry.where.items())
    return inside and check["id"] == entry.id and same and check["verdict"] not in ("blocked", "not-applicable")
