"""What does one batch give: the loss, the metrics, and the gradient of every logit?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpocheck.experiment import Objective
from dpocheck.oracle import objective as compose
from dpocheck.oracle.counting import Positions, Sides, padded, positions
from dpocheck.oracle.logps import Scores, divisors, score, spread, state_gradient
from dpocheck.oracle.theory import Theory


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs, compiled: the positions that count for the policy and for the reference, and which row is which."""

    pairs: int
    policy: Positions
    reference: Positions
    chosen: np.ndarray  # (pair,): its row
    rejected: np.ndarray
    size: int


def compile_batch(
    pairs: list[Sides], theory: Theory, *, kind: str, size: int, eos: int, pad: int, padding: str = "right",
) -> Batch:  # fmt: skip
    """Pad, lay out and count.  `kind`: the body's."""
    rows, n = padded(pairs, pad, padding), len(pairs)

    def counted(rule: str) -> Positions:
        return positions(rows, rule, theory, kind=kind, size=size, eos=eos, pad=pad, paired=True)

    policy = counted(theory.counted)
    other = theory.counted_reference
    reference = policy if other in (None, theory.counted) else counted(other)
    chosen, rejected = np.arange(n), np.arange(n, 2 * n)
    if theory.pairing == "interleaved":
        chosen, rejected = np.arange(0, 2 * n, 2), np.arange(1, 2 * n, 2)
    elif theory.pairing == "rolled":
        rejected = np.roll(rejected, -1)
    if theory.columns == "swapped":
        chosen, rejected = rejected, chosen
    return Batch(n, policy, reference, chosen, rejected, size)


@dataclass(frozen=True, eq=False)
class BatchOut:
    """`table` (context, target) and `block` (token, target) are gradients of the reduced loss."""

    loss: float
    metrics: dict[str, float]
    table: np.ndarray
    block: np.ndarray | None
    preference: compose.Preference


def reference_rows(table: np.ndarray, block: np.ndarray | None, batch: Batch, theory: Theory) -> np.ndarray:
    """(row,): log-probs of a batch under a reference, as the theory computes them."""
    rule = theory.logps_reference or theory.logps
    scores = score(table, block, batch.reference, theory)
    return scores.sums / divisors(batch.reference, rule)


def run_batch(
    table: np.ndarray, block: np.ndarray | None, reference: np.ndarray, batch: Batch, objective: Objective,
    theory: Theory, *, dtype: str = "float64", backward: bool = True,
) -> BatchOut:  # fmt: skip
    """Loss, metrics and, if asked, gradients of one batch.  `reference`: (row,) log-probs of its rows."""
    scores = score(table, block, batch.policy, theory)
    divisor = divisors(batch.policy, theory.logps)
    rows = scores.sums / divisor
    sides = (batch.chosen, batch.rejected)
    arguments = np.stack([rows[side] for side in sides] + [reference[side] for side in sides])
    counts = np.maximum(batch.policy.counts, 1.0)
    tokens = np.stack([counts[side] for side in sides])
    lengths = np.concatenate([_lengths(batch.policy, sides, theory.logps),
                              _lengths(batch.reference, sides, theory.logps_reference or theory.logps)])  # fmt: skip
    loss = compose.preference(arguments, lengths, objective, theory, dtype=dtype, tokens=tokens)
    metrics = batch_metrics(loss, tokens, objective, theory)
    gradient = np.zeros((batch.size, batch.size)), None
    if backward:
        gradient = _gradient(scores, loss, batch, divisor, theory)
    return BatchOut(loss.reduced, metrics, *gradient, loss)


def _lengths(counted: Positions, sides: tuple[np.ndarray, np.ndarray], rule: str) -> np.ndarray:
    """(2, pair): what per-token log-probs are still to be divided by; 1 where the theory has averaged already."""
    counts = np.maximum(counted.counts, 1.0) if rule == "sum" else np.ones(counted.rows)
    return np.stack([counts[side] for side in sides])


def _gradient(
    scores: Scores, loss: compose.Preference, batch: Batch, divisor: np.ndarray, theory: Theory
) -> tuple[np.ndarray, np.ndarray | None]:
    weights = np.zeros(batch.policy.rows)
    np.add.at(weights, batch.chosen, loss.slopes[0])
    np.add.at(weights, batch.rejected, loss.slopes[1])
    return spread(state_gradient(scores, weights / divisor, theory), batch.policy, batch.size)


def batch_metrics(
    loss: compose.Preference, tokens: np.ndarray, objective: Objective, theory: Theory
) -> dict[str, float]:
    """Batch means by the names that TRL logs."""
    chosen, rejected = compose.rewards(loss, objective, theory)
    logps = loss.sums[:2]
    margin = {
        "difference": chosen - rejected,
        "sum": chosen + rejected,
        "absolute": np.abs(chosen - rejected),
        "policy": objective.beta * (logps[0] - logps[1]),
    }[theory.margin]
    greater, equal = chosen > rejected, chosen == rejected
    accuracy = {
        "greater": greater,
        "greater-equal": greater | equal,
        "half": greater + 0.5 * equal,
        "less": chosen < rejected,
        "logps": logps[0] > logps[1],
        "positive": chosen > 0.0,
    }[theory.accuracy]
    logged = {
        "sum": logps, "mean": logps / tokens, "swapped": logps[::-1], "reference": loss.sums[2:],
    }[theory.logps_logged]  # fmt: skip
    return {
        "loss": loss.reduced,
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float(margin.mean()),
        "rewards/accuracies": float(np.mean(accuracy)),
        "logps/chosen": float(logged[0].mean()),
        "logps/rejected": float(logged[1].mean()),
    }
