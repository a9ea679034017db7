"""Which numbers were seen, what does a theory say of them, and how far are the two apart?

A `Fact` is one observable of one experiment.  `diagnose` judges theories by facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dpocheck import derive
from dpocheck.experiment import Experiment, LossExperiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import LogpSeen, LossSeen, Seen, SequenceSeen, StepSeen, TrainSeen
from dpocheck.oracle.theory import Theory
from dpocheck.reading import entries
from dpocheck.session import Predict

FIELDS: dict[type, tuple[str, ...]] = {
    LossSeen: ("per_pair", "reduced", "slopes", "rewards_chosen", "rewards_rejected"), LogpSeen: ("logps",),
    StepSeen: ("loss", "gradient", "attended"), TrainSeen: ("gradient", "attended", "logits"),
}  # fmt: skip
SHOWS_MORE = ("attended", "rewards_chosen", "rewards_rejected")  # beside what the gradient and the loss show

Evidence = list[tuple[Experiment, Seen]]
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


def route(experiment: Experiment, seen: Seen, capabilities: tuple[str, ...]) -> str:
    """The method of a subject that an observation came through in the end."""
    if seen.via != "derived":
        return derive.CAPABILITY.get(type(experiment), "train")
    return "step" if isinstance(experiment, LossExperiment) and "step" in capabilities else "train"


def cost(experiment: Experiment) -> float:
    """Of a prediction, roughly, in milliseconds."""
    if isinstance(experiment, LossExperiment):
        return 0.1
    if isinstance(experiment, Sequence):
        return sum(cost(run) for run in experiment.runs)
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
def planned(experiment: Experiment, capabilities: tuple[str, ...], theory: Theory) -> derive.Plan | str:
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


def vector(seen: Seen) -> bool:
    """Whether the reduced loss is the mean that is taken here, of one number a pair."""
    each, reduced = getattr(seen, "per_pair", None), getattr(seen, "reduced", None)
    return each is not None and reduced is not None and bool(np.isclose(np.mean(each), reduced, rtol=1e-6))


def trains(name: str) -> bool:
    last = name.split(".", 2)[2] if name.startswith("runs.") else name
    return not last.startswith(("history.", "metrics.")) and last not in SHOWS_MORE


def distance(one: np.ndarray, other: np.ndarray, limit: np.ndarray) -> tuple[float, float]:
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
