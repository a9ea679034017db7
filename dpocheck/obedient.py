"""What does the diagnosis say of a trainer that computes exactly what a theory predicts?

The oracle answers in the trainer's place, so that faults which no specimen has, two at once, and faults that the
diagnosis does not know can be drawn by the hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dpocheck import diagnose, runner, selftest
from dpocheck.adapter import CAPABILITIES, Says
from dpocheck.check import CHECKS
from dpocheck.evidence import route
from dpocheck.experiment import Objective
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.order import ordered
from dpocheck.result import Result
from dpocheck.session import Session

# Not asked: two dozen runs that are never the first to fail, and what several processes show beside numbers.
LEFT_OUT = ("OPTION-ACTS", *(check.id for check in CHECKS.values() if check.chapter == "ranks"))

# Where a field of a theory acts.  Faults that act in one place are of one kind.
PLACES = {
    "rows": ("columns", "pairing", "eos", "template_eos", "bos", "boundary", "prefix", "spaces", "truncation",
             "eos_cut"),
    "positions": ("counted", "counted_reference", "attention"),
    "log-probs": ("logps", "logps_reference", "normaliser", "temperature", "token_floor"),
    "models": ("policy", "reference", "reference_moves", "cache"),
    "loss": (
        "kind", "coefficients", "beta_power", "beta_scale", "beta_fixed", "beta_on", "offset", "smoothing",
        "smoothing_default", "link", "clamp", "normalised", "ipo_length", "gamma", "margins", "scale", "sft_mean",
        "sft", "sft_extra", "kl_extra", "gradient_scale", "detached", "weight",
    ),
    "metrics": (
        "reward_scale", "reward_logps", "rewards", "margin", "accuracy", "logps_logged", "window_metrics",
        "loss_logged", "uneven_metrics", "eval_metrics", "eval_loss", "eval_tail",
    ),
}  # fmt: skip


def places(theory: Theory) -> frozenset[str]:
    """Where a theory differs from the paper; what is not listed acts in the step."""
    known = {field: place for place, fields in PLACES.items() for field in fields}
    return frozenset(known.get(field, "step") for field in theory.differs())


class Obedient:
    """A subject of every method, without rounding."""

    capabilities = CAPABILITIES
    says = Says()
    theory = PAPER
    objective: Objective | None = None

    def __init__(self, obeys: Theory) -> None:
        self.obeys = obeys
        self.only: dict[str, Any] = {}
        self.precisions: dict[type, float] = {}

    def own(self, experiment: Any, check: str = "") -> Any:
        return experiment

    def cannot(self, experiment: Any) -> str | None:
        return None

    def precision(self, experiment: Any) -> float:
        return 2.0**-24

    def observe(self, experiment: Any) -> Any:
        return runner.cached_predict(experiment, self.obeys)


@dataclass(frozen=True)
class Answer:
    """What an audit would say: the first check that fails, and the names, best first."""

    check: str | None
    names: tuple[str, ...] = ()
    theories: tuple[Theory, ...] = ()
    alike: tuple[bool, ...] = ()  # whether each predicts the same of all that trains, by the route of the failure
    doubtful: tuple[bool, ...] = ()  # whether the report says that it leaves most of what else is wrong unexplained


def first_failure(subject: Any) -> tuple[Session, Result | None]:
    """The checks in their order, until a must check fails."""
    run = Session(subject, runner.cached_predict, runner.cached_bound)
    for check in ordered(selftest.catalogue(), subject.capabilities):
        if check.id not in LEFT_OUT and check.level == "must":
            result = run.result(check)
            if result.verdict == "fail":
                return run, result
    return run, None


def answer(theory: Theory) -> Answer:
    """The diagnosis of a trainer that obeys `theory`."""
    subject = Obedient(theory)
    run, result = first_failure(subject)
    if result is None:
        return Answer(None)
    return told(run, result, theory)


def told(run: Session, result: Result, theory: Theory | None, others: diagnose.Evidence | None = None) -> Answer:
    """The names that the diagnosis gives to a failure; `others`: what else was seen, by default the self-test's."""
    failing = diagnose.evidence(run.seen.get(result.id, []))
    subject = run.subject
    precision = max(subject.precisions.values(), default=2.0**-24)
    doctor = diagnose.Diagnostician(
        subject.theory, precision, runner.cached_predict, runner.cached_bound, tuple(subject.capabilities)
    )
    panel = selftest.panel(subject) if others is None else others
    best = doctor.ranked(failing, panel)[: diagnose.SHOWN]
    ways = {route(experiment, one, doctor.capabilities) for experiment, one in failing}
    seen = failing + [pair for pair in panel if route(*pair, doctor.capabilities) in ways]
    same = tuple(theory is not None and doctor.alike(one.theory, theory, seen, trained=True) for one in best)
    doubtful = tuple(one.doubtful for one in best)
    return Answer(result.id, tuple(one.name for one in best), tuple(one.theory for one in best), same, doubtful)


@contextmanager
def without(left_out: Callable[[str, Theory], bool]) -> Iterator[None]:
    """The diagnosis does not know the faults of which `left_out(name, theory)` is true."""
    known = diagnose.candidates
    diagnose.candidates = lambda: (one for one in known() if not left_out(*one))  # type: ignore[assignment]
    try:
        yield
    finally:
        diagnose.candidates = known


__all__ = ["Answer", "Obedient", "answer", "first_failure", "places", "told", "without"]
