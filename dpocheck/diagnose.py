"""Which known fault is nearest to what was seen?

The oracle predicts the failing experiments under every known fault.  A fault explains a number where it brings the
prediction nearer than the paper's, and is refuted by one that the paper gets right and the fault does not.  Faults
with a constant in them are fitted.  Specimens test the diagnosis; they are not it.

What trains is judged before what is logged: a trainer may log another number than the one it differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dpocheck import derive
from dpocheck.experiment import Experiment, LossExperiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import LogpSeen, LossSeen, Seen, SequenceSeen, StepSeen, TrainSeen
from dpocheck.oracle.faults import CHOICES
from dpocheck.oracle.theory import FAULTS, PAPER, Theory
from dpocheck.reading import entries
from dpocheck.result import Diagnosis, Result
from dpocheck.session import Limit, Predict

SHOWN = 3  # diagnoses that a report names
NEAR = 0.2  # a fault that leaves more than this share of the error explains nothing
SOME = 0.9  # one that leaves less explains something
EXACT = 0.02
SCREENED = 15  # faults that are judged on all the evidence, after one small experiment
WITNESSES = 24  # further observations that decide between faults which explain the failure equally well
DEAR = 40  # the cost of an experiment that is not predicted under every fault: some twenty steps of a run
FIELDS: dict[type, tuple[str, ...]] = {
    LossSeen: ("per_pair", "reduced", "slopes", "rewards_chosen", "rewards_rejected"), LogpSeen: ("logps",),
    StepSeen: ("loss", "gradient", "attended"), TrainSeen: ("gradient", "attended", "logits"),
}  # fmt: skip
SHOWS_MORE = ("attended", "rewards_chosen", "rewards_rejected")  # beside what the gradient and the loss show
K2 = 2.0**20  # the square of the scale between logits and float32 parameters: weight decay is told in the latter's unit

# Field of a theory -> (starting points of the fit, words with the fitted number).
CONSTANTS: dict[str, tuple[tuple[float, ...], Callable[[float], str]]] = {
    "beta_scale": ((0.5, 2.0), lambda x: f"beta times {x:.4g}"),
    "beta_fixed": ((0.1, 1.0), lambda x: f"beta fixed at {x:.4g}"),
    "offset": ((-0.5,), lambda x: f"{x:.4g} added to the logit"),
    "clamp": ((5.0,), lambda x: f"logit clamped at {x:.4g}"),
    "temperature": ((1.5,), lambda x: f"temperature {x:.4g}"),
    "token_floor": ((-4.0,), lambda x: f"token log-probs clamped at {x:.4g}"),
    "scale": ((0.5,), lambda x: f"loss times {x:.4g}"),
    "gradient_scale": ((0.5,), lambda x: f"gradient times {x:.4g}, loss right"),
    "update": ((0.5,), lambda x: f"step times {x:.4g}"),
    "smoothing_default": ((0.2,), lambda x: f"label smoothing {x:.4g} though not asked for"),
    "sft_extra": ((0.5,), lambda x: f"undeclared SFT term, weight {x:.4g}"),
    "kl_extra": ((0.1,), lambda x: f"undeclared KL term, weight {x:.4g}"),
    "reference_moves": ((0.5,), lambda x: f"reference moves {x:.4g} of the way to the policy at each step"),
    "weight_decay_extra": ((0.01 / K2, 0.01), lambda x: f"undeclared weight decay, {x * K2:.4g} on the parameters"),
    "momentum_extra": ((0.5,), lambda x: f"undeclared momentum, {x:.4g}"),
}

Evidence = list[tuple[Experiment, Seen]]
Named = tuple[str, Theory]
Numbers = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Fact:
    """One observable of one experiment, in units of what rounding explains of an error, number by number.

    `due`: the paper's error, a Euclidean norm; `peak`: the greatest of its numbers.
    """

    experiment: Experiment
    name: str
    seen: np.ndarray
    limit: np.ndarray
    due: float
    peak: float
    trained: bool  # it shows what is trained, not only what is logged or told beside it
    vector: bool = False  # of a loss that returns one number a pair
    plan: derive.Plan | None = None  # how it was derived from coarser experiments

    @property
    def informative(self) -> bool:
        return self.peak > 1.0


@dataclass(frozen=True)
class Ranked:
    """A fault and how well it explains.  Shares of the paper's error that it leaves: of what trains, of what is logged;
    `against`: witnesses that contradict it."""

    name: str
    theory: Theory  # changes of the paper
    left: float
    beside: float = 0.0
    against: int = 0

    def key(self) -> tuple[float, ...]:
        rest = 0.0 if self.left <= EXACT else self.left
        return rest, self.against, min(self.beside, 1.0), self.left, len(self.name)


class Diagnostician:
    """Names the faults behind the failures of one subject."""

    def __init__(
        self, theory: Theory, precision: float, predict: Predict, limit: Limit, capabilities: tuple[str, ...] = ()
    ) -> None:
        """`capabilities`: the subject's.  What was derived from coarser runs is predicted by way of them."""
        self.theory, self.precision, self.predict, self.limit = theory, precision, predict, limit
        self.capabilities = capabilities

    def named(self, result: Result, failing: Evidence, others: Evidence | Callable[[], Evidence]) -> Result:
        """The result with the nearest faults, best first; `others`: what else was seen, or how to see it if needed."""
        if result.verdict != "fail" or not failing:
            return result
        best = self.ranked(failing, others)
        return replace(result, diagnosis=tuple(Diagnosis(one.name, round(one.left, 6)) for one in best[:SHOWN]))

    def ranked(self, failing: Evidence, others: Evidence | Callable[[], Evidence] = ()) -> list[Ranked]:
        """All faults that explain the failing evidence, nearest first; none where it shows no wrong number."""
        facts = self.facts(failing)
        wrong = [fact.experiment for fact in facts if fact.informative]
        if not wrong:
            return []
        cheapest = min(wrong, key=_cost)
        first = [fact for fact in facts if fact.experiment == cheapest]
        if _cost(cheapest) > DEAR:
            first = self._cheaper(_told(others)) or first
        found = self._judged(self._screened(first, list(candidates())), facts)
        if not found or found[0].left > EXACT:
            found = sorted(found + self._judged(self._fitted(first), facts), key=Ranked.key)
        if not found or found[0].left > EXACT:
            single = min((one.left for one in found), default=1.0)
            pairs = self._judged(self._screened(first, list(dict(self._pairs(found)).items())), facts)
            found = sorted(found + [one for one in pairs if one.left < single / 2], key=Ranked.key)  # both take part
        best = [one for one in found if one.left <= NEAR]
        if len(best) > 1 and best[1].left <= best[0].left + EXACT:
            best = self._decided(best, _told(others))
        return best

    def facts(self, evidence: Evidence) -> list[Fact]:
        found = []
        for experiment, seen in evidence:
            if seen.raised or seen.refused:
                continue
            plan = self._plan(experiment, seen)
            paper = fields(self.predict, experiment, self.theory, plan)
            for name, value in observables(seen):
                if (truth := paper.get(name)) is not None and truth.shape == value.shape and value.size:
                    limit = self._noise(experiment, name, seen, value)
                    size = _distance(value, truth, limit)
                    found.append(Fact(experiment, name, value, limit, *size, _trains(name), _vector(seen), plan))
        return found

    def _plan(self, experiment: Experiment, seen: Seen) -> derive.Plan | None:
        if seen.via != "derived" or not self.capabilities:
            return None
        found = _planned(experiment, self.capabilities, self.theory)
        return None if isinstance(found, str) else found

    def _noise(self, experiment: Experiment, name: str, seen: Seen, value: np.ndarray) -> np.ndarray:
        """What rounding explains, at least a thousandth of its greatest number; of the shape of the observable."""
        with np.errstate(all="ignore"):
            try:
                derived = np.asarray(self.limit(experiment, name, self.theory, self.precision), float)
            except KeyError:
                derived = np.zeros(())
        if name == "slopes" and derived.ndim == 2:
            derived = derived[:2]
        high = float(np.max(derived, where=np.isfinite(derived), initial=0.0))
        usable = np.where(np.isfinite(derived), np.maximum(derived, 1e-3 * high), high)
        return np.broadcast_to(usable + seen.floor.get(name, 0.0) + (0.0 if high else 1e-9), value.shape)

    def _cheaper(self, others: Evidence) -> list[Fact]:
        """The facts of the cheapest witness that shows a wrong number."""
        affordable = sorted((pair for pair in others if _cost(pair[0]) <= DEAR), key=lambda pair: _cost(pair[0]))
        for pair in affordable:
            facts = self.facts([pair])
            if any(fact.informative and fact.trained for fact in facts):
                return facts
        return []

    # ----------------------------------------------------------------------------------------------------- judging

    def share(self, fact: Fact, theory: Theory) -> float:
        """What the theory leaves of the paper's error; infinite where the paper is right and the theory is not."""
        if isinstance(fact.experiment, LossExperiment) and fact.vector:  # reduced here, not by the subject
            theory = theory.but(reduction=self.theory.reduction)
        wrong = fields(self.predict, fact.experiment, theory, fact.plan).get(fact.name)
        if wrong is None:  # the fault leaves this observable open, so it explains nothing of it
            return 1.0 if fact.informative else 0.0
        if wrong.shape != fact.seen.shape:
            return 1.0
        rest, peak = _distance(fact.seen, wrong, fact.limit)
        if not fact.informative:
            return 0.0 if peak <= 2.0 else float("inf")
        return 0.0 if peak <= 1.0 else rest / fact.due

    def judge(self, one: Named, facts: list[Fact]) -> Ranked:
        """Trained numbers decide, if one of them is wrong; else all numbers do."""
        name, fault = one
        theory = self.theory.but(**fault.differs())
        decided = any(fact.informative and fact.trained for fact in facts)
        left = beside = 0.0
        try:
            for fact in facts:
                share = self.share(fact, theory)
                if fact.trained or not decided:
                    left = max(left, share)
                else:
                    beside = max(beside, share)
                if left > 1.0:
                    break
        except Exception:  # a fault that cannot happen in this experiment
            left = float("inf")
        return Ranked(name, fault, left, beside)

    def _judged(self, faults: Iterable[Named], facts: list[Fact]) -> list[Ranked]:
        found = [self.judge(one, facts) for one in faults if self.theory.but(**one[1].differs()) != self.theory]
        return sorted(found, key=Ranked.key)

    def _screened(self, facts: list[Fact], faults: list[Named]) -> list[Named]:
        """The faults that explain one small experiment best."""
        judged = [one for one in self._judged(faults, facts) if one.left <= 1.0]
        exact = [one for one in judged if one.left <= EXACT]
        return [(one.name, one.theory) for one in (exact if len(exact) > SCREENED else judged[:SCREENED])]

    def _fitted(self, facts: list[Fact]) -> list[Named]:
        """Faults with a constant, at the constant that fits one experiment best."""
        telling = [fact for fact in facts if fact.informative and fact.trained] or [f for f in facts if f.informative]
        found = []
        for field, (starts, words) in CONSTANTS.items():
            for start in starts:
                value = self._constant(field, start, telling)
                if value is not None:
                    found.append((words(value), PAPER.but(**{field: value})))
        return found

    def _constant(self, field: str, start: float, facts: list[Fact]) -> float | None:
        """Gauss-Newton in one number; None where it finds nothing that explains."""

        def rest(value: float) -> np.ndarray:
            theory = self.theory.but(**{field: value})
            parts = [
                ((fields(self.predict, f.experiment, theory, f.plan)[f.name] - f.seen) / f.limit).ravel() / f.due
                for f in facts
            ]
            return np.concatenate(parts)

        value = start
        try:
            with np.errstate(all="ignore"):
                for _ in range(8):
                    now = rest(value)
                    if np.linalg.norm(now) < 1e-6 * len(facts):
                        break
                    step = 1e-4 * (abs(value) or 1.0)
                    slope = (rest(value + step) - now) / step
                    change = float(slope @ now) / float(slope @ slope)
                    if not np.isfinite(change):
                        return None
                    value -= change
                    if abs(change) < 1e-7 * abs(value):
                        break
                return value if np.linalg.norm(rest(value)) <= NEAR * np.sqrt(len(facts)) else None
        except Exception:
            return None

    def _pairs(self, found: list[Ranked]) -> Iterator[Named]:
        """Two faults at once: the singles that take a share of the error away, each with every other."""
        for one in [one for one in found if one.left < SOME][:3]:
            for other, fault in candidates():
                if set(one.theory.differs()).isdisjoint(fault.differs()):
                    yield " and ".join(sorted((one.name, other))), one.theory.but(**fault.differs())

    def _decided(self, best: list[Ranked], others: Evidence) -> list[Ranked]:
        """Among equals, the one that agrees best with everything else that was seen."""
        equals = [one for one in best if one.left <= best[0].left + EXACT][:SCREENED]
        usable = [(e, s) for e, s in others if not (s.raised or s.refused) and _cost(e) <= DEAR][:WITNESSES]
        groups = [self.facts([pair]) for pair in usable]

        def contradicted(one: Ranked) -> int:
            judged = [self.judge((one.name, one.theory), facts) for facts in groups if facts]
            return sum(after.left > NEAR for after in judged) * 2 + sum(after.beside > NEAR for after in judged)

        decided = sorted((replace(one, against=contradicted(one)) for one in equals), key=Ranked.key)
        return decided + [one for one in best if one not in equals]

    def alike(self, first: Theory, second: Theory, evidence: Evidence) -> bool:
        """Whether two faults predict the same, to rounding, of all the evidence: they cannot be told apart."""
        one, other = (self.theory.but(**fault.differs()) for fault in (first, second))
        for fact in self.facts(evidence):
            both = (fields(self.predict, fact.experiment, theory, fact.plan) for theory in (one, other))
            left, right = (found.get(fact.name) for found in both)
            if (left is None) != (right is None):
                return False
            if left is not None and (left.shape != right.shape or _distance(left, right, fact.limit)[1] > 2.0):
                return False
        return True


def candidates() -> Iterator[Named]:
    """The known faults, and the allowed choices that the subject was not found to make."""
    yield from (*FAULTS.items(), *CHOICES.items())


def _told(others: Evidence | Callable[[], Evidence]) -> Evidence:
    return list(others() if callable(others) else others)


def _cost(experiment: Experiment) -> float:
    """Of a prediction, roughly, in milliseconds."""
    if isinstance(experiment, LossExperiment):
        return 0.1
    if isinstance(experiment, Sequence):
        return sum(_cost(run) for run in experiment.runs)
    if isinstance(experiment, TrainExperiment):
        steps = experiment.recipe.steps or (experiment.recipe.epochs or 1) * len(experiment.rows)
        return 2.0 * steps + 0.2 * len(experiment.rows)
    return 2.0 + 0.2 * len(getattr(experiment, "pairs", ()))


@lru_cache(maxsize=8192)
def fields(predict: Predict, experiment: Experiment, theory: Theory, plan: derive.Plan | None = None) -> Numbers:
    """A prediction's numbers by name, remembered without the rest of it: many theories are asked of few experiments."""
    fresh = getattr(predict, "__wrapped__", predict)
    with np.errstate(all="ignore"):
        told = tuple(fresh(one, theory) for one in (plan.experiments if plan else (experiment,)))
        return dict(observables(plan.read(told) if plan else told[0]))


@lru_cache(maxsize=4096)
def _planned(experiment: Experiment, capabilities: tuple[str, ...], theory: Theory) -> derive.Plan | str:
    return derive.plan(experiment, capabilities, theory)


def observables(seen: Seen) -> Iterator[tuple[str, np.ndarray]]:
    """The numbers in an observation, by the names that bounds know."""
    if isinstance(seen, SequenceSeen):
        for index, run in enumerate(seen.runs):
            yield from ((f"runs.{index}.{name}", value) for name, value in observables(run))
        return
    for name in FIELDS[type(seen)]:
        value = getattr(seen, name)
        if value is not None:
            array = np.asarray(value, float)
            yield name, array[:2] if name == "slopes" else array
    if isinstance(seen, TrainSeen):
        named = {(entry["split"], name) for entry in seen.history or () for name in entry["metrics"]}
        for split, name in sorted(named):
            if name == "loss" or name.startswith(("rewards/", "logps/")):
                yield f"history.{split}.{name}", np.array(entries(seen.history, split, name))
    if isinstance(seen, StepSeen):
        for name, value in sorted((seen.metrics or {}).items()):
            if name.startswith(("rewards/", "logps/")):
                yield f"metrics.{name}", np.array(value)


def _vector(seen: Seen) -> bool:
    """Whether the reduced loss is the mean that is taken here, of one number a pair."""
    each, reduced = getattr(seen, "per_pair", None), getattr(seen, "reduced", None)
    return each is not None and reduced is not None and bool(np.isclose(np.mean(each), reduced, rtol=1e-6))


def _trains(name: str) -> bool:
    last = name.split(".", 2)[2] if name.startswith("runs.") else name
    return not last.startswith(("history.", "metrics.")) and last not in SHOWS_MORE


def _distance(one: np.ndarray, other: np.ndarray, limit: np.ndarray) -> tuple[float, float]:
    """Euclidean norm and greatest number of the difference, in units of `limit`; what is not finite in both, and alike,
    is no difference."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other) / limit)
    clipped = np.where(np.isfinite(error), np.minimum(error, 1e140), 1e140)
    return float(np.linalg.norm(clipped)), float(np.max(clipped, initial=0.0))


def evidence(observed: Evidence) -> Evidence:
    """What was seen in the failing scenes; runs that raised or were refused, or had no table, tell nothing."""
    kept = (TrainExperiment, StepExperiment, Sequence)
    unique = {id(seen): (experiment, seen) for experiment, seen in observed}
    return [
        (experiment, seen)
        for experiment, seen in unique.values()
        if not (seen.raised or seen.refused) and (not isinstance(experiment, kept) or _tabular(experiment))
    ]


def _tabular(experiment: Any) -> bool:
    runs = experiment.runs if isinstance(experiment, Sequence) else (experiment,)
    return all(run.policy is not None and run.body.kind != "speaking" for run in runs)


__all__ = ["PAPER", "Diagnostician", "Ranked", "evidence", "observables"]
