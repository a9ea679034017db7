"""What is log pi(completion given prompt) under a table model, and what is its gradient?

The logits after token u are row u of the table, so log pi is the sum over scored positions of
log_softmax(logits[context])[target], and d log_softmax(z)[y] / dz = e_y - softmax(z).  Under a glass body the logits
also depend, linearly, on the shares of the tokens attended: z = table[context] + share @ block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpocheck.experiment import Table
from dpocheck.oracle.counting import Positions
from dpocheck.oracle.numbers import rounded
from dpocheck.oracle.theory import Theory

_REMEMBERED: dict[tuple[int, str], tuple[Table, np.ndarray]] = {}


def dense(table: Table, dtype: str = "float64") -> np.ndarray:
    """(context, target): the logits as a checkpoint of that type holds them; read-only, remembered by identity."""
    key = (id(table), dtype)
    if key not in _REMEMBERED:
        if len(_REMEMBERED) >= 64:
            _REMEMBERED.clear()
        logits = rounded(table.logits(), dtype)
        logits.flags.writeable = False
        _REMEMBERED[key] = (table, logits)  # the table is kept, so that its id stays its own
    return _REMEMBERED[key][1]


@dataclass(frozen=True, eq=False)
class Scores:
    """Token log-probs of scored positions, and what their gradient needs."""

    positions: Positions
    tokens: np.ndarray  # (position,)
    logits: np.ndarray  # (state, target), after the temperature
    probabilities: np.ndarray  # (state, target)
    sums: np.ndarray  # (row,): tokens times their counts, summed


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(state, target) log-probabilities.  The greatest term stays outside the sum: what is near 0 keeps its digits."""
    best = logits.argmax(axis=-1)[:, None]
    shifted = logits - np.take_along_axis(logits, best, axis=-1)
    others = np.exp(shifted)
    np.put_along_axis(others, best, 0.0, axis=-1)
    return shifted - np.log1p(others.sum(axis=-1, keepdims=True))


def score(table: np.ndarray, block: np.ndarray | None, positions: Positions, theory: Theory) -> Scores:
    """Log-probs of scored positions under `table` (context, target) and, if any, the glass `block` (token, target)."""
    logits = table[positions.contexts]
    if block is not None and positions.mix is not None and block.any():
        logits = logits + positions.mix @ block
    if theory.temperature != 1.0:
        logits = logits / theory.temperature
    logarithms = log_softmax(logits)
    tokens = _token_values(logits, logarithms, positions, theory)
    if theory.token_floor is not None:
        tokens = np.maximum(tokens, theory.token_floor)
    sums = np.bincount(positions.row, weights=positions.times * tokens, minlength=positions.rows)
    return Scores(positions, tokens, logits, np.exp(logarithms), sums)


def _token_values(logits: np.ndarray, logarithms: np.ndarray, positions: Positions, theory: Theory) -> np.ndarray:
    state, target = positions.state, positions.target
    if theory.normaliser == "logsumexp":
        return logarithms[state, target]
    if theory.normaliser == "negated":
        return -logarithms[state, target]
    if theory.normaliser == "log2":
        return logarithms[state, target] / np.log(2.0)
    if theory.normaliser == "prob":
        return np.exp(logarithms[state, target])
    if theory.normaliser == "argmax":
        return logarithms.max(axis=-1)[state]
    return logits[state, target] - (logits.max(axis=-1)[state] if theory.normaliser == "max" else 0.0)


def state_gradient(scores: Scores, row_weights: np.ndarray, theory: Theory) -> np.ndarray:
    """(state, target): the derivative of row_weights @ sums with respect to each state's logits."""
    positions = scores.positions
    state, target = positions.state, positions.target
    weights = row_weights[positions.row] * positions.times / theory.temperature
    if theory.token_floor is not None:
        weights = weights * (scores.tokens > theory.token_floor)
    if theory.normaliser == "prob":
        weights = weights * scores.tokens
    elif theory.normaliser == "log2":
        weights = weights / np.log(2.0)
    elif theory.normaliser == "negated":
        weights = -weights
    best = scores.logits.argmax(axis=-1)
    total = np.bincount(state, weights=weights, minlength=len(positions.contexts))
    gradient = np.zeros_like(scores.logits)
    if theory.normaliser not in ("none", "max"):
        gradient -= total[:, None] * scores.probabilities
    elif theory.normaliser == "max":
        gradient[np.arange(len(best)), best] -= total
    np.add.at(gradient, (state, best[state] if theory.normaliser == "argmax" else target), weights)
    return gradient


def spread(gradient: np.ndarray, positions: Positions, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A state gradient as the table's (context, target) and, under a glass body, the block's (token, target)."""
    table = np.zeros((size, size))
    if positions.mix is None:
        table[positions.contexts] = gradient  # a context is one state
        return table, None
    np.add.at(table, positions.contexts, gradient)
    return table, positions.mix.T @ gradient


def divisors(positions: Positions, rule: str) -> np.ndarray:
    """(row,): what a row's summed log-probs are divided by under `Theory.logps`."""
    if rule == "mean":
        return np.maximum(positions.counts, 1.0)
    if rule == "mean-padded":
        return np.maximum(positions.widths - 1.0, 1.0)  # every predicted position, masked or not
    if rule == "mean-batch":
        return np.full(positions.rows, max(positions.counts.sum(), 1.0))
    return np.ones(positions.rows)
