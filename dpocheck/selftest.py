"""Does the toolkit itself work?  The miniature and its variants must pass, every specimen must fail its check.

The zoo lives in this package, so all of it shares one worker.  `matrix` runs every specimen against every check, for
the kill matrix; `selftest` runs each against the check that must catch it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dpocheck import checks as _catalogue  # noqa: F401  (declares every check)
from dpocheck import conventions, diagnose, runner, smoke
from dpocheck.check import CHECKS, Check
from dpocheck.oracle.theory import FAULTS, PAPER, Theory
from dpocheck.result import Result
from dpocheck.session import Session
from dpocheck.subject import InWorker, Subject
from dpocheck.transport import Limits, Worker
from dpocheck.zoo import SPECIMENS, VARIANTS
from dpocheck.zoo.registry import TRAIN

ALLOWED = ("pass", "info", "not-applicable")  # of a subject that is right


@dataclass(frozen=True)
class Line:
    """What became of one subject of the zoo."""

    subject: str
    check: str
    verdict: str
    right: bool
    reason: str = ""
    diagnosis: str = ""
    named: int | None = None  # the rank at which the specimen's own theory is named; None where it has none


class Zoo:
    """One worker for all of the zoo's subjects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker = Worker("zoo:miniature", limits=Limits(seconds=120, memory_gb=8), folder=folder / "worker")
        self.known: dict[tuple[str, ...], tuple[Theory, dict[type, float]]] = {}

    def subject(self, name: str) -> Subject:
        return Subject(name, InWorker(f"zoo:{name}", self.worker), self.folder / name)

    def close(self) -> None:
        self.worker.close()

    def honest(self, only: str | None = None) -> tuple[Theory, dict[type, float]]:
        """The miniature's conventions and precision; a specimen shares all but what is broken in it."""
        key = (only or "",)
        if key not in self.known:
            subject = restricted(self.subject("miniature"), only)
            smoke.test(subject)
            conventions.resolve(subject, runner.cached_predict)
            self.known[key] = subject.theory, subject.precisions
        return self.known[key]


def restricted(subject: Subject, only: str | None) -> Subject:
    """The subject with one capability alone: the same fault is then found through it."""
    if only:
        subject.capabilities = tuple(name for name in subject.capabilities if name == only)
    return subject


def session(subject: Subject) -> Session:
    return Session(subject, runner.cached_predict, runner.cached_bound, blocking=False)


def specimen(zoo: Zoo, name: str, check: Check, only: str | None = None) -> Line:
    """One specimen against one check, with the diagnosis."""
    declared = SPECIMENS[name]
    only = only or (TRAIN[0] if declared.at == TRAIN else None)
    subject = restricted(zoo.subject(name), only)
    subject.theory, subject.precisions = zoo.honest(only)
    if declared.theory is not None and check.says is None:
        subject.theory = conventional(subject, declared.theory)
    run = session(subject)
    result = run.result(check)
    result = diagnosed(result, run)
    named = [one.name for one in result.diagnosis]
    return Line(
        name, check.id, result.verdict, result.verdict == "fail", result.reason or result.where,
        named[0] if named else "", rank(declared.theory, named),
    )  # fmt: skip


def conventional(subject: Subject, _theory: Theory) -> Theory:
    """Specimens are judged under the miniature's conventions: what is broken in them is no convention."""
    return subject.theory


def diagnosed(result: Result, run: Session) -> Result:
    doctor = diagnose.Diagnostician(
        run.subject.theory, max(run.subject.precisions.values(), default=2.0**-24), runner.cached_predict,
        runner.cached_bound,
    )  # fmt: skip
    return doctor.named(result, diagnose.evidence(run.seen.get(result.id, [])), run.subject.witnesses())


def rank(theory: Theory | None, named: list[str]) -> int | None:
    """The place of a specimen's own theory among the names given, from 1; 0 where it is not among them."""
    if theory is None:
        return None
    changes = theory.differs()
    for place, name in enumerate(named, start=1):
        if name in FAULTS and FAULTS[name].differs(PAPER) == changes:
            return place
    return 0


def variant(zoo: Zoo, name: str) -> list[Line]:
    """One variant against the whole quick catalogue: it must pass everything that applies."""
    subject = zoo.subject(name)
    if trouble := smoke.test(subject):
        return [Line(name, "smoke", "error", False, trouble)]
    lines = [
        Line(name, result.id, result.verdict, False, result.reason)
        for result in conventions.resolve(subject, runner.cached_predict)
        if result.verdict not in ALLOWED
    ]
    run = session(subject)
    for check in runner.select(runner.Options(subject=name)):
        result = run.result(check)
        if result.verdict not in ALLOWED:
            where = f"{result.reason or result.where} (error {result.error}, bound {result.bound})"
            lines.append(Line(name, check.id, result.verdict, False, where))
    return lines or [Line(name, "all", "pass", True)]


def selftest(
    jobs: int = 1, progress: Callable[[runner.Progress], None] | None = None, *, variants: Iterable[str] = ("miniature",),
) -> tuple[str, bool]:  # fmt: skip
    """Run it; the report as text, and whether all is right.  `variants` names those that are run in full."""
    del jobs  # one worker: its start costs more than the checks
    began = time.perf_counter()
    tell = progress or (lambda _: None)
    names = list(SPECIMENS)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="dpocheck-selftest-") as folder:
        zoo = Zoo(Path(folder))
        try:
            for number, name in enumerate(variants):
                tell(runner.Progress(number, len(names), name))
                lines += variant(zoo, name)
            for number, name in enumerate(names):
                tell(runner.Progress(number, len(names), name))
                lines.append(specimen(zoo, name, CHECKS[SPECIMENS[name].caught_by]))
        finally:
            zoo.close()
    return summary(lines, time.perf_counter() - began)


def summary(lines: list[Line], seconds: float) -> tuple[str, bool]:
    wrong = [line for line in lines if not line.right]
    caught = [line for line in lines if line.subject in SPECIMENS and line.right]
    ranked = [line.named for line in caught if line.named is not None]
    text = [f"  ✘ {line.subject}: {line.check} says {line.verdict} {line.reason}"[:300] for line in wrong]
    first, three = sum(rank == 1 for rank in ranked), sum(bool(rank) for rank in ranked)
    text.append(
        f"{len(caught)} of {sum(line.subject in SPECIMENS for line in lines)} specimens caught; of {len(ranked)} with a "
        f"theory {first} named first, {three} among the first three; "
        f"{len({line.subject for line in lines} - set(SPECIMENS))} honest subjects run in full, "
        f"{sum(line.subject not in SPECIMENS for line in wrong)} false alarms; {seconds:.0f} s"
    )
    return "\n".join(text) + "\n", not wrong


__all__ = ["VARIANTS", "Line", "Zoo", "selftest", "specimen", "variant"]
