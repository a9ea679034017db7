"""How far from the oracle do right trainers come, and how near do wrong ones, over many drawn experiments?

Every variant of the zoo is put to every check on hundreds of distinct experiments: the greatest error over bound is
the check's margin against false alarms.  Every specimen is put to the check that must catch it: the smallest error
over bound is its margin against missed faults.  What an audit draws itself (`Check.draw`) is drawn here; a check
that draws nothing gets its own scenes with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

from dpocheck.check import CHECKS, Check, Scene
from dpocheck.checks import agreement, gradient, loss, optimum, sft
from dpocheck.draw import CAPABILITY, Ask, ratio
from dpocheck.experiment import Objective, Sequence, TrainExperiment, key
from dpocheck.oracle.theory import Theory
from dpocheck.session import Session

MANY, DEAR = 300, 30  # distinct experiments that tell something; where each takes a whole run
SPARE = 1.6  # as many are drawn, for some tell nothing
Examples = list[tuple[Any, ...]]


@dataclass
class Cell:
    """What one honest subject made of one check.  `worst`: the greatest error over bound among its passes."""

    drawn: int = 0
    passed: int = 0
    unknown: int = 0
    not_applicable: int = 0
    worst: float = 0.0
    exact: int = 0  # passes without a bound, or with one of zero: bits, counts, words
    reason: str = ""  # of the first that told nothing or did not apply
    trouble: str = ""  # the first failure or error, in words
    failing: tuple[Any, ...] = ()  # its experiments

    def count(self, outcome: Any) -> None:
        comparison = outcome.comparison
        self.drawn += 1
        if comparison.verdict in ("pass", "info"):
            self.passed += 1
            self.exact += not comparison.bound
            if comparison.verdict == "pass":  # the error of an `info` is against what the subject does not promise
                self.worst = max(self.worst, ratio(outcome))
        elif comparison.verdict == "unknown":
            self.unknown += 1
            self.reason = self.reason or comparison.reason
        elif comparison.verdict == "not-applicable":
            self.not_applicable += 1
            self.reason = self.reason or comparison.reason
        elif not self.trouble:
            said = comparison.reason or f"{comparison.where}: {comparison.observed}, not {comparison.expected}"
            self.trouble = f"{comparison.verdict}: {said} (error {comparison.error}, bound {comparison.bound})"
            self.failing = outcome.scene.experiments


def put(run: Session, check: Check) -> Cell:
    """A check's experiments, one after the other, until enough tell something, or one fails."""
    subject = run.subject
    native = _native(check, subject.capabilities)
    told = Cell()
    for experiments in examples(check.id, subject.theory, native):
        if told.passed >= goal(check, native, subject.theory) or told.trouble:
            break
        told.count(run.outcome(check, Scene("drawn", experiments)))
        if told.drawn == told.not_applicable == DEAR:
            break
    return told


def goal(check: Check, native: bool, theory: Theory) -> int:
    """How many experiments must pass: fewer where each takes a whole run."""
    return MANY if native and not takes_runs(check, theory) else DEAR


def takes_runs(check: Check, theory: Theory) -> bool:
    kinds = (TrainExperiment, Sequence)
    return any(isinstance(one, kinds) for scene in check.staged(theory) for one in scene.experiments)


def _native(check: Check, capabilities: tuple[str, ...]) -> bool:
    """Whether a subject answers the check's experiments itself, without whole runs."""
    kinds = {need.partition(".")[0] for need in check.needs} or {check.chapter}
    wanted = {CAPABILITY.get(kind, kind) for kind in kinds}
    return wanted <= set(capabilities)


@lru_cache(maxsize=8)
def examples(id: str, theory: Theory, native: bool) -> Examples:
    """Distinct experiments, drawn with the seeds 0, 1, ...; the same for all subjects of these conventions."""
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import NoSuchExample

    check = CHECKS[id]
    wanted = int(SPARE * goal(check, native, theory))
    strategy = drawing(check)(Ask(theory, native))
    some = settings(
        max_examples=wanted, phases=(Phase.generate,), database=None, deadline=None, derandomize=False,
        print_blob=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    found: dict[tuple[str, ...], tuple[Any, ...]] = {}

    def collect(experiments: tuple[Any, ...]) -> bool:
        found.setdefault(tuple(key(one) for one in experiments), experiments)
        return len(found) >= wanted

    seed = 0
    while len(found) < wanted:
        before = len(found)
        try:
            find(strategy, collect, settings=some, random=Random(seed))
        except NoSuchExample:
            seed += 1
        if len(found) == before:  # a small space, all seen
            break
    return list(found.values())


# ----------------------------------------------------------------------------------------------- what is drawn for each


def drawing(check: Check) -> Callable[[Ask], Any]:
    """What the check draws itself, what is written for it here, or its scenes with other numbers."""

    def again(ask: Ask) -> Any:
        from dpocheck import strategies

        return strategies.renumbered(scene.experiments for scene in check.staged(ask.theory))

    return check.draw or DRAWINGS.get(check.id, again)


def _losses(**options: Any) -> Any:
    from dpocheck import strategies

    return strategies.loss_experiments(**options)


PLAIN = ("plain", "integers")


def zero_margins(ask: Ask) -> Any:
    """A reference that lies below the policy by as much for chosen as for rejected."""

    def equal(drawn: Any) -> tuple[Any]:
        lower = [0.25 * ((5 * i) % 7) for i in range(len(drawn.policy_chosen))]
        both = ("chosen", "rejected")
        moved = {f"reference_{s}": tuple(x - c for x, c in zip(getattr(drawn, f"policy_{s}"), lower, strict=True))
                 for s in both}  # fmt: skip
        return (replace(drawn, **moved),)

    return _losses(regions=PLAIN).map(equal)


def margins(of: tuple[float, ...]) -> Callable[[Ask], Any]:
    """The given margins at several beta, over several common log-probs."""

    def made(ask: Ask) -> Any:
        from hypothesis import strategies as st

        from dpocheck import strategies
        from dpocheck.strategies.choose import mantissa
        from dpocheck.strategies.losses import BETAS

        def lowered(drawn: tuple[float, int, int, int]) -> tuple[Any]:
            beta, start, power, other = drawn
            base = loss.at(of, beta)
            first, second = mantissa(start) * 2.0**power, mantissa(start + 7) * 2.0**other
            moved = {"chosen": first, "rejected": second}
            return (
                replace(base, **{
                    f"{model}_{side}": tuple(x - by for x in getattr(base, f"{model}_{side}"))
                    for model in ("policy", "reference") for side, by in moved.items()
                }),
            )  # fmt: skip

        powers = strategies.choose(0, 1, 3, 5)
        return st.tuples(strategies.choose(*BETAS[:5]), strategies.choose(*range(32)), powers, powers).map(lowered)

    return made


def dtypes(ask: Ask) -> Any:
    from dpocheck import strategies

    names = strategies.choose("float32", "bfloat16", "float16")
    return names.flatmap(lambda dtype: _losses(regions=PLAIN, dtype=dtype)).map(lambda one: (one,))


def nudged(ask: Ask) -> Any:
    """A batch, and the same with each of the four log-probs lowered by a half."""
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return _losses(regions=PLAIN).map(lambda one: (
        one, *(replace(one, **{name: tuple(x - 0.5 for x in getattr(one, name))}) for name in names)
    ))  # fmt: skip


def differences(ask: Ask) -> Any:
    """A batch, and the same with each policy log-prob raised and lowered a little."""
    names = ("policy_chosen", "policy_rejected")
    return _losses(regions=("plain", "integers", "near")).map(lambda one: (
        one, *(replace(one, **{name: tuple(x + d for x in getattr(one, name))})
               for name in names for d in (loss.STEP, -loss.STEP))
    ))  # fmt: skip


def betas(ask: Ask) -> Any:
    from dpocheck import strategies

    wanted = strategies.sigmoids((2.0**-10, 0.125, 8.0, 128.0))
    return _losses(objective=wanted, regions=PLAIN).map(lambda one: (one,))


def repeated(ask: Ask) -> Any:
    return _losses().map(lambda one: (replace(one, calls=3),))


def with_sft(ask: Ask) -> Any:
    """The four-number scenes where a subject has a loss of its own, else whole runs."""
    from dpocheck import strategies

    if not ask.native:
        return strategies.renumbered(scene.experiments for scene in sft._sft(ask.theory)[1:])
    wanted = strategies.choose(*(Objective(beta=b, sft_weight=w) for b in (0.5, 0.125, 2.0) for w in (0.5, 1.0, 0.25)))
    return _losses(objective=wanted, regions=PLAIN, lengths="drawn").map(lambda one: (one,))


def equal_models(ask: Ask) -> Any:
    from dpocheck import strategies

    return strategies.step_experiments(rectangular=True, own_masks=False).map(
        lambda one: (replace(one, reference=one.policy),)
    )


def _starts() -> Any:
    from dpocheck import strategies
    from dpocheck.strategies.choose import generic

    return strategies.choose(*range(126)).map(lambda at: tuple(generic(at + 5 * i) for i in range(4)))


def at_optimum(ask: Ask) -> Any:
    from hypothesis import strategies as st

    from dpocheck import strategies

    drawn = st.tuples(strategies.choose(0.5, 0.25, 1.0, 2.0), _starts())
    return drawn.map(lambda one: (gradient.bradley_terry(one[0], True, one[1])[0],))


def towards_optimum(ask: Ask) -> Any:
    (base,) = optimum._converged(ask.theory)[0].experiments
    return _starts().map(lambda logits: (_from(base, logits),))


def _from(run: TrainExperiment, logits: tuple[float, ...]) -> TrainExperiment:
    step, _ = gradient.bradley_terry(optimum.BETA, False, logits)
    return replace(run, policy=step.policy, reference=step.reference)


def asked_twice(ask: Ask) -> Any:
    """One experiment with other numbers, and the runs that show the same."""
    from dpocheck import strategies
    from dpocheck.derive import plan

    def again(scene: Scene) -> Any:
        first, by = scene.experiments[0], ("step",) if "step" in scene.name and "loss" in scene.name else ("train",)
        drawn = strategies.renumbered([(first,)])
        if hasattr(first, "policy_chosen"):
            drawn = _losses(sizes=(2, 3, 5), regions=PLAIN).map(lambda one: (one,))
        return drawn.map(lambda one: (one[0], *plan(one[0], by, ask.theory).experiments))

    return strategies.choose(*agreement._asked_twice(ask.theory)).flatmap(again)


DRAWINGS: dict[str, Callable[[Ask], Any]] = {
    "LOSS-ZERO-MARGIN": zero_margins, "LOSS-SHAPE": margins(loss.RAY),
    "LOSS-EXTREME": margins((*loss.EDGES, *(-edge for edge in loss.EDGES))), "LOSS-DTYPES": dtypes,
    "LOSS-ARGUMENTS": nudged, "LOSS-VALUE-GRADIENT": differences, "LOSS-BETA-LIMITS": betas, "LOSS-PURE": repeated,
    "LOSS-SFT": with_sft, "GRAD-START": equal_models, "GRAD-OPTIMUM": at_optimum,
    "OPTIMUM-RECOVERED": towards_optimum, "ONE-TRAINER": asked_twice,
}  # fmt: skip


def groups(checks: list[Check]) -> Iterator[list[Check]]:
    """Checks that are put to the same experiments, together: what was seen for one serves the next."""
    left = list(checks)
    while left:
        first = left[0]
        same = [one for one in left if one is first or (one.draw and one.chapter == first.chapter == "metrics")
                or (first.draw and one.draw is first.draw)]  # fmt: skip
        yield same
        left = [one for one in left if one not in same]


__all__ = ["DEAR", "MANY", "Cell", "drawing", "examples", "goal", "groups", "put"]
