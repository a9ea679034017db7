"""What should be seen when an experiment is put to a trainer that computes DPO as the theory says?

`predict` answers with the record that a subject answers with (`dpocheck.observation`), `via` "oracle": every field
that the experiment determines, None for the others.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from dpocheck.experiment import Experiment, LogpExperiment, LossExperiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import LogpSeen, LossSeen, Seen, SequenceSeen, StepSeen, TrainSeen
from dpocheck.oracle import logps, objective, step, training
from dpocheck.oracle.counting import positions, sides_of
from dpocheck.oracle.numbers import rounded
from dpocheck.oracle.theory import PAPER, Theory


def predict(experiment: Experiment, theory: Theory = PAPER) -> Seen:
    """The observation that `theory` predicts.  Raises TypeError for anything but an experiment."""
    return _predict(experiment, theory)


@singledispatch
def _predict(experiment: object, theory: Theory) -> Seen:
    raise TypeError(f"nothing is predicted for {type(experiment).__name__}; give one of dpocheck.experiment's records")


@_predict.register
def _(experiment: LossExperiment, theory: Theory) -> LossSeen:
    arguments = rounded(experiment.arguments(), experiment.dtype)
    if theory.columns == "swapped":
        arguments = arguments[[1, 0, 3, 2]]
    if experiment.lengths is None and objective.needs_lengths(experiment.objective, theory):
        return LossSeen(via="oracle")  # log-probs per token of unknown lengths
    lengths = np.ones_like(arguments)
    if experiment.lengths is not None:
        lengths = np.array(experiment.lengths, dtype=np.float64).T[[0, 1, 0, 1]]
        if theory.columns == "swapped":
            lengths = lengths[[1, 0, 3, 2]]
    loss = objective.preference(arguments, lengths, experiment.objective, theory, dtype=experiment.dtype)
    slopes = loss.slopes[[1, 0, 3, 2]] if theory.columns == "swapped" else loss.slopes
    chosen, rejected = objective.rewards(loss, experiment.objective, theory)
    return LossSeen(
        via="oracle",
        per_pair=loss.per_pair,
        reduced=loss.reduced,
        rewards_chosen=chosen,
        rewards_rejected=rejected,
        slopes=slopes,
        margin_slopes=(slopes[0] - slopes[1]) / 2.0,
        inputs_changed=False,
    )


@_predict.register
def _(experiment: LogpExperiment, theory: Theory) -> LogpSeen:
    if experiment.body.kind == "speaking":
        return LogpSeen(via="oracle")
    table = logps.dense(experiment.table, experiment.dtype)
    pads = [i for row in experiment.rows for i, real in zip(row.ids, row.attention, strict=True) if not real]
    counted = positions(
        list(experiment.rows), theory.counted, theory, kind="silent", size=experiment.table.size, eos=None,
        pad=pads[0] if pads else None,
    )  # fmt: skip
    scores = logps.score(table, None, counted, theory)
    divisor = logps.divisors(counted, theory.logps)
    gradient = []
    for row in range(counted.rows):
        alone = np.zeros(counted.rows)
        alone[row] = 1.0 / divisor[row]
        gradient.append(logps.spread(logps.state_gradient(scores, alone, theory), counted, experiment.table.size)[0])
    return LogpSeen(
        via="oracle", logps=scores.sums / divisor, gradient=np.array(gradient), counted=_counted(counted)
    )


def _counted(counted: logps.Positions) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Per row (context, target, times), sorted, each cell once."""
    rows: list[dict[tuple[int, int], int]] = [{} for _ in range(counted.rows)]
    contexts = counted.contexts[counted.state]
    for row, context, target, times in zip(counted.row, contexts, counted.target, counted.times, strict=True):
        cell = (int(context), int(target))
        rows[row][cell] = rows[row].get(cell, 0) + int(times)
    return tuple(tuple((*cell, times) for cell, times in sorted(row.items())) for row in rows)


@_predict.register
def _(experiment: StepExperiment, theory: Theory) -> StepSeen:
    if experiment.body.kind == "speaking":
        return StepSeen(via="oracle", reference_gradient=0.0, silent=())
    batch = step.compile_batch(
        [sides_of(pair) for pair in experiment.pairs], theory, kind=experiment.body.kind, size=experiment.policy.size,
        eos=experiment.eos, pad=experiment.pad, padding=experiment.padding,
    )  # fmt: skip
    policy = logps.dense(experiment.policy, experiment.dtype)
    reference = logps.dense(experiment.reference, experiment.dtype)
    if theory.reference == "policy-start":
        reference = policy
    rows = step.reference_rows(reference, None, batch, theory)
    out = step.run_batch(policy, None, rows, batch, experiment.objective, theory, dtype=experiment.dtype)
    times = experiment.calls if theory.stale == "kept" else 1
    return StepSeen(
        via="oracle",
        loss=out.loss,
        metrics=out.metrics,
        gradient=times * out.table,
        attended=None if out.block is None else times * out.block,
        reference_gradient=0.0,
    )


@_predict.register
def _(experiment: TrainExperiment, theory: Theory) -> TrainSeen:
    return training.train(experiment, theory)


@_predict.register
def _(experiment: Sequence, theory: Theory) -> SequenceSeen:
    return SequenceSeen(via="oracle", runs=training.train_in_sequence(experiment.runs, theory))
