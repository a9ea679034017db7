"""What does an audit yield?  One `Result` per check and a `Report` over all of them: plain data, no printing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Diagnosis:
    """A wrong theory near to what was seen; `score` is its error divided by the paper's, 0 for an exact match.

    `unexplained` of `others` further wrong observations by the same route are not explained by it: there is another
    fault too, or it is another.
    """

    name: str
    score: float
    unexplained: int = 0
    others: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict of one check, with everything a report says about it.  Paths are relative to the output folder."""

    id: str
    version: int
    level: str
    tier: str
    chapter: str
    stage: str
    verdict: str
    reason: str = ""
    claim: str = ""
    source: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    via: str | None = None
    observed: Any = None
    expected: Any = None
    error: float | None = None
    bound: float | None = None
    where: str = ""
    blocked_by: str | None = None
    convention: tuple[str, Any] | None = None
    known: dict[str, Any] | None = None
    diagnosis: tuple[Diagnosis, ...] = ()
    experiment: str | None = None
    script: str | None = None
    output: str | None = None
    seconds: float = 0.0
    family: str = "plain"
    scene: str = ""
    experiments: tuple[Any, ...] = field(default=(), repr=False)  # the records themselves, for replay and scripts

    @property
    def error_over_bound(self) -> float | None:
        if self.error is None or self.bound is None:
            return None
        return self.error / self.bound if self.bound else (0.0 if self.error == 0 else float("inf"))


@dataclass(frozen=True, kw_only=True)
class Header:
    """Who was audited, how, and on what."""

    suite: str
    subject: str
    name: str
    subject_version: str | None
    route: str  # "train", "loss, step", "command line", ...: what the subject offers
    forced: dict[str, Any]  # settings the adapter forces: they are not what people run
    isolation: str  # "process" or "none"
    precision: float | None
    seed: int
    tier: str
    platform: str
    versions: dict[str, str] = field(default_factory=dict)
    adapter_lines: int | None = None
    stubs: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()  # what this route cannot see


@dataclass(frozen=True, kw_only=True)
class Report:
    header: Header
    results: tuple[Result, ...]
    equation: str = ""
    asked: str = ""
    equation_residual: float | None = None
    smoke: str | None = None  # why the smoke stage failed
    seconds: float = 0.0

    def count(self, *verdicts: str) -> int:
        return sum(result.verdict in verdicts for result in self.results)

    @property
    def findings(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.verdict in ("fail", "unexpected-pass"))

    def exit_code(self, fail_on: str = "should") -> int:
        """0 right; 1 a finding; 3 nothing can be said (smoke failed, nothing ran, a must check without an answer)."""
        levels = ("must",) if fail_on == "must" else ("must", "should")
        if any(r.verdict == "unexpected-pass" or (r.verdict == "fail" and r.level in levels) for r in self.results):
            return 1
        executed = self.count("pass", "fail", "info", "expected-fail")
        if self.smoke or not executed:
            return 3
        unanswered = any(r.level == "must" and r.verdict in ("error", "unknown") for r in self.results)
        return 3 if unanswered else 0

    def footer(self) -> dict[str, Any]:
        verdicts = sorted({result.verdict for result in self.results})
        executed = self.count("pass", "fail", "info", "expected-fail", "unexpected-pass")
        total = len(self.results)
        return {
            "counts": {verdict: self.count(verdict) for verdict in verdicts},
            "executed": executed,
            "applicable": total - self.count("not-applicable"),
            "total": total,
            "equation": self.equation,
            "seconds": self.seconds,
        }


def plain(record: Any) -> dict[str, Any]:
    """A record of this file as JSON data."""
    return asdict(record)
