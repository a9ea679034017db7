"""How far may a correct trainer be from the oracle?

`bound(experiment, field, predicted, precision)` is the largest deviation that rounding explains, for any order of the
operations and any stable way to write them: nothing in it is fitted to a trainer.  The derivations stand beside the
formulas, in `oracle/error_loss.py` (from four log-probs), `oracle/error_step.py` (from table models) and
`oracle/error_run.py` (whole runs).  What is not rounding, like the number of digits that a trainer logs, is the
observation's own `floor` and is added by the caller.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, singledispatch

import numpy as np

from dpocheck.experiment import Experiment, LogpExperiment, LossExperiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import Seen
from dpocheck.oracle import logps, objective, step
from dpocheck.oracle.counting import positions, sides_of
from dpocheck.oracle.error_loss import preference_error
from dpocheck.oracle.error_run import Errors, run_errors
from dpocheck.oracle.error_step import BatchError, batch_error, sequence_error, state_errors
from dpocheck.oracle.numbers import ROUNDOFF, TINY, rounded
from dpocheck.oracle.theory import PAPER, Theory

__all__ = ["ROUNDOFF", "bound"]

ORACLE = ROUNDOFF["float64"]  # the oracle rounds too, and every bound is linear in the roundoff


def bound(
    experiment: Experiment, field: str, predicted: Seen, precision: float, theory: Theory = PAPER
) -> float | np.ndarray:
    """The largest deviation of a correct subject from `predicted` in one observable.

    `field` names a field of the observation; of a dictionary of metrics "metrics.NAME"; of a history
    "history.SPLIT.NAME", one number per entry of that split that has the metric; of a sequence "runs.INDEX.FIELD".
    `precision` is the unit roundoff of the subject's arithmetic (`ROUNDOFF`).  The shape is the observable's own, or a
    float.  Infinite where the experiment does not determine the observable.  Raises KeyError for an unknown field.
    """
    return _bound(experiment, field, predicted, precision + ORACLE, theory)


@singledispatch
def _bound(experiment: object, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    raise TypeError(f"no bounds are known for {type(experiment).__name__}")


def _only(found: dict[str, object], field: str, kind: str) -> float | np.ndarray:
    if field not in found:
        raise KeyError(f"no bound is known for {field!r} of a {kind} experiment; known: {', '.join(sorted(found))}")
    return found[field]  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------------- loss


@_bound.register
def _(experiment: LossExperiment, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    arguments = rounded(experiment.arguments(), experiment.dtype)
    lengths = np.ones_like(arguments)
    if experiment.lengths is not None:
        lengths = np.array(experiment.lengths, dtype=np.float64).T[[0, 1, 0, 1]]
    elif objective.needs_lengths(experiment.objective, theory):
        return np.inf
    loss = objective.preference(arguments, lengths, experiment.objective, theory)
    tiny = TINY[experiment.dtype]
    errors = preference_error(loss, experiment.objective, theory, lengths, u, tiny)
    return _only({
        "per_pair": errors.per_pair, "reduced": errors.reduced, "slopes": errors.slopes,
        "margin_slopes": (errors.slopes[0] + errors.slopes[1]) / 2.0,
        "rewards_chosen": errors.rewards[0], "rewards_rejected": errors.rewards[1],
    }, field, "loss")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- log-probs


@_bound.register
def _(experiment: LogpExperiment, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    pads = [i for row in experiment.rows for i, real in zip(row.ids, row.attention, strict=True) if not real]
    size = experiment.table.size
    counted = positions(
        list(experiment.rows), theory.counted, theory, kind="silent", size=size, eos=None, pad=pads[0] if pads else None
    )
    scores = logps.score(logps.dense(experiment.table, experiment.dtype), None, counted, theory)
    divisor = logps.divisors(counted, theory.logps)
    if field != "gradient":
        return _only({"logps": sequence_error(scores, u) / divisor}, field, "logp")
    rows = []
    for row in range(counted.rows):
        slope = np.zeros(counted.rows)
        slope[row] = 1.0 / divisor[row]
        states = state_errors(scores, counted, slope, np.zeros(counted.rows), 1.0, u, TINY[experiment.dtype])
        rows.append(logps.spread(states, counted, size)[0])
    return np.array(rows)


# --------------------------------------------------------------------------------------------------------------- step


@_bound.register
def _(experiment: StepExperiment, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    if experiment.body.kind == "speaking":
        return np.inf
    errors = _step_errors(experiment, theory, u)
    found = {"loss": errors.loss.reduced, "gradient": errors.table, "reference_gradient": 0.0}
    if errors.block is not None:
        found["attended"] = errors.block
    metrics = {f"metrics.{name}": value for name, value in errors.metrics.items()}
    return _only(found | metrics | {"metrics": errors.metrics}, field, "step")


@lru_cache(maxsize=256)
def _step_errors(experiment: StepExperiment, theory: Theory, u: float) -> BatchError:
    batch = step.compile_batch(
        [sides_of(pair) for pair in experiment.pairs], theory, kind=experiment.body.kind, size=experiment.policy.size,
        eos=experiment.eos, pad=experiment.pad, padding=experiment.padding,
    )  # fmt: skip
    policy = logps.dense(experiment.policy, experiment.dtype)
    reference = logps.dense(experiment.reference, experiment.dtype)
    rows = step.reference_rows(reference, None, batch, theory)
    out = step.run_batch(policy, None, rows, batch, experiment.objective, theory, backward=False)
    scores = logps.score(reference, None, batch.reference, theory)
    return batch_error(
        policy, None, scores, batch, out.preference, experiment.objective, theory, u, TINY[experiment.dtype]
    )


# ---------------------------------------------------------------------------------------------------------------- run


@_bound.register
def _(experiment: TrainExperiment, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    if experiment.policy is None or experiment.body.kind == "speaking":
        return np.inf
    errors, size = _run_errors(experiment, theory, u), experiment.policy.size
    if field.startswith("history"):
        return _history(errors, field, predicted)
    last = max(errors.logits, default=0)
    found: dict[str, object] = {"logits": np.inf, "gradient": np.inf, "attended": np.inf, "saved": {}}
    if errors.logits:
        found["logits"] = errors.logits[last][:size]
        found["saved"] = {n: cells[:size] for n, cells in errors.logits.items() if n}
    if errors.gradient is not None:
        found["gradient"] = errors.gradient[:size]
        if len(errors.gradient) > size:
            found["attended"] = errors.gradient[size:]
    return _only(found | {f"saved.{n}": cells for n, cells in found["saved"].items()}, field, "train")  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _run_errors(experiment: TrainExperiment, theory: Theory, u: float) -> Errors:
    return run_errors(experiment, theory, u)


def _history(errors: Errors, field: str, predicted: Seen) -> np.ndarray:
    """(entry,): the bounds on one metric, in the order of the predicted history."""
    _, split, name = field.split(".", 2)
    entries = [e for e in predicted.history or () if e["split"] == split and name in e["metrics"]]  # type: ignore[attr-defined]
    return np.array([errors.metrics.get((e["step"], split), {}).get(name, np.inf) for e in entries])


@_bound.register
def _(experiment: Sequence, field: str, predicted: Seen, u: float, theory: Theory) -> float | np.ndarray:
    """A resumed run is as far off as one that was never interrupted."""

    if not field.startswith("runs."):
        raise KeyError(f"no bound is known for {field!r} of a sequence; known: runs.INDEX.FIELD")
    _, index, rest = field.split(".", 2)
    run = experiment.runs[int(index)]
    whole = replace(run, recipe=replace(run.recipe, resume_from=None))
    return _bound(whole, rest, predicted.runs[int(index)], u, theory)  # type: ignore[attr-defined]
