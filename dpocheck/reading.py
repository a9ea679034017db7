"""How does a subject's reply become an observation?  Judge side, numpy only, whatever brought the reply.

A reply is what the worker or a command line sends: plain fields and raw weights.  Weights become logits and gradients
here, once, for every route.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dpocheck.experiment import Experiment, LogpExperiment, LossExperiment, StepExperiment, TrainExperiment
from dpocheck.observation import LogpSeen, LossSeen, Seen, StepSeen, TrainSeen
from dpocheck.probes import tables

SHOWS = 1.0  # the smallest rate, in logits, at which a change of float32 logits still is a gradient
NEVER = -100.0  # logits below it stand for probability zero

KIND: dict[type, type[Seen]] = {
    LossExperiment: LossSeen, LogpExperiment: LogpSeen, StepExperiment: StepSeen, TrainExperiment: TrainSeen,
}  # fmt: skip


def seen(experiment: Experiment, payload: dict[str, Any], arrays: dict[str, np.ndarray], via: str) -> Seen:
    """The observation in a reply."""
    if isinstance(experiment, TrainExperiment):
        return _train(experiment, payload, arrays, via)
    fields = dict(payload.get("fields", {})) | arrays
    if isinstance(experiment, LossExperiment) and "slopes" in fields:
        fields["margin_slopes"] = (fields["slopes"][0] - fields["slopes"][1]) / 2
    if isinstance(experiment, LogpExperiment) and "gradient" in fields:
        fields["counted"] = tuple(counted(experiment, row) for row in fields["gradient"])
    if isinstance(experiment, StepExperiment) and fields.get("silent") is not None:
        fields["silent"] = tuple(fields["silent"])
    return KIND[type(experiment)](via=via, spies=payload.get("spies", {}), **fields)


def empty(experiment: Experiment, **fields: Any) -> Seen:
    """An observation that shows nothing but why."""
    return KIND[type(experiment)](**fields)


def _train(
    experiment: TrainExperiment, payload: dict[str, Any], arrays: dict[str, np.ndarray], via: str
) -> TrainSeen:
    fields = dict(payload["fields"])
    recipe, size = experiment.recipe, experiment.tokenizer.size
    k = 1.0 if experiment.body.kind == "speaking" else tables.scales(recipe.dtype).k
    fields["history"] = tuple(_units(entry, k) for entry in fields.get("history") or ())
    fields["floor"] = _in_units(fields.get("floor") or {}, k)
    if experiment.body.kind == "speaking":
        changes = {name.removeprefix("weights."): a for name, a in arrays.items() if name.startswith("weights.")}
        return TrainSeen(via=via, spies=payload.get("spies", {}), weights=changes, **fields)
    if "head" in arrays:
        head, start = arrays["head"], arrays["start"]
        fields["logits"] = tables.logits(head, size, recipe.dtype)
        if recipe.steps == 1 and recipe.optimizer == "sgd" and recipe.learning_rate >= SHOWS:
            change = start.astype(np.float64) - head
            fields["gradient"] = tables.logits(change, size, recipe.dtype) / recipe.learning_rate
            if experiment.body.kind in ("glass", "clock"):
                fields["attended"] = tables.attended(change, size, recipe.dtype) / recipe.learning_rate
        fields["floor"] |= leak(fields["logits"], tables.logits(start, size, recipe.dtype), experiment)
        fields["saved"] = {
            int(name.removeprefix("saved.")): tables.logits(array, size, recipe.dtype)
            for name, array in arrays.items()
            if name.startswith("saved.")
        }
    return TrainSeen(via=via, spies=payload.get("spies", {}), **fields)


def leak(after: np.ndarray, before: np.ndarray, experiment: TrainExperiment) -> dict[str, float]:
    """How far the logits of a probe are from those of a table once it has trained for several steps.

    Beside the head, the final norm moves by (change * H * logit / k^4) and the embedding by (change * logit / (k c)^2),
    both relative; each then acts on the logits' own change.  The first gradient is exact.
    """
    recipe, size = experiment.recipe, experiment.tokenizer.size
    if recipe.steps == 1:
        return {}
    scale, moved = tables.scales(recipe.dtype), float(np.max(np.abs(after - before)))
    high = float(np.max(np.abs(before), where=before > NEVER, initial=1.0)) + moved
    hidden = tables.hidden_size(size, experiment.body)
    return {"logits": moved * moved * high * (hidden * high / scale.k**4 + size / (scale.k * scale.c) ** 2)}


def _units(entry: dict[str, Any], k: float) -> dict[str, Any]:
    """The entry with gradient norm and rate in the experiment's unit, logits."""
    return {"step": entry["step"], "split": entry["split"], "metrics": _in_units(dict(entry["metrics"]), k)}


def _in_units(numbers: dict[str, float], k: float) -> dict[str, float]:
    """The same by name, where a name ends with the metric's."""
    factors = {"grad_norm": 1 / k, "learning_rate": k**2}
    return {name: value * factors.get(name.rpartition(".")[2], 1.0) for name, value in numbers.items()}


def counted(experiment: LogpExperiment, gradient: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(context, target, times) of the tokens that a row's gradient shows as scored.

    Row u of the gradient of a sum of log-softmaxes is sum_v a_v (e_v - p): with A = sum_v a_v, a = g + A p.  Cells
    that no scored token has give g = -A p, so A is the median of -g / p, and a follows.
    """
    logits, found = experiment.table.logits(), []
    for context in np.flatnonzero(np.any(gradient != 0, axis=1)):
        row = logits[context]
        p = np.exp(row - row.max())
        p /= p.sum()
        total = float(np.median(-gradient[context] / np.maximum(p, 1e-300)))
        for target in np.flatnonzero(np.abs(gradient[context] + total * p) > 0.01):
            times = float(gradient[context, target] + total * p[target])
            found.append((int(context), int(target), round(times, 3)))
    return tuple(found)


def entries(history: tuple[dict[str, Any], ...] | None, split: str, name: str) -> list[float]:
    """The values of one metric in one split, in the order of the steps."""
    rows = [entry for entry in history or () if entry["split"] == split and name in entry["metrics"]]
    return [entry["metrics"][name] for entry in sorted(rows, key=lambda entry: entry["step"])]
