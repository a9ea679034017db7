"""What is a check?  A pure judgement of observations against predictions, declared with all that a report needs.

    @check("LOSS-ZERO-MARGIN", chapter="loss", level="must", needs={"loss.per_pair"}, scenes=[...], claim="...", ...)
    def judge(case: Case) -> Comparison: ...

A check never calls a subject and never draws an example: `runner.py` does both, once, for all of them.  Adding a check
is adding one function to a chapter under `checks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpocheck.adapter import Says
from dpocheck.experiment import Experiment, LossExperiment, TrainExperiment
from dpocheck.observation import Seen
from dpocheck.oracle.theory import PAPER, Theory

CHAPTERS = (
    "rows", "logps", "reference", "loss", "logz", "gradient", "step", "metrics", "options", "optimum", "runs", "lora",
    "ranks", "defaults", "tokenizer",
)  # fmt: skip
STAGES = ("tokens", "mask", "logps", "reference", "rewards", "loss", "gradient", "step", "run", "metrics")
LEVELS = ("must", "should", "info")
VERDICTS = ("pass", "fail", "info", "not-applicable", "blocked", "expected-fail", "unexpected-pass", "error", "unknown")


@dataclass(frozen=True)
class Scene:
    """Experiments that a check is judged on together: one, or several for a relation between runs.

    `family` groups scenes that one fault spoils together: a failed check blocks later stages of its own family only.
    """

    name: str
    experiments: tuple[Experiment, ...]
    family: str = "plain"
    tier: str = "quick"


def scene(name: str, *experiments: Experiment, family: str = "plain", tier: str = "quick") -> Scene:
    return Scene(name, experiments, family, tier)


@dataclass(frozen=True)
class Comparison:
    """The outcome of one judgement.

    `error` and `bound` are in the unit of the quantity compared; a failure has error > bound.  `observed` and
    `expected` are short and printable.  `where` says which number is meant, in words.  `convention` is (field, value)
    of a `Theory` where a choice that the sources leave open was seen.
    """

    verdict: str
    error: float | None = None
    bound: float | None = None
    observed: Any = None
    expected: Any = None
    where: str = ""
    reason: str = ""
    convention: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Case:
    """What a judge is given: the experiments of one scene, what was seen, what the oracle predicts."""

    experiments: tuple[Experiment, ...]
    observed: tuple[Any, ...]
    theory: Theory = PAPER
    says: Says = field(default_factory=Says)
    precision: float = 2.0**-24
    rivals: tuple[Theory, ...] = ()  # wrong theories that this input must tell from the paper, or it proves nothing
    predict: Callable[[Experiment, Theory], Seen] = field(default=None, repr=False)  # type: ignore[assignment]
    limit: Callable[[Experiment, str, Theory, float], Any] = field(default=None, repr=False)  # type: ignore[assignment]

    def predicted(self, index: int = 0, theory: Theory | None = None) -> Any:
        """The oracle's answer to experiment `index`, under the conventions found for this subject."""
        return self.predict(self.experiments[index], theory or self.theory)

    def rival(self, index: int = 0, **changes: Any) -> Any:
        """The oracle's answer under a wrong theory."""
        return self.predicted(index, self.theory.but(**changes))

    def bound(self, name: str, index: int = 0) -> np.ndarray | float:
        """The largest deviation of a correct subject in the observable `name`."""
        derived = self.limit(self.experiments[index], name, self.theory, self.precision)
        return derived + self.observed[index].floor.get(name, 0.0)


@dataclass(frozen=True)
class Check:
    """The declaration.  `needs` names observables ("loss.per_pair", "train.gradient"); a subject that cannot show one
    of them makes the check not-applicable.  `rivals` are the wrong theories the scenes must tell from the paper."""

    id: str
    chapter: str
    stage: str
    level: str
    claim: str
    source: str
    needs: frozenset[str]
    judge: Callable[[Case], Comparison]
    scenes: Sequence[Scene] | Callable[[Theory], Sequence[Scene]]
    version: int = 1
    tier: str = "quick"
    draw: Callable[[Any], Any] | None = None  # draw.Ask -> a strategy of tuples of experiments, for the full tier
    rivals: tuple[Theory, ...] = ()
    covers: tuple[str, ...] = ()  # ids of properties
    why: str = ""  # why it matters
    bug: str = ""  # a real bug that it catches
    fix: str = ""
    hears_refusals: bool = False  # the judge itself looks at `refused` and `raised`: "accepted or refused"
    says: str | None = None  # the field of `Says` that turns a convention into a promise
    judges: str = "prediction"  # what a script shows: "prediction"; "same", "change": two runs that agree, that differ;
    # "drawn", "graph", "frozen": what a model went through

    def staged(self, theory: Theory) -> Sequence[Scene]:
        return self.scenes(theory) if callable(self.scenes) else self.scenes


CHECKS: dict[str, Check] = {}


def check(id: str, *, chapter: str, stage: str, level: str, needs: set[str], **declared: Any) -> Callable:
    """Register the decorated judge under `id`.  Raises ValueError on an unknown chapter, stage or level, or a twin."""
    for value, allowed in ((chapter, CHAPTERS), (stage, STAGES), (level, LEVELS)):
        if value not in allowed:
            raise ValueError(f"check {id}: {value!r} is none of {', '.join(allowed)}")
    if id in CHECKS:
        raise ValueError(f"check {id} is declared twice")

    def register(judge: Callable[[Case], Comparison]) -> Callable[[Case], Comparison]:
        CHECKS[id] = Check(
            id=id, chapter=chapter, stage=stage, level=level, needs=frozenset(needs), judge=judge, **declared
        )
        return judge

    return register


# ------------------------------------------------------------------------------------------------ what most judges do


def agree(case: Case, name: str, index: int = 0) -> Comparison:
    """Observation and prediction agree in the observable `name`, number by number, within the derived bound.

    The power rule: where a rival theory's prediction lies within four bounds of the paper's in every number, this
    input cannot tell them apart and the verdict is `unknown`, never `pass`.
    """
    seen = getattr(case.observed[index], name)
    paper = getattr(case.predicted(index), name)
    if seen is None or paper is None:
        return Comparison("not-applicable", reason=f"{name} is not observable here")
    outcome = close(seen, paper, case.bound(name, index), label=labels(case.experiments[index], name))
    if outcome.verdict == "pass":
        for wrong in case.rivals:
            rival = getattr(case.predicted(index, case.theory.but(**wrong.differs())), name)
            reach = np.abs(np.asarray(rival, float) - np.asarray(paper, float))
            if not np.any(reach > 4 * np.asarray(case.bound(name, index))):
                return replace(outcome, verdict="unknown", reason=cannot_tell(wrong))
    return outcome


def cannot_tell(wrong: Theory) -> str:
    """Why an input proves nothing: it does not tell the paper from `wrong`."""
    from dpocheck.oracle.faults import words

    return f"this input cannot tell the paper from: {words(wrong)}"


def logged(case: Case, name: str, *, split: str = "train", index: int = 0) -> Comparison:
    """The values of one logged metric, step by step, agree with their definition."""
    where = f"{name} of {split}"
    paper = _by_step(case.predicted(index).history, split, name)
    logged_at = _by_step(case.observed[index].history, split, name)
    if not logged_at or not paper:
        return Comparison("not-applicable", reason=f"{where} is not logged")
    if missing := sorted(set(paper) - set(logged_at)):
        return Comparison("unknown", reason=f"{where} is not logged at step {missing[0]}")
    steps = sorted(paper)
    seen, due = [logged_at[step] for step in steps], [paper[step] for step in steps]
    limit = case.bound(f"history.{split}.{name}", index)
    return close(seen, due, limit, label=lambda at: f"{where}, step {steps[at[0]]}")


def _by_step(history: Any, split: str, name: str) -> dict[int, float]:
    """step -> the metric's value in that split."""
    return {
        entry["step"]: entry["metrics"][name]
        for entry in history or ()
        if entry["split"] == split and name in entry["metrics"]
    }


def equal(case: Case, name: str, first: int = 0, second: int = 1) -> Comparison:
    """Two runs agree in an observable, whatever the oracle says: their bounds together are the limit."""
    left, right = (getattr(case.observed[i], name) for i in (first, second))
    if left is None or right is None:
        return Comparison("not-applicable", reason=f"{name} is not observable here")
    limit = case.bound(name, first) + np.asarray(case.bound(name, second))
    return close(right, left, limit, label=labels(case.experiments[second], name))


def close(seen: Any, expected: Any, limit: Any, *, label: Callable[[tuple[int, ...]], str] | None = None) -> Comparison:
    """Two numbers or arrays agree within `limit`; the worst place is named."""
    seen, expected = np.asarray(seen, float), np.asarray(expected, float)
    if seen.shape != expected.shape:
        return Comparison("fail", observed=f"shape {seen.shape}", expected=f"shape {expected.shape}", where="shape")
    limit = np.broadcast_to(np.asarray(limit, float), seen.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(seen == expected, 0.0, np.abs(seen - expected))
        ratio = np.where(np.isnan(error), np.inf, np.where(error == 0, 0.0, error / limit))
    if ratio.size == 0:
        return Comparison("unknown", reason="nothing to compare")
    ranked = ratio
    if np.isinf(ratio).any():  # a bound of zero makes a trifle infinitely wrong: name the largest of what is wrong
        ranked = np.where(ratio > 1, np.where(np.isnan(error), np.inf, error), -1.0)
    worst = np.unravel_index(int(np.argmax(ranked)), ratio.shape)
    shown = float(error[worst])
    return Comparison(
        "pass" if ratio[worst] <= 1 else "fail",
        error=float("inf") if np.isnan(shown) else shown,
        bound=float(limit[worst]),
        observed=float(seen[worst]),
        expected=float(expected[worst]),
        where=label(tuple(int(i) for i in worst)) if label else "",
    )


def labels(experiment: Experiment, name: str) -> Callable[[tuple[int, ...]], str]:
    """Words for an index into the observable `name`."""
    if name in ("gradient", "logits", "attended"):
        word = experiment.tokenizer.word if isinstance(experiment, TrainExperiment) else str
        return lambda cell: f"{name} of {word(cell[-1])!r} after {word(cell[-2])!r}"
    if isinstance(experiment, LossExperiment) and name == "slopes":
        names = ("policy chosen", "policy rejected", "reference chosen", "reference rejected")
        return lambda cell: f"slope in the {names[cell[0]]} log-prob of pair {cell[1] + 1}"
    if name in ("per_pair", "rewards_chosen", "rewards_rejected", "margin_slopes"):
        return lambda cell: f"{name.replace('_', ' ')}, pair {cell[0] + 1}" if cell else name
    if name == "logps":
        return lambda cell: f"log-prob of row {cell[0] + 1}"
    return lambda cell: name if not cell else f"{name} {cell}"


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """The one to report: a failure before anything else, then what could not be told, then the tightest pass."""
    order = {"fail": 0, "unknown": 1, "info": 2, "pass": 3, "not-applicable": 4}

    def rank(comparison: Comparison) -> tuple[float, float]:
        ratio = comparison.error / comparison.bound if comparison.error and comparison.bound else 0.0
        return order[comparison.verdict], -ratio

    return min(comparisons, key=rank) if comparisons else Comparison("unknown", reason="nothing was compared")
