"""Which known fault is nearest to what was seen?

The oracle predicts the failing experiments under every known fault.  A fault explains a number where it brings the
prediction nearer than the paper's, and is refuted by one that the paper gets right and the fault does not.  Faults
with a constant in them are fitted.  Specimens test the diagnosis; they are not it.

What trains is judged before what is logged: a trainer may log another number than the one it differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from dpocheck import derive
from dpocheck.check import CHECKS
from dpocheck.evidence import (
    Evidence,
    Fact,
    cost,
    distance,
    evidence,
    fields,
    observables,
    planned,
    route,
    trains,
    vector,
)  # fmt: skip
from dpocheck.experiment import Experiment, LossExperiment
from dpocheck.observation import Seen
from dpocheck.oracle.faults import CHOICES, words
from dpocheck.oracle.theory import FAULTS, PAPER, Theory
from dpocheck.result import Diagnosis, Result
from dpocheck.session import Limit, Predict

SHOWN = 3  # diagnoses that a report names
NEAR = 0.2  # a fault that leaves more than this share of the error explains nothing
SOME = 0.9  # one that leaves less explains something
EXACT = 0.02
ROUNDING = 0.002  # what a fault that is the right one may leave beyond the bounds, which are those of the paper
SCREENED = 15  # faults that are judged on all the evidence, after one small experiment
WITNESSES = 24  # further observations that decide between faults which explain the failure equally well
DEAR = 40  # the cost of an experiment that is not predicted under every fault: some twenty steps of a run
K2 = 2.0**20  # the square of the scale between logits and float32 parameters: weight decay is told in the latter's unit

# Field of a theory -> (starting points of the fit, words with the fitted number).
CONSTANTS: dict[str, tuple[tuple[float, ...], Callable[[float], str]]] = {
    "beta_scale": ((0.5, 2.0), lambda x: f"beta times {x:.4g}"),
    "beta_fixed": ((0.1, 1.0), lambda x: f"beta fixed at {x:.4g}"),
    "offset": ((-0.5,), lambda x: f"{x:.4g} added to the logit"),
    "clamp": ((5.0,), lambda x: f"logit clamped at {x:.4g}"),
    "temperature": ((1.5,), lambda x: f"temperature {x:.4g}"),
    "token_floor": ((-4.0,), lambda x: f"token log-probs clamped at {x:.4g}"),
    "alpha_fixed": ((0.5,), lambda x: f"alpha divergence at {x:.4g} whatever was asked for"),
    "scale": ((0.5,), lambda x: f"loss times {x:.4g}"),
    "gradient_scale": ((0.5,), lambda x: f"gradient times {x:.4g}, loss right"),
    "clip_scale": ((0.5,), lambda x: f"clipped at {x:.4g} times the threshold, as before a loss scale is divided out"),
    "update": ((0.5,), lambda x: f"step times {x:.4g}"),
    "smoothing_default": ((0.2,), lambda x: f"label smoothing {x:.4g} though not asked for"),
    "sft_extra": ((0.5,), lambda x: f"undeclared SFT term, weight {x:.4g}"),
    "kl_extra": ((0.1,), lambda x: f"undeclared KL term, weight {x:.4g}"),
    "reference_moves": ((0.5,), lambda x: f"reference moves {x:.4g} of the way to the policy at each step"),
    "weight_decay_extra": ((0.01 / K2, 0.01), lambda x: f"undeclared weight decay, {x * K2:.4g} on the parameters"),
    "momentum_extra": ((0.5,), lambda x: f"undeclared momentum, {x:.4g}"),
}

Named = tuple[str, Theory]


@dataclass(frozen=True)
class Ranked:
    """A fault and how well it explains.  Shares of the paper's error that it leaves: of what trains, of what is logged;
    `against`: witnesses that contradict it; `unexplained` of `others` further wrong observations by the same route are
    left by it as they were."""

    name: str
    theory: Theory  # changes of the paper
    left: float
    beside: float = 0.0
    against: int = 0
    unexplained: int = 0
    others: int = 0

    @property
    def doubtful(self) -> bool:
        """Whether most of what else is wrong has another cause, or this is not the cause."""
        return 2 * self.unexplained > self.others

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
        best = self.ranked(failing, others, trained=shows_training(result.id))
        named = (Diagnosis(one.name, round(one.left, 6), one.unexplained, one.others) for one in best[:SHOWN])
        return replace(result, diagnosis=tuple(named))

    def ranked(
        self, failing: Evidence, others: Evidence | Callable[[], Evidence] = (), *, trained: bool = False
    ) -> list[Ranked]:
        """All faults that explain the failing evidence, nearest first; none where it shows no wrong number.

        `trained`: what failed is a gradient or where it led.  A metric that is wrong beside it has another cause.
        """
        facts = self.facts(failing)
        wrong = [fact for fact in facts if fact.informative and (fact.trained or not trained)]
        if not wrong:
            return self._chosen(facts) if trained else []
        telling = [fact for fact in wrong if fact.trained] or wrong  # not a metric that is wrong where nothing else is
        cheapest = min((fact.experiment for fact in telling), key=cost)
        first = [fact for fact in facts if fact.experiment == cheapest]
        if cost(cheapest) > DEAR:
            first = self._cheaper(_told(others)) or first
        found = self._judged(self._screened(first, list(candidates())), facts)
        if not found or found[0].left > EXACT:
            found = sorted(found + self._judged(self._fitted(first), facts), key=Ranked.key)
        if not found or found[0].left > EXACT:
            single = min((one.left for one in found), default=1.0)
            pairs = self._judged(self._screened(first, list(dict(self._pairs(found)).items())), facts)
            found = sorted(found + [one for one in pairs if one.left < single / 2], key=Ranked.key)  # both take part
        best = self._standing([one for one in found if one.left <= NEAR], failing, others)
        if len(best) > 1 and best[1].left <= best[0].left + EXACT:
            best = self._decided(best, _told(others))
        return best

    def _chosen(self, facts: list[Fact]) -> list[Ranked]:
        """The choices of the subject by which two experiments differ that are alike without: each number is as the
        choices found predict it, and what fails is the relation between the two."""
        found = []
        for field, value in self.theory.differs().items():
            without = self.theory.but(**{field: getattr(PAPER, field)})
            for first, second in combinations([fact for fact in facts if fact.trained], 2):
                if first.name != second.name or first.experiment == second.experiment:
                    continue
                apart, alike = (
                    distance(*(fields(self.predict, fact.experiment, theory, fact.plan)[first.name]
                               for fact in (first, second)), first.limit + second.limit)[1]
                    for theory in (self.theory, without)
                )  # fmt: skip
                if alike <= 1.0 < apart:
                    found.append(Ranked(words(PAPER.but(**{field: value})), PAPER.but(**{field: value}), 0.0))
                    break
        return found

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
                    size = distance(value, truth, limit)
                    found.append(Fact(experiment, name, value, limit, *size, trains(name), vector(seen), plan))
        return found

    def _plan(self, experiment: Experiment, seen: Seen) -> derive.Plan | None:
        if seen.via != "derived" or not self.capabilities:
            return None
        found = planned(experiment, self.capabilities, self.theory)
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
        affordable = sorted((pair for pair in others if cost(pair[0]) <= DEAR), key=lambda pair: cost(pair[0]))
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
        rest, peak = distance(fact.seen, wrong, fact.limit)
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
        for field, (starts, told) in CONSTANTS.items():
            for start in starts:
                value = self._constant(field, start, telling)
                if value is not None:
                    found.append((told(value), PAPER.but(**{field: value})))
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

    def _standing(
        self, best: list[Ranked], failing: Evidence, others: Evidence | Callable[[], Evidence]
    ) -> list[Ranked]:
        """Those that what else was seen by the same route does not refute.

        A fault is refuted where the paper is right and the fault is not; where, of the other wrong numbers that it
        has a bearing on, it leaves most wrong; and where it leaves a share of the failing error and most of the other
        wrong numbers unexplained.  A second fault elsewhere does none of this to one that is there: it adds errors
        that the first says nothing of, and the first still explains its own.  Where nothing stands there is no name:
        what fits one scene alone would send its reader to the wrong line.
        """
        if not best:
            return best
        routes = {route(experiment, seen, self.capabilities) for experiment, seen in failing}
        known = {id(seen) for _, seen in failing}
        usable = [
            (e, s) for e, s in _told(others)
            if not (s.raised or s.refused) and cost(e) <= DEAR and id(s) not in known
            and route(e, s, self.capabilities) in routes
        ]  # fmt: skip
        groups = [facts for pair in usable[:WITNESSES] if (facts := self.facts([pair]))]
        wrong = [facts for facts in groups if any(fact.informative for fact in facts)]

        kept = []
        for one in best[:SCREENED]:
            theory = self.theory.but(**one.theory.differs())
            if any(self._refuted(theory, facts) for facts in groups):
                continue
            left = [self.judge((one.name, one.theory), facts).left for facts in wrong]
            supported = replace(one, unexplained=sum(share > NEAR for share in left), others=len(wrong))
            if not _contradicted(left) and (one.left <= ROUNDING or not supported.doubtful):
                kept.append(supported)
        return kept

    def _refuted(self, theory: Theory, facts: list[Fact]) -> bool:
        """Whether the paper is right of all that trains, and the theory is not."""
        trained = [fact for fact in facts if fact.trained]
        if not trained or any(fact.informative for fact in trained):
            return False
        try:
            return any(self.share(fact, theory) > 1.0 for fact in trained)
        except Exception:  # a fault that cannot happen in this experiment
            return False

    def _decided(self, best: list[Ranked], others: Evidence) -> list[Ranked]:
        """Among equals, the one that agrees best with everything else that was seen."""
        equals = [one for one in best if one.left <= best[0].left + EXACT][:SCREENED]
        usable = [(e, s) for e, s in others if not (s.raised or s.refused) and cost(e) <= DEAR][:WITNESSES]
        groups = [self.facts([pair]) for pair in usable]

        def contradicted(one: Ranked) -> int:
            judged = [self.judge((one.name, one.theory), facts) for facts in groups if facts]
            return sum(after.left > NEAR for after in judged) * 2 + sum(after.beside > NEAR for after in judged)

        decided = sorted((replace(one, against=contradicted(one)) for one in equals), key=Ranked.key)
        return decided + [one for one in best if one not in equals]

    def alike(self, first: Theory, second: Theory, evidence: Evidence, *, trained: bool = False) -> bool:
        """Whether two faults predict the same, to rounding, of all the evidence: they cannot be told apart.

        `trained`: of what trains, whatever is logged beside it.
        """
        one, other = (self.theory.but(**fault.differs()) for fault in (first, second))
        for fact in self.facts(evidence):
            if trained and not fact.trained:
                continue
            both = (fields(self.predict, fact.experiment, theory, fact.plan) for theory in (one, other))
            left, right = (found.get(fact.name) for found in both)
            if (left is None) != (right is None):
                return False
            if left is not None and (left.shape != right.shape or distance(left, right, fact.limit)[1] > 2.0):
                return False
        return True


def _contradicted(left: list[float]) -> bool:
    """Whether most of the wrong observations that a fault has a bearing on are still wrong under it; `left`: its share
    of each one's error.  One that it leaves as it was, to `EXACT`, has another cause and tells nothing of it."""
    bearing = [share for share in left if abs(share - 1.0) > EXACT]
    return 2 * sum(share > NEAR for share in bearing) > len(bearing)


def shows_training(check: str) -> bool:
    """Whether a check judges nothing but a run's gradient or where it led."""
    needs = CHECKS[check].needs if check in CHECKS else frozenset()
    return bool(needs) and needs <= {"train.gradient", "train.logits"}


def candidates() -> Iterator[Named]:
    """The known faults, and the allowed choices that the subject was not found to make."""
    yield from (*FAULTS.items(), *CHOICES.items())


def _told(others: Evidence | Callable[[], Evidence]) -> Evidence:
    return list(others() if callable(others) else others)


__all__ = ["PAPER", "Diagnostician", "Evidence", "Ranked", "evidence", "observables"]
