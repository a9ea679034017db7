"""How far from the exact value may the loss, the metrics and the gradient of one batch under a table model be?

The logits are exact (a table); what rounds is the log-softmax, the sums over tokens, the loss, and the way back.
Derivations as in `error_loss.py`; every bound holds for any order of summation over tokens and pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpocheck.experiment import Objective
from dpocheck.oracle import objective as compose
from dpocheck.oracle.counting import Positions
from dpocheck.oracle.error_loss import LossError, gamma, preference_error
from dpocheck.oracle.logps import Scores, divisors, score, spread
from dpocheck.oracle.numbers import rounded
from dpocheck.oracle.step import Batch
from dpocheck.oracle.theory import Theory


def token_error(logits: np.ndarray, logarithms: np.ndarray, u: float) -> np.ndarray:
    """(state, target): of the log-softmax of exact logits z, with V targets.

    z - max rounds at u |z - max|; the sum of exponentials then has a relative error of u E_p[max - z] <= u log V,
    of the exponentials' own rounding, and of the sum's, V - 1 roundings: as a tree it takes log2 V of them, but a
    softmax over a dimension that is not the last, as in a cross-entropy of (row, V, token) logits, adds one term after
    the other.  The logarithm and the last difference round once more.  Forms like z - logsumexp(z) round at the size of
    the logits.  Together u (max|z| + 2 |lp| + 2 log V + 8 + V - 1).
    """
    size = logits.shape[-1]
    constant = 2.0 * np.log(size) + 8.0 + size - 1.0
    return u * (np.abs(logits).max(axis=-1, keepdims=True) + 2.0 * np.abs(logarithms) + constant)


def sequence_error(scores: Scores, u: float, perturbed: float = 0.0) -> np.ndarray:
    """(row,): of the summed log-probs: each token's error, and gamma(T - 1) sum |lp| for the sum.

    `perturbed`: the logits themselves carry an error whose Euclidean norm is at most this.  A token log-prob's gradient
    e_y - p has a norm of at most sqrt(2), so the sum moves by at most sqrt(2) T times it.
    """
    p = scores.positions
    with np.errstate(divide="ignore"):
        logarithms = np.log(scores.probabilities)
    errors = token_error(scores.logits, np.maximum(logarithms, -1e30), u)[p.state, p.target]
    counts = p.counts
    terms = np.bincount(p.row, weights=p.times * errors, minlength=p.rows)
    sizes = np.bincount(p.row, weights=p.times * np.abs(scores.tokens), minlength=p.rows)
    return terms + gamma(np.maximum(counts - 1.0, 0.0), u) * sizes + np.sqrt(2.0) * counts * perturbed


def kept_error(reference: Scores, dtype: str) -> np.ndarray:
    """(row,): what a reference adds that is kept in a coarser type than the policy.

    A table's logits are its stored weights, rounded, times hidden states that are powers of two: off by |z - fl(z)|,
    and a log-softmax by at most twice the greatest of these.  Log-softmax and sums are those of the policy.
    """
    p = reference.positions
    if dtype == "policy":
        return np.zeros(p.rows)
    moved = 2.0 * np.abs(reference.logits - rounded(reference.logits, dtype)).max(axis=-1)
    moved = np.where(np.isfinite(moved), moved, 0.0)
    return np.bincount(p.row, weights=p.times * moved[p.state], minlength=p.rows)


@dataclass(frozen=True, eq=False)
class BatchError:
    loss: LossError
    table: np.ndarray  # (context, target)
    block: np.ndarray | None  # (token, target)
    metrics: dict[str, float]


def state_errors(
    scores: Scores, positions: Positions, slope: np.ndarray, row_slope: np.ndarray, terms: float, u: float,
    tiny: float, perturbed: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """(state, target): of the gradient with respect to each state's logits.

    A position contributes slope * (e_y - p).  The slope of its row carries an error `row_slope`; p is off by a relative
    token error and four roundings (the exponential, the products), 1 - p and the product by two; all contributions
    are summed, `terms` more of them than at this state.  A probability or product below `tiny`, the smallest normal
    number, may become 0.  `perturbed` as in `sequence_error`: p moves by at most half
    of it (the softmax has a Lipschitz constant of 1/2).
    """
    state, target, times = positions.state, positions.target, positions.times
    n = len(positions.contexts)
    own, off = times * np.abs(slope[positions.row]), times * row_slope[positions.row]
    own_sum, off_sum = np.bincount(state, own, minlength=n)[:, None], np.bincount(state, off, minlength=n)[:, None]
    occurrences = np.bincount(state, minlength=n)[:, None]
    p = scores.probabilities
    with np.errstate(divide="ignore"):
        relative = token_error(scores.logits, np.maximum(np.log(p), -1e30), u) + 4.0 * u
    # p |log p| is what the token error of an unlikely token comes to; it vanishes with p.
    error = off_sum * p + own_sum * np.where(p > 0.0, p * np.minimum(relative, 1.0), 0.0) + own_sum * perturbed / 2.0
    size = own_sum * p
    np.add.at(error, (state, target), off + 2.0 * u * own)
    np.add.at(size, (state, target), own)
    return error + gamma(occurrences + terms, u) * size + 2.0 * tiny * occurrences


def batch_error(
    table: np.ndarray, block: np.ndarray | None, reference: Scores, batch: Batch, out_loss: compose.Preference,
    objective: Objective, theory: Theory, u: float, tiny: float, perturbed: float = 0.0,
) -> BatchError:  # fmt: skip
    """Bounds on `step.run_batch`.  `perturbed`: the norm of the error that the policy's logits already carry."""
    scores = score(table, block, batch.policy, theory)
    divisor = divisors(batch.policy, theory.logps)
    policy_rows = sequence_error(scores, u, perturbed) / divisor
    reference_rows = sequence_error(reference, u) + kept_error(reference, theory.reference_dtype)
    reference_rows = reference_rows / divisors(batch.reference, theory.logps_reference or theory.logps)
    sides = (batch.chosen, batch.rejected)
    carried = np.stack([policy_rows[side] for side in sides] + [reference_rows[side] for side in sides])
    tokens = np.stack([np.maximum(batch.policy.counts, 1.0)[side] for side in sides])
    lengths = np.concatenate([tokens, tokens])
    loss = preference_error(out_loss, objective, theory, lengths, u, tiny, carried, tokens)
    slope, row_slope = np.zeros(batch.policy.rows), np.zeros(batch.policy.rows)
    for index, side in enumerate(sides):
        np.add.at(slope, side, np.abs(out_loss.slopes[index]))
        np.add.at(row_slope, side, loss.slopes[index])
    states = state_errors(scores, batch.policy, slope / divisor, row_slope / divisor, batch.pairs, u, tiny, perturbed)
    # A glass body's shares are themselves off by roundings of the attention.  Softmax and sums take 2 log2(size) + 12.
    # The clock's score is q.k / 16 with |k| = 8 and |q| = 4 sqrt 2, turned by cosines and sines that are off by 2 u:
    # each coordinate of q by 16 u, of k by 12 u; with the two products and their sum q.k is off by less than
    # 5.7 * 12 * 1.5 u + 8 * 16 * 1.5 u + 2 * 45 u < 390 u, the score by 25 u, a share by twice that.
    cells, shares = spread(states, batch.policy, batch.size)
    if shares is not None:
        sizes = np.abs(batch.policy.mix).T @ _sizes(scores, batch.policy, slope / divisor)
        shares = shares + gamma(2 * np.log2(batch.size) + 12 + 50, u) * sizes
    return BatchError(loss, cells, shares, _metric_error(loss, out_loss, carried, objective, theory, u))


def _sizes(scores: Scores, positions: Positions, slope: np.ndarray) -> np.ndarray:
    """(state, target): the sum of the contributions' absolute values."""
    own = positions.times * np.abs(slope[positions.row])
    total = np.bincount(positions.state, own, minlength=len(positions.contexts))
    sizes = total[:, None] * scores.probabilities
    np.add.at(sizes, (positions.state, positions.target), own)
    return sizes


def _metric_error(
    loss: LossError, out: compose.Preference, carried: np.ndarray, objective: Objective, theory: Theory, u: float
) -> dict[str, float]:
    """Of batch means: the mean of the errors, and gamma(B + 1) times the mean size for the mean itself."""
    pairs = len(out.per_pair)
    chosen, rejected = compose.rewards(out, objective, theory)
    mean = gamma(pairs + 1, u)

    def means(errors: np.ndarray, sizes: np.ndarray) -> float:
        return float(errors.mean() + mean * (np.abs(sizes) + errors).mean())

    difference = loss.rewards.sum(axis=0) + u * (np.abs(chosen) + np.abs(rejected))
    # A pair whose rewards are within their errors of each other may count either way.  Rewards that are both 0 are
    # exact, the same numbers subtracted: how a tie counts is then a convention.
    open_pairs = (np.abs(chosen - rejected) <= loss.rewards.sum(axis=0)) & ((chosen != 0.0) | (rejected != 0.0))
    return {
        "loss": loss.reduced,
        "rewards/chosen": means(loss.rewards[0], chosen),
        "rewards/rejected": means(loss.rewards[1], rejected),
        "rewards/margins": means(difference, np.abs(chosen) + np.abs(rejected)),
        "rewards/accuracies": float(np.mean(open_pairs) + 2.0 * u),
        "logps/chosen": means(carried[0], out.sums[0]),
        "logps/rejected": means(carried[1], out.sums[1]),
    }
