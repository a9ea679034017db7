"""How does a gradient move the logits?  SGD with momentum, clipping and weight decay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dpocheck.experiment import Recipe
from dpocheck.oracle.theory import Theory


@dataclass(frozen=True, eq=False)
class State:
    """All that a step depends on.  Rows 0 .. size-1 of `logits` are the table; under a glass body the block follows."""

    logits: np.ndarray
    reference: np.ndarray
    buffer: np.ndarray | None = None  # momentum
    left: np.ndarray | None = None  # gradients that nobody cleared
    shrunk: float = 1.0  # what weight decay has left of the final norm
    moved: np.ndarray | float = 0.0  # logits at the start less logits now, without the rounding of a difference


def clipped(gradient: np.ndarray, limit: float | None, rule: str) -> np.ndarray:
    """The gradient scaled to a norm of at most `limit`: g * min(1, limit / |g|)."""
    if limit is None or rule == "ignored":
        return gradient
    if rule == "value":
        return np.clip(gradient, -limit, limit)
    norm = float(np.linalg.norm(gradient))
    if norm == 0.0 or (norm <= limit and rule != "always"):
        return gradient
    return gradient * (limit / norm)


def threshold(recipe: Recipe, theory: Theory) -> float | None:
    return None if recipe.clip_norm is None else theory.clip_scale * recipe.clip_norm


def accumulated(gradients: list[np.ndarray], shares: list[float], recipe: Recipe, theory: Theory) -> np.ndarray:
    total = np.zeros_like(gradients[0])
    for gradient, share in zip(gradients, shares, strict=True):
        total += share * gradient
        if theory.clip == "micro":
            total = clipped(total, threshold(recipe, theory), "norm")
    return total


def update(state: State, gradient: np.ndarray, rate: float, recipe: Recipe, theory: Theory) -> State:
    """One step of SGD on logits: logits -= rate * gradient.

    Momentum as torch defines it (Sutskever et al. 2013, without dampening): buffer = momentum * buffer + gradient,
    logits -= rate * buffer.  Weight decay: logits *= 1 - rate * weight_decay (Loshchilov & Hutter 2019).
    """
    decay = recipe.weight_decay + theory.weight_decay_extra
    momentum = recipe.momentum + theory.momentum_extra
    if theory.stale == "kept":
        gradient = gradient if state.left is None else state.left + gradient
        state = replace(state, left=gradient)
    gradient = gradient if theory.clip == "micro" else clipped(gradient, threshold(recipe, theory), theory.clip)
    gradient = gradient if state.shrunk == 1.0 else gradient * state.shrunk
    if decay and theory.decay == "coupled":
        gradient = gradient + decay * state.logits
    buffer = gradient if state.buffer is None or not momentum else momentum * state.buffer + gradient
    kept = 1.0 if theory.decay == "coupled" else 1.0 - rate * decay
    change = (theory.update * rate * state.shrunk) * buffer
    shrunk = state.shrunk
    if theory.decay == "all" and decay:
        change, kept, shrunk = kept * change, kept**2, shrunk * kept
    lost = change if kept == 1.0 else change + (1.0 - kept) * state.logits
    logits = state.logits - change if kept == 1.0 else kept * state.logits - change
    moved = lost if isinstance(state.moved, float) else state.moved + lost
    reference = state.reference
    if theory.reference_moves:
        reference = (1.0 - theory.reference_moves) * reference + theory.reference_moves * logits
    return replace(state, logits=logits, reference=reference, buffer=buffer, shrunk=shrunk, moved=moved)
