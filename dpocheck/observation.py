"""What is seen when an experiment is put to a subject, or predicted by the oracle: one record per kind.

The oracle and the subject answer with the same record, so that a check compares like with like.  Every field may be
None: not observable by this route.  Gradients and logits are float64 arrays in the table's own coordinates,
(context, target).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """Common to all answers.

    `via`: "native", "derived", "files" or "oracle".  `precision`: the unit roundoff the subject was found to compute
    in.  `raised`: the subject's own error on legitimate input.  `refused`: it said `Unsupported`, with its reason.
    """

    via: str = "native"
    precision: float | None = None
    raised: str | None = None
    refused: str | None = None
    output: str | None = None
    seconds: float | None = None
    floor: dict[str, float] = field(default_factory=dict)  # further absolute noise of a field, from the route taken
    spies: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()  # globals of its process that the subject left changed; they were put back
    died: bool = False  # the subject's process died, hung or broke its limits
    in_adapter: bool = False  # `raised` came from the adapter's own frame, not from the trainer


@dataclass(frozen=True, eq=False, kw_only=True)
class LossSeen(Seen):
    per_pair: np.ndarray | None = None  # (pair,) losses
    reduced: float | None = None  # the scalar that is differentiated
    rewards_chosen: np.ndarray | None = None  # (pair,)
    rewards_rejected: np.ndarray | None = None
    slopes: np.ndarray | None = None  # (4, pair): d reduced / d argument; NaN rows where no gradient is defined
    margin_slopes: np.ndarray | None = None  # (pair,): d reduced / d (policy_chosen - policy_rejected), with weight 1/B
    inputs_changed: bool | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LogpSeen(Seen):
    logps: np.ndarray | None = None  # (row,)
    gradient: np.ndarray | None = None  # (row, context, target): d logps[row] / d logit
    counted: tuple[tuple[tuple[int, int, int], ...], ...] | None = None  # per row (context, target, times)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSeen(Seen):
    loss: float | None = None
    metrics: dict[str, float] | None = None
    gradient: np.ndarray | None = None  # (context, target)
    attended: np.ndarray | None = None  # (context token attended, target): the glass block's gradient
    reference_gradient: float | None = None  # largest absolute gradient left on the reference
    silent: tuple[str, ...] | None = None  # trainable parameters that got no gradient


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainSeen(Seen):
    logits: np.ndarray | None = None  # (context, target) at the end
    gradient: np.ndarray | None = None  # (context, target), of a run of one SGD step: (before - after) / rate
    attended: np.ndarray | None = None  # the glass block of that gradient
    saved: dict[int, np.ndarray] | None = None  # step -> logits
    history: tuple[dict[str, Any], ...] | None = None  # {"step": int, "split": str, "metrics": {name: number}}
    moved: dict[str, float] | None = None  # parameter -> largest absolute change
    digest: str | None = None  # sha256 of all trained weights
    start_digest: str | None = None  # the same before training
    weights: dict[str, np.ndarray] | None = None  # parameter -> change, for speaking bodies


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceSeen(Seen):
    runs: tuple[TrainSeen, ...] = ()
