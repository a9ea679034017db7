"""Which known fault is nearest to what was seen?

The oracle predicts the failing experiments under every known fault.  A fault explains an observable where it brings
the prediction nearer than the paper's, and is refuted by one that the paper gets right and the fault does not.
Specimens test the diagnosis; they are not it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from dpocheck.experiment import Experiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import LogpSeen, LossSeen, Seen, SequenceSeen, StepSeen, TrainSeen
from dpocheck.oracle.theory import FAULTS, PAPER, Theory
from dpocheck.reading import entries
from dpocheck.result import Diagnosis, Result
from dpocheck.session import Limit, Predict

SHOWN = 3  # diagnoses that a report names
NEAR = 0.2  # a fault that leaves more than this share of the error explains nothing
EXACT = 0.02
WITNESSES = 24  # further observations that decide between faults which explain the failure equally well
FIELDS: dict[type, tuple[str, ...]] = {
    LossSeen: ("per_pair", "reduced", "slopes", "rewards_chosen", "rewards_rejected"), LogpSeen: ("logps",),
    StepSeen: ("loss", "gradient", "attended"), TrainSeen: ("gradient", "attended", "logits"),
}  # fmt: skip

Evidence = list[tuple[Experiment, Seen]]


class Diagnostician:
    """Names the faults behind the failures of one subject."""

    def __init__(self, theory: Theory, precision: float, predict: Predict, limit: Limit) -> None:
        self.theory, self.precision, self.predict, self.limit = theory, precision, predict, limit

    def named(self, result: Result, failing: Evidence, others: Evidence) -> Result:
        """The result with the nearest faults, best first; `others` are what else was seen of the subject."""
        if result.verdict != "fail" or not failing:
            return result
        ranked = self.rank(failing, list(FAULTS.items()))
        if not ranked or ranked[0][0] > EXACT:
            ranked = sorted(ranked + self._pairs(failing, ranked), key=lambda item: item[0])
        best = [item for item in ranked if item[0] <= NEAR]
        if len(best) > 1 and best[1][0] <= best[0][0] + EXACT:
            best = self._decide(best, others)
        shown = tuple(Diagnosis(name, round(score, 6)) for score, name, _ in best[:SHOWN])
        return replace(result, diagnosis=shown)

    def rank(self, evidence: Evidence, faults: list[tuple[str, Theory]]) -> list[tuple[float, str, Theory]]:
        """(score, name, theory), nearest first.  Score 0: it explains everything; 1: nothing."""
        scored = []
        for name, fault in faults:
            theory = self.theory.but(**fault.differs())
            if theory == self.theory:
                continue
            scored.append((self.score(evidence, theory), name, fault))
        return sorted(scored, key=lambda item: (item[0], len(item[1])))

    def score(self, evidence: Evidence, theory: Theory) -> float:
        """The largest share of the paper's error that the theory leaves, over experiments and observables."""
        worst = 0.0
        for experiment, seen in evidence:
            try:
                wrong = self.predict(experiment, theory)
            except Exception:  # a fault that cannot happen in this experiment
                return float("inf")
            paper = self.predict(experiment, self.theory)
            for name, value in observables(seen):
                truth, other = _field(paper, name), _field(wrong, name)
                if truth is None:
                    continue
                if other is None:  # the fault leaves this observable open, so it explains nothing of it
                    worst = max(worst, 1.0)
                    continue
                noise = np.max(self._noise(experiment, name, seen))
                worst = max(worst, _share(value, truth, other, float(noise)))
                if worst == float("inf"):
                    return worst
        return worst

    def _noise(self, experiment: Experiment, name: str, seen: Seen) -> Any:
        with np.errstate(all="ignore"):
            try:
                derived = self.limit(experiment, name, self.theory, self.precision)
            except KeyError:
                derived = np.array([0.0])
        finite = np.asarray(derived, float)
        finite = finite[np.isfinite(finite)]
        return (finite if finite.size else np.array([1e-6])) + seen.floor.get(name, 0.0)

    def _pairs(self, failing: Evidence, ranked: list[tuple[float, str, Theory]]) -> list[tuple[float, str, Theory]]:
        """Two faults at once: the most telling single faults, each with every other."""
        combined: dict[str, Theory] = {}
        for _, first, fault in ranked[:5]:
            for second, other in FAULTS.items():
                if set(fault.differs()).isdisjoint(other.differs()):
                    pair = " and ".join(sorted((first, second)))
                    combined[pair] = fault.but(**other.differs())
        return self.rank(failing, list(combined.items()))[:SHOWN]

    def _decide(self, best: list[tuple[float, str, Theory]], others: Evidence) -> list[tuple[float, str, Theory]]:
        """Among equals, the one that agrees best with everything else that was seen."""
        equals = [item for item in best if item[0] <= best[0][0] + EXACT][:6]
        witnesses = [(e, s) for e, s in others if not (s.raised or s.refused)][:WITNESSES]

        def contradicted(item: tuple[float, str, Theory]) -> tuple[int, float]:
            theory = self.theory.but(**item[2].differs())
            against = sum(self.score([witness], theory) > NEAR for witness in witnesses)
            return against, item[0]

        return sorted(equals, key=contradicted) + [item for item in best if item not in equals]


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


def _field(record: Any, name: str) -> np.ndarray | None:
    if name.startswith("runs."):
        _, index, rest = name.split(".", 2)
        return _field(record.runs[int(index)], rest)
    if name.startswith("history."):
        _, split, metric = name.split(".", 2)
        return np.array(entries(record.history, split, metric)) if record.history else None
    value = getattr(record, name, None)
    if value is None:
        return None
    array = np.asarray(value, float)
    return array[:2] if name == "slopes" else array


def _share(seen: np.ndarray, paper: np.ndarray, wrong: np.ndarray, noise: float) -> float:
    """What the theory leaves of the paper's error; infinite where the paper is right and the theory is not."""
    if seen.shape != paper.shape or seen.shape != wrong.shape or not seen.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        left, before = np.abs(seen - wrong), np.abs(seen - paper)
    left, before = np.where(seen == wrong, 0, left), np.where(seen == paper, 0, before)
    rest, due = _size(left), _size(before)
    allowed = noise * np.sqrt(seen.size)
    if due <= allowed:
        return 0.0 if rest <= 2 * allowed else float("inf")
    return 0.0 if rest <= allowed else rest / due


def _size(error: np.ndarray) -> float:
    clipped = np.where(np.isfinite(error), np.minimum(error, 1e150), 1e150)
    return float(np.linalg.norm(clipped))


def evidence(observed: Evidence) -> Evidence:
    """What was seen in the failing scenes; runs that raised or were refused, or had no table, tell nothing."""
    kept = (TrainExperiment, StepExperiment, Sequence)
    return [
        (experiment, seen)
        for experiment, seen in observed
        if not (seen.raised or seen.refused) and (not isinstance(experiment, kept) or _tabular(experiment))
    ]


def _tabular(experiment: Any) -> bool:
    runs = experiment.runs if isinstance(experiment, Sequence) else (experiment,)
    return all(run.policy is not None and run.body.kind != "speaking" for run in runs)


__all__ = ["PAPER", "Diagnostician", "evidence", "observables"]
