"""Which checks run, in which order, and what do they say?  Chooses, orders and runs; prints nothing."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpocheck import budget, conventions, diagnose, fixed, identify, smoke, vocabulary
from dpocheck import checks as _catalogue  # noqa: F401  (declares every check)
from dpocheck.ahead import default_jobs
from dpocheck.check import CHAPTERS, CHECKS, STAGES, Check
from dpocheck.experiment import Experiment, Objective
from dpocheck.observation import Seen
from dpocheck.open import UsageError, open_subject
from dpocheck.oracle import predict
from dpocheck.oracle.theory import Theory
from dpocheck.order import ordered
from dpocheck.result import Header, Report, Result
from dpocheck.session import Session
from dpocheck.subject import Subject
from dpocheck.tolerances import bound
from dpocheck.transports import against_ranks

__all__ = ["Options", "Progress", "UsageError", "planned", "run"]


@dataclass(frozen=True)
class Options:
    """What the command line, the pytest plugin and `audit()` ask for."""

    subject: Any
    tier: str = "quick"
    only: tuple[str, ...] = ()
    seed: int = 0
    jobs: int = 0  # runs side by side; 0: as many as are of use here
    objective: Objective | None = None
    tokenizer: str | None = None
    timeout: float = 120.0
    memory: float = 8.0
    python: str | None = None  # the interpreter of the environment that holds the trainer; None: this one
    shrink: int = 0
    out: Path | None = None
    known: tuple[str, ...] = ()  # checks whose failure is expected: they block nothing
    unblocked: bool = False  # a failed check blocks no other


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    label: str


def run(options: Options, progress: Callable[[Progress], None] | None = None) -> Report:
    """Audit one subject.  Raises `UsageError` before a worker starts."""
    with audited(options, progress) as (report, _):
        return report


@contextmanager
def audited(
    options: Options, progress: Callable[[Progress], None] | None = None
) -> Iterator[tuple[Report, Callable[[dict[str, Any]], dict[str, Any]]]]:
    """The report, and a way to ask the subject, while it is still there, what a stand-alone script needs of it."""
    started = time.perf_counter()
    selected = select(options)
    tell = progress or (lambda _: None)
    tell(Progress(0, len(selected), "starting the worker"))
    with tempfile.TemporaryDirectory(prefix="dpocheck-") as folder:
        subject = open_subject(options.subject, Path(folder), timeout=options.timeout, memory=options.memory,
                               jobs=options.jobs or default_jobs(), python=options.python)  # fmt: skip
        subject.objective = options.objective
        try:
            if reason := fixed.clash(subject.only, options.objective):
                raise UsageError(f"{options.subject}: {reason}; leave --objective away, or make it a parameter")
            yield _audit(subject, selected, options, tell, started), subject.standalone
        finally:
            subject.close()


def _audit(
    subject: Subject, selected: list[Check], options: Options, tell: Callable[[Progress], None], started: float
) -> Report:
    tell(Progress(0, len(selected), "smoke"))
    sparing = budget.is_costly(subject) and options.tier == "quick"
    if not sparing:  # every worker imports its trainer now, side by side
        asked = (question.experiment(subject.theory) for question in conventions.asked_of(subject))
        subject.run_ahead([*smoke.experiments(subject), *map(subject.own, asked)])
    trouble = smoke.test(subject)
    if trouble:
        return Report(
            header=header(subject, options), results=(), smoke=trouble, seconds=time.perf_counter() - started
        )
    tell(Progress(0, len(selected), "conventions"))
    asked = conventions.resolve(subject, cached_predict, remembered=sparing)
    results: list[Result] = [] if options.only else asked
    blocking = not (options.only or options.unblocked)
    session = Session(
        subject, cached_predict, cached_bound, tier=options.tier, blocking=blocking, seed=options.seed,
        shrink=options.shrink, known=options.known,
    )  # fmt: skip
    on_tokenizer = [check for check in selected if check.chapter == vocabulary.CHAPTER]
    selected = [check for check in selected if check.chapter != vocabulary.CHAPTER]
    if sparing and not options.only:
        session.chosen = budget.choose(subject, selected)
        selected = [check for check in selected if check.id in session.chosen]
    subject.run_ahead(
        subject.own(experiment, check.id)
        for check in selected
        for scene in session.scenes(check)
        if options.tier == "full" or scene.tier == "quick"
        for experiment in scene.experiments
    )
    judged = {}
    for number, check in enumerate(ordered(selected, subject.capabilities)):
        tell(Progress(number, len(selected), check.id))
        judged[check.id] = session.result(check)
    results = diagnosed(results + [judged[check.id] for check in selected], session)
    if on_tokenizer:
        tell(Progress(len(selected), len(selected) + len(on_tokenizer), "rows on the tokenizer given"))
        results += vocabulary.results(subject, on_tokenizer, options.tokenizer or "", blocking=blocking)
    equation = identify.equation(subject)
    return Report(
        header=header(subject, options), results=tuple(results), equation=equation.text, asked=equation.asked,
        equation_residual=equation.residual, seconds=time.perf_counter() - started,
    )  # fmt: skip


def diagnosed(results: list[Result], session: Session) -> list[Result]:
    subject = session.subject
    others = [(e, s) for e, s in subject.witnesses() if not (s.raised or s.refused)]
    precision = max(subject.precisions.values(), default=2.0**-24)
    doctor = diagnose.Diagnostician(subject.theory, precision, cached_predict, cached_bound, subject.capabilities)
    named = []
    for result in results:
        named.append(doctor.named(result, diagnose.evidence(session.seen.get(result.id, [])), others))
    return named


def select(options: Options) -> list[Check]:
    """The checks to run, in the order of the stages.  Raises UsageError on an unknown id."""
    if unknown := [name for name in options.only if name not in CHECKS]:
        import difflib

        near = difflib.get_close_matches(unknown[0].upper(), CHECKS, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `dpocheck list` shows all"
        raise UsageError(f"unknown check {unknown[0]!r}{hint}")
    wanted = [CHECKS[name] for name in options.only] or [
        check for check in CHECKS.values() if wants(options, check)
    ]
    if not options.tokenizer and (idle := [check.id for check in wanted if check.chapter == vocabulary.CHAPTER]):
        raise UsageError(f"{idle[0]} is asked of a tokenizer of yours: give its folder with --tokenizer")
    return sorted(wanted, key=lambda check: (STAGES.index(check.stage), CHAPTERS.index(check.chapter)))


def wants(options: Options, check: Check) -> bool:
    """Whether an audit without `only` runs a check."""
    tier = options.tier == "full" or check.tier == "quick"
    return tier and (bool(options.tokenizer) or check.chapter != vocabulary.CHAPTER)


def planned(options: Options) -> list[tuple[Check, str | None]]:
    """The checks that an audit would run; nothing is started."""
    return [(check, None) for check in select(options)]


@lru_cache(maxsize=4096)
def cached_predict(experiment: Experiment, theory: Theory) -> Seen:
    """The oracle's prediction, remembered: experiments and theories are plain data."""
    return predict(experiment, theory)


@lru_cache(maxsize=4096)
def cached_bound(experiment: Experiment, name: str, theory: Theory, precision: float) -> Any:
    """The derived bound of an observable, remembered."""
    return bound(experiment, name, cached_predict(experiment, theory), precision, theory)


def header(subject: Subject, options: Options) -> Header:
    about = subject.transport.about
    seen = [unit for unit in subject.precisions.values() if unit]
    return Header(
        suite=version("dpocheck"), subject=str(options.subject), name=str(about.get("name") or subject.name),
        subject_version=about.get("version"), route=", ".join(subject.capabilities),
        forced=about.get("forced") or {}, isolation=subject.transport.isolation,
        precision=max(seen) if seen else None, seed=options.seed, tier=options.tier,
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=about.get("versions") or {}, adapter_lines=about.get("lines"), stubs=tuple(about.get("stubs") or ()),
        blind=blind_spots(subject, options.tier),
    )  # fmt: skip


def blind_spots(subject: Subject, tier: str) -> tuple[str, ...]:
    """What this route cannot see in this tier, in words."""
    found = []
    if "train" not in subject.capabilities:
        found.append("rows, tokens, the optimizer, accumulation, metrics and runs: the subject has no `train`")
    if "loss" not in subject.capabilities:
        found.append("the loss in other dtypes, and derivatives with respect to the reference")
    if "sequence_logps" not in subject.capabilities and "step" not in subject.capabilities:
        found.append("left padding and masks of the caller's making")
    if subject.transport.about.get("form") == "command line":
        found.append("what the live models went through (grad mode, dropout drawn): only files are seen")
    if tier == "quick" and "train" in subject.capabilities and not against_ranks(subject.transport):
        found.append("training on several processes: `--tier full` starts them")
    return tuple(found)
