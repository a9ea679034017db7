"""Does the toolkit itself work?  The miniature and its variants must pass, every specimen must fail its check.

The zoo lives in this package, so all of it shares one worker.  `selftest` runs each specimen against the check that
must catch it; `row` runs one against every check, for the kill matrix.
"""

from __future__ import annotations

import difflib
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dpocheck import checks as _catalogue  # noqa: F401  (declares every check)
from dpocheck import conventions, diagnose, runner, smoke
from dpocheck.check import CHECKS, Check
from dpocheck.checks import gradient, logps, loss, metrics, step
from dpocheck.experiment import Experiment, Objective, TrainExperiment
from dpocheck.observation import Seen
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.result import Result
from dpocheck.session import Session
from dpocheck.subject import Subject
from dpocheck.transports import InWorker
from dpocheck.transports.isolated import Limits, Worker
from dpocheck.transports.ranks import Ranks
from dpocheck.zoo import SPECIMENS, VARIANTS
from dpocheck.zoo.registry import TRAIN

ALLOWED = ("pass", "info", "not-applicable")  # of a subject that is right
LEFT_OUT: dict[str, str] = {}  # check -> why no specimen can be put to it


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
        self.ranks = Ranks(self.worker)
        self.known: dict[tuple[str, ...], tuple[Theory, dict[type, float]]] = {}
        self.memory: dict[str, Seen] = {}  # what the miniature answers where `train` is not asked

    def subject(self, name: str) -> Subject:
        return Subject(name, InWorker(f"zoo:{name}", self.worker, self.ranks), self.folder / name)

    def close(self) -> None:
        self.ranks.close()
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
    """One specimen against one check, with the diagnosis.  What is broken in it is no convention: it is judged under
    the miniature's."""
    declared = SPECIMENS[name]
    only = only or (TRAIN[0] if declared.at == TRAIN else None)
    subject = restricted(zoo.subject(name), only)
    subject.theory, subject.precisions = zoo.honest(only)
    run = session(subject)
    result = run.result(check)
    names, place = diagnosed(result, run, declared.theory)
    return Line(
        name, check.id, result.verdict, result.verdict == "fail", result.reason or result.where,
        names[0] if names else "", place,
    )  # fmt: skip


def catalogue() -> list[Check]:
    """The checks that the zoo is put to: those with scenes.  The chapter on a user's own tokenizer has none."""
    return [check for check in runner.select(runner.Options(subject="zoo", tier="full")) if check.staged(PAPER)]


def declared_check(name: str) -> Check:
    """The check that must catch a specimen.  Raises ValueError where there is none of that id."""
    id = SPECIMENS[name].caught_by
    if id not in CHECKS:
        near = ", ".join(difflib.get_close_matches(id, CHECKS, 3)) or "none is near"
        raise ValueError(f"specimen {name} says that {id} catches it; no check has that id ({near})")
    return CHECKS[id]


def row(zoo: Zoo, name: str, checks: Iterable[Check]) -> dict[str, str]:
    """Check -> verdict of one specimen, or of an honest subject, blocking ignored.

    A specimen whose fault lies in `train` alone answers everything else as the miniature does; that is not run again.
    """
    subject = zoo.subject(name)
    if name in SPECIMENS:
        subject.theory, subject.precisions = zoo.honest()
        subject.memory.update(zoo.memory if SPECIMENS[name].at == TRAIN else {})
    else:
        smoke.test(subject)
        conventions.resolve(subject, runner.cached_predict)
    run = session(subject)
    verdicts = {check.id: run.result(check).verdict for check in checks}
    if name == "miniature":
        asked = subject.asked.items()
        zoo.memory = {key: subject.memory[key] for key, e in asked if not isinstance(e, TrainExperiment)}
    return verdicts


def diagnosed(result: Result, run: Session, theory: Theory | None) -> tuple[list[str], int | None]:
    """The names that the diagnosis gives, and the rank of the specimen's own theory."""
    failing = diagnose.evidence(run.seen.get(result.id, []))
    if result.verdict != "fail" or not failing:
        return [], None if theory is None else 0
    precision = max(run.subject.precisions.values(), default=2.0**-24)
    doctor = diagnose.Diagnostician(
        run.subject.theory, precision, runner.cached_predict, runner.cached_bound, run.subject.capabilities
    )
    trained = diagnose.shows_training(result.id)
    best = doctor.ranked(failing, lambda: panel(run.subject), trained=trained)[: diagnose.SHOWN]
    return [one.name for one in best], None if theory is None else rank(theory, best, doctor, failing)


def panel(subject: Subject) -> diagnose.Evidence:
    """What an audit has seen of a subject when it comes to naming a fault: here, one experiment of each kind."""
    objectives = (Objective(beta=0.5), Objective(beta=0.25), Objective(beta=0.5, label_smoothing=0.125))
    asked: list[Experiment] = [replace(loss.ORDINARY, objective=objective) for objective in objectives]
    asked += [gradient.SIX, gradient.RAGGED, logps.batch(logps.ROWS)]
    staged = [*metrics._batches(subject.theory), *step._two_steps(subject.theory)]
    asked += [experiment for scene in staged for experiment in scene.experiments]
    return [(experiment, subject.observe(experiment)) for experiment in asked if not subject.cannot(experiment)]


def rank(theory: Theory, best: list[diagnose.Ranked], doctor: diagnose.Diagnostician, seen: diagnose.Evidence) -> int:
    """The place of a specimen's own theory among those named, from 1; 0 where it is not among them.

    Theories that predict the same of all that was seen are one.
    """
    for place, one in enumerate(best, start=1):
        if one.theory == theory or doctor.alike(one.theory, theory, seen):
            return place
    return 0


def variant(zoo: Zoo, name: str) -> list[Line]:
    """One variant against the whole catalogue, quick scenes: it must pass everything that applies."""
    subject = zoo.subject(name)
    if trouble := smoke.test(subject):
        return [Line(name, "smoke", "error", False, trouble)]
    lines = [
        Line(name, result.id, result.verdict, False, result.reason)
        for result in conventions.resolve(subject, runner.cached_predict)
        if result.verdict not in ALLOWED
    ]
    run = session(subject)
    for check in catalogue():
        result = run.result(check)
        if result.verdict not in ALLOWED:
            where = f"{result.reason or result.where} (error {result.error}, bound {result.bound})"
            lines.append(Line(name, check.id, result.verdict, False, where))
    return lines or [Line(name, "all", "pass", True)]


def selftest(
    jobs: int = 1, progress: Callable[[runner.Progress], None] | None = None, *,
    variants: Iterable[str] = ("miniature",),
) -> tuple[str, bool]:  # fmt: skip
    """Run it; the report as text, and whether all is right.  `variants` names those that are run in full."""
    del jobs  # one worker: its start costs more than the checks
    began = time.perf_counter()
    tell = progress or (lambda _: None)
    # Check by check: specimens of one check share the predictions that name their faults.
    names = sorted(
        (name for name, declared in SPECIMENS.items() if declared.caught_by not in LEFT_OUT),
        key=lambda name: SPECIMENS[name].caught_by,
    )
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="dpocheck-selftest-") as folder:
        zoo = Zoo(Path(folder))
        try:
            for number, name in enumerate(variants):
                tell(runner.Progress(number, len(names), name))
                lines += variant(zoo, name)
            for number, name in enumerate(names):
                tell(runner.Progress(number, len(names), name))
                lines.append(specimen(zoo, name, declared_check(name)))
        finally:
            zoo.close()
    return summary(lines, time.perf_counter() - began)


def summary(lines: list[Line], seconds: float) -> tuple[str, bool]:
    wrong = [line for line in lines if not line.right]
    caught = [line for line in lines if line.subject in SPECIMENS and line.right]
    ranked = [line.named for line in caught if line.named is not None]
    text = [f"  ✘ {line.subject}: {line.check} says {line.verdict} {line.reason}"[:300] for line in wrong]
    first, three = sum(rank == 1 for rank in ranked), sum(bool(rank) for rank in ranked)
    asked = sum(line.subject in SPECIMENS for line in lines)
    text.append(
        f"{len(caught)} of {asked} specimens caught; "
        f"of {len(ranked)} with a theory {first} named first, {three} among the first three; "
        f"{len({line.subject for line in lines} - set(SPECIMENS))} honest subjects run in full, "
        f"{sum(line.subject not in SPECIMENS for line in wrong)} false alarms; {seconds:.0f} s"
    )
    return "\n".join(text) + "\n", not wrong


__all__ = ["VARIANTS", "Line", "Zoo", "selftest", "specimen", "variant"]
