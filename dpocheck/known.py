"""Which failures are known, and what becomes of a report when they are taken as known?

    [[expect]]
    id = "REF-IS-POLICY-GIVEN"
    version = 1
    verdict = "fail"                        # or "error", "unknown"
    where = {objective = "cdpo"}            # only results with these parameters
    reason = "the reference is re-read from disk"
    url = "https://github.com/huggingface/trl/issues/..."
    seen = 2026-11-20
    until = 2027-03-01                      # only where the subject is not pinned
    experiment = "3f2a..."                  # only this failing experiment, by its key or the start of it

A known failure that is seen becomes `expected-fail`; one that passes, `unexpected-pass`.  An entry that matched
nothing, and one that has expired, is a finding of its own: the file is wrong, and says so.
"""

from __future__ import annotations

import datetime
import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpocheck.report.words import KNOWN_CHAPTER
from dpocheck.result import Report, Result
from dpocheck.stored import joint_key

FIELDS = ("id", "version", "where", "verdict", "reason", "url", "seen", "experiment", "until")
NEEDED = ("id", "version", "reason")
VERDICTS = ("fail", "error", "unknown")


class KnownError(ValueError):
    """A known-failures file that cannot be used; the message says which entry and what to correct."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One entry of a known-failures file."""

    id: str
    version: int
    reason: str
    verdict: str = "fail"
    where: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    seen: datetime.date | str | None = None
    experiment: str | None = None
    until: datetime.date | None = None

    def matches(self, result: Result) -> bool:
        """Same check, same parameters; the verdict is not looked at."""
        return result.id == self.id and all(result.params.get(name) == value for name, value in self.where.items())

    def record(self) -> dict[str, Any]:
        """What a result says of the entry."""
        values = {name: getattr(self, name) for name in FIELDS}
        values = {name: str(value) if isinstance(value, datetime.date) else value for name, value in values.items()}
        return {name: value for name, value in values.items() if value not in (None, "", {})}


def load(path: Path, versions: Mapping[str, int]) -> tuple[Expected, ...]:
    """The entries of `path`; `versions` are the known checks.  Raises KnownError on anything it does not understand."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KnownError(f"cannot read the known failures {path}: {error.strerror}") from None
    except ValueError as error:
        raise KnownError(f"{path} is not TOML: {error}") from None
    if unknown := sorted(set(data) - {"expect"}):
        raise KnownError(f"{path}: unknown table {unknown[0]!r}; allowed: [[expect]]")
    entries = data.get("expect", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise KnownError(f"{path}: `expect` is not a list of tables; write [[expect]]")
    return tuple(_entry(path, place, entry, versions) for place, entry in enumerate(entries, 1))


def _entry(path: Path, place: int, entry: dict[str, Any], versions: Mapping[str, int]) -> Expected:
    at = f"{path}, entry {place}" + (f" ({entry['id']})" if isinstance(entry.get("id"), str) else "")
    for name in entry:
        if name not in FIELDS:
            raise KnownError(f"{at}: unknown field {name!r}{near(name, FIELDS)}; allowed: {', '.join(FIELDS)}")
    if missing := [name for name in NEEDED if name not in entry]:
        raise KnownError(f"{at}: lacks {', '.join(missing)}")
    kinds = {"id": str, "version": int, "reason": str, "verdict": str, "where": dict, "url": str, "experiment": str}
    for name, kind in kinds.items():
        if name in entry and (not isinstance(entry[name], kind) or isinstance(entry[name], bool)):
            raise KnownError(f"{at}: {name} is {entry[name]!r}; it must be a {_said(kind)}")
    if entry["id"] not in versions:
        raise KnownError(f"{at}: no check has this id{near(entry['id'], versions)}; `dpocheck list` shows all")
    if entry.get("verdict", "fail") not in VERDICTS:
        raise KnownError(f"{at}: verdict {entry['verdict']!r} cannot be expected; allowed: {', '.join(VERDICTS)}")
    if not entry["reason"].strip():
        raise KnownError(f"{at}: the reason is empty; say what is wrong and why it is accepted")
    declared = versions[entry["id"]]
    if entry["version"] != declared:
        age = "outdated" if entry["version"] < declared else "newer than this dpocheck"
        said = f"version {entry['version']} is {age}, the check is at {declared}"
        raise KnownError(f"{at}: {said}: look at the failure again, then renew the entry")
    for name in ("until", "seen"):
        if name in entry:
            entry = entry | {name: _date(at, name, entry[name])}
    return Expected(**entry)


def _said(kind: type) -> str:
    return {str: "string", int: "whole number", dict: "table, as {objective = \"cdpo\"}"}[kind]


def _date(at: str, name: str, value: Any) -> datetime.date | str:
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise KnownError(f"{at}: {name} is {value!r}; it must be a date, as 2027-03-01") from None


def near(name: str, allowed: Collection[str]) -> str:
    """`; did you mean A or B?`, or nothing."""
    by_case = {item.lower(): item for item in allowed}
    found = difflib.get_close_matches(name.lower(), list(by_case), n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(by_case[item] for item in found)}?" if found else ""


def apply(
    report: Report, known: Collection[Expected], today: datetime.date, left_out: Collection[str] = ()
) -> Report:
    """The report with known failures marked, and a finding for each entry that is stale or has expired.

    `left_out`: ids that the person did not ask for (`--only`, `--tier`); their entries are not stale.  A blocked check
    neither confirms an entry nor makes it stale: what blocks it is the finding.
    """
    current = [entry for entry in known if entry.until is None or today <= entry.until]
    results = []
    met: set[int] = set()
    for result in report.results:
        for entry in current:
            if entry.matches(result) and (marked := _marked(entry, result)) is not None:
                met.add(id(entry))
                result = marked
                break
        results.append(result)
    for entry in known:
        if entry.id in left_out or id(entry) in met:
            continue
        if entry.until is not None and today > entry.until:
            said = f"expired on {entry.until}: look again, then renew or remove it"
        else:
            said = f"stale: {_met_instead(entry, report)}"
        results.append(_finding(entry, said))
    return replace(report, results=tuple(results))


def _marked(entry: Expected, result: Result) -> Result | None:
    """The result under the entry, or None where the entry does not speak of it."""
    if result.verdict == entry.verdict:
        if entry.experiment and not (result.experiments and joint_key(result.experiments).startswith(entry.experiment)):
            return None
        return replace(result, verdict="expected-fail", known=entry.record())
    if result.verdict in ("pass", "info"):
        return replace(result, verdict="unexpected-pass", known=entry.record())
    return replace(result, known=entry.record()) if result.verdict == "blocked" else None


def _met_instead(entry: Expected, report: Report) -> str:
    same = [result for result in report.results if result.id == entry.id]
    if not same:
        return "the check did not run"
    matching = [result for result in same if entry.matches(result)]
    if not matching:
        return f"no result has {', '.join(f'{name} = {value!r}' for name, value in entry.where.items())}"
    result = matching[0]
    if result.verdict == entry.verdict:
        return f"it fails on another experiment, {joint_key(result.experiments)[:12] if result.experiments else 'none'}"
    reason = f" ({result.reason})" if result.reason else ""
    return f"the verdict is {result.verdict}{reason}, not {entry.verdict}"


def _finding(entry: Expected, said: str) -> Result:
    return Result(
        id=entry.id, version=entry.version, level="must", tier="quick", chapter=KNOWN_CHAPTER, stage="metrics",
        verdict="fail", reason=f"the known failure is {said}", claim="Every known failure is seen, and in date.",
        known=entry.record(), family=KNOWN_CHAPTER,
    )  # fmt: skip
