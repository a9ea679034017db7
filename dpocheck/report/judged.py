"""Which numbers of a run show a finding?  Those its check judged; a script prints them beside what is expected."""

from __future__ import annotations

import re
from collections.abc import Sequence as Several
from typing import Any

from dpocheck.experiment import LossExperiment, Sequence, TrainExperiment
from dpocheck.probes import tables
from dpocheck.reading import SHOWS
from dpocheck.report.describe import changed, difference, reference_words
from dpocheck.report.front import conventions
from dpocheck.report.words import line, plural
from dpocheck.result import Report, Result

LOGGED = ("loss", "rewards/", "logps/")
LOG = ("history", "per_pair", "reduced", "rewards", "logps", "loss")  # parts of `needs` that a log shows
KEPT = 12  # predictions that a script holds, of each sort; it prints the eight worst
SPIED = ("drawn", "graph", "frozen")
SHOWS_RATE = 1.0  # the smallest rate, in logits, at which the change of float32 logits is still a gradient


def kind(result: Result, runs: Several[TrainExperiment]) -> str:
    """What the check compares (`Check.judges`), where these runs can show it; else "prediction"."""
    from dpocheck.check import CHECKS

    declared = CHECKS[result.id].judges if result.id in CHECKS else "prediction"
    whole = all(isinstance(one, TrainExperiment | Sequence) for one in result.experiments)
    if declared in ("same", "change") and not (whole and len(runs) == 2 and all(run.policy for run in runs)):
        return "prediction"
    return declared


def spied(result: Result) -> str:
    """The model whose state a check judges."""
    return "policy" if "policy" in line(result.where) or result.id.startswith("POLICY") else "reference"


def rate(run: TrainExperiment) -> float | None:
    """The learning rate, in logits, of a run whose one step is a plain gradient step that shows; else None."""
    recipe = run.recipe
    plain = recipe.optimizer == "sgd" and recipe.steps == 1 and not (recipe.weight_decay or recipe.warmup_steps)
    shows = plain and recipe.lora is None and run.policy is not None and recipe.learning_rate >= SHOWS
    return recipe.learning_rate if shows else None


def predicted(result: Result, runs: Several[TrainExperiment], report: Report) -> list[dict[str, float]]:
    """Of each run the numbers the papers predict, by the label that `Comparison.where` gives them."""
    needs = _needs(result)
    where = re.search(r" of (.+), step \d+$", line(result.where))
    cells = _wanted(needs, ("gradient", "logits", "saved", "counted")) or not needs
    cells = cells or re.search(r"^(gradient|logits) of ", line(result.where)) is not None
    log = where is not None or _wanted(needs, LOG) or not needs
    found = []
    for run in runs:
        seen = _predict(run, report)
        numbers: dict[str, float] = {}
        if seen is not None and log:
            told = _log(run, seen.history, where and where[1], line(result.where))
            if not needs and _of_losses(result):  # what else is logged is no matter of the loss
                told = {name: value for name, value in told.items() if name.startswith("loss of ")}
            numbers |= _first(told, line(result.where))
        if seen is not None and cells:
            numbers |= _first(_cells(run, seen), line(result.where))
        found.append(numbers)
    return found


def _of_losses(result: Result) -> bool:
    return any(isinstance(one, LossExperiment) for one in result.experiments)


def _needs(result: Result) -> frozenset[str]:
    from dpocheck.check import CHECKS

    return CHECKS[result.id].needs if result.id in CHECKS else frozenset()


def _wanted(needs: frozenset[str], names: Several[str]) -> bool:
    return any(part in names for need in needs for part in need.split("."))


def _predict(run: TrainExperiment, report: Report) -> Any:
    from dpocheck.oracle import predict

    try:
        return predict(run, conventions(report))
    except Exception:  # the oracle predicts nothing here
        return None


def _first(numbers: dict[str, float], where: str) -> dict[str, float]:
    """At most KEPT, the one that the report names at the head, then its own metric."""
    metric = where.partition(" of ")[0]
    ranked = sorted(numbers, key=lambda label: (label != where, label.partition(" of ")[0] != metric))
    return {label: numbers[label] for label in ranked[:KEPT]}


def _log(run: TrainExperiment, history: Any, split: str | None, where: str) -> dict[str, float]:
    """The log in the trainer's own units."""
    k = 1.0 if run.body.kind == "speaking" else tables.scales(run.recipe.dtype).k
    units = {"grad_norm": k, "learning_rate": 1 / k**2}
    found = {}
    for entry in history or ():
        if entry["split"] == "summary" or (split and entry["split"] != split):
            continue
        for name, value in entry["metrics"].items():
            if name.startswith(LOGGED) or name == where.partition(" of ")[0]:
                label = f"{name} of {entry['split']}, step {entry['step']}"
                found[label] = float(value) * units.get(name, 1.0)
    return found


def _cells(run: TrainExperiment, seen: Any) -> dict[str, float]:
    """The cells of the gradient, or of the logits that move, largest first."""
    values, what = (seen.gradient, "gradient") if rate(run) else (seen.logits, "logits")
    if values is None or run.policy is None:
        return {}
    size = abs(values if rate(run) else values - run.policy.logits())
    worst = sorted(zip(*size.nonzero(), strict=True), key=lambda cell: (-size[cell], cell))
    word = run.tokenizer.word
    return {f"{what} of {word(int(v))!r} after {word(int(u))!r}": float(values[u, v]) for u, v in worst}


def limit(result: Result) -> float:
    """The largest deviation, relative to 1 + |expected|, that a script takes for equal.

    1e-4 is far above what float32 loses and far below a fault; where the finding itself is small, the middle between
    it and what a right trainer may be off by.
    """
    if result.experiments and "16" in _dtype(result.experiments[0]):
        return 1e-2
    if result.error and result.bound and 0 < result.bound < result.error < 1e-3:
        return (result.error * result.bound) ** 0.5
    return 1e-4


def _dtype(experiment: Any) -> str:
    if isinstance(experiment, Sequence):
        experiment = experiment.runs[0]
    return str(getattr(getattr(experiment, "recipe", experiment), "dtype", ""))


def done(run: TrainExperiment, other: TrainExperiment | None = None) -> str:
    """What was done, in one sentence; beside another run, only what both did."""
    recipe = run.recipe
    length = plural(recipe.steps, "step") if recipe.steps else plural(recipe.epochs or 1, "epoch")
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}.get(recipe.optimizer, recipe.optimizer)
    skipped = ("objective", "steps", "epochs", "optimizer", "learning_rate", "dtype", "defaults", "world_size")
    settings = changed(recipe, type(recipe)(), skip=(*skipped, *_apart(recipe, other and other.recipe)))
    objective = recipe.objective
    own = _apart(objective, other and other.recipe.objective)
    extras = changed(objective, type(objective)(kind=objective.kind), skip=("kind", "beta", *own))
    asked = f"{objective.kind} loss, beta {objective.beta:g}" + (f", {extras}" if extras else "")
    parts = [f"{length} of {optimizer} on {plural(len(run.rows), 'pair')}", asked, reference_words(run)]
    if recipe.world_size > 1:
        parts.append(f"{recipe.world_size} processes")
    if run.body.attention_dropout:
        parts.append(f"the model's configuration has attention_dropout {run.body.attention_dropout:g}")
    if run.body.kind == "speaking":
        parts.append("a small random Llama")
    for name, held in run.evaluation:
        parts.append(f"evaluated on {plural(len(held), 'pair')} ({line(name)})")
    return line("; ".join(parts) + (f"; {settings}" if settings else ""))


def _apart(record: Any, other: Any) -> list[str]:
    """The fields in which two records differ."""
    if other is None:
        return []
    return [name for name, value in vars(record).items() if value != getattr(other, name)]


def titles(runs: Several[TrainExperiment]) -> list[str]:
    """Of two runs what only one has: `batch 4` and `batch 1, accumulation 4`."""
    first, other = runs[0], runs[-1]
    texts = [difference(other, first), difference(first, other)]
    if not any(texts):
        return ["first run", "second run"]
    return [re.sub(r"\b(recipe|objective)\.", "", text) or "first run" for text in texts]
