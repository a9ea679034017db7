"""Which wrong losses do people write by mistake?

The known wrong counterparts of the formulas in `losses.py`, by the names that `Theory.link`, `Theory.smoothing` and
`Theory.margins` give them.  Arrays in, (value, slope) out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from dpocheck.oracle.losses import Curve, dpo, ipo, softplus
from dpocheck.oracle.numbers import rounded


def sigmoid(m: np.ndarray) -> Curve:
    return expit(-m), -expit(m) * expit(-m)


def minus_sigmoid(m: np.ndarray) -> Curve:
    return -expit(m), -expit(m) * expit(-m)


def logsigmoid_positive(m: np.ndarray) -> Curve:
    return -softplus(-m), expit(-m)


def exponential(m: np.ndarray) -> Curve:
    with np.errstate(over="ignore"):
        value = np.exp(-m)
    return value, -value


def linear(m: np.ndarray) -> Curve:
    return -m, -np.ones_like(m)


def focal(m: np.ndarray) -> Curve:
    weight, value = expit(-m), softplus(-m)
    return weight * value, -weight * expit(m) * value - weight**2


def tanh(m: np.ndarray) -> Curve:
    squashed = 2.0 * np.tanh(m / 2.0)
    return softplus(-squashed), -expit(-squashed) * (1.0 - np.tanh(m / 2.0) ** 2)


def absolute(m: np.ndarray) -> Curve:
    return softplus(-np.abs(m)), -np.sign(m) * expit(-np.abs(m))


def log2(m: np.ndarray) -> Curve:
    value, slope = dpo(m)
    return value / np.log(2.0), slope / np.log(2.0)


def epsilon(m: np.ndarray, added: float) -> Curve:
    inside = expit(m) + added
    return -np.log(inside), -expit(m) * expit(-m) / inside


def naive(m: np.ndarray, dtype: str) -> Curve:
    """log of the sigmoid, in the arithmetic of `dtype`: infinite, and without a slope, where the sigmoid underflows."""
    probability = rounded(expit(m), dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(probability), np.where(probability > 0.0, -expit(-m), np.nan)


LINKS: dict[str, Callable[[np.ndarray], Curve]] = {
    "logsigmoid": dpo, "sigmoid": sigmoid, "minus-sigmoid": minus_sigmoid, "logsigmoid-positive": logsigmoid_positive,
    "exp": exponential, "linear": linear, "focal": focal, "tanh": tanh, "abs": absolute, "log2": log2,
}  # fmt: skip


def link(name: str, dtype: str, added: float = 0.0) -> Callable[[np.ndarray], Curve]:
    """The curve of that name, or that of the sigmoid with something added inside the logarithm."""
    if added:
        return lambda m: epsilon(m, added)
    return (lambda m: naive(m, dtype)) if name == "naive" else LINKS[name]


def ipo_with_beta(h: np.ndarray, tau: float, how: str) -> Curve:
    """IPO's square with beta where the paper has none, or without the half.  The slope is with respect to h."""
    if how == "no-half":
        return ipo(h, tau / 2.0)
    if how == "beta-inside":
        value, slope = ipo(tau * h, tau)
        return value, tau * slope
    value, slope = ipo(h, tau)
    return tau**2 * value, tau**2 * slope


def turned(score: Callable[[np.ndarray], Curve], how: str) -> Callable[[np.ndarray], Curve]:
    """A divergence's f'(exp(t)), slope with respect to t, with a sign where the paper has none."""
    if how == "paper":
        return score
    outside, inside = {"negated": (-1.0, 1.0), "inverted": (1.0, -1.0), "mirrored": (-1.0, -1.0)}[how]

    def wrong(t: np.ndarray) -> Curve:
        value, slope = score(inside * t)
        return outside * value, outside * inside * slope

    return wrong


def mixture(smoothing: str, e: float, robust: bool) -> tuple[float, float]:
    """The weights (a, b) of a * loss(m) + b * loss(-m) that somebody takes for label smoothing e."""
    sign, scale = (-1.0, 1.0 / (1.0 - 2.0 * e)) if robust or smoothing == "robust" else (1.0, 1.0)
    return {
        "asked": (scale * (1.0 - e), scale * sign * e),
        "robust": (scale * (1.0 - e), scale * sign * e),
        "ignored": (1.0, 0.0),
        "swapped": (scale * sign * e, scale * (1.0 - e)),
        "minus": (1.0 - e, -e),
        "half": (1.0 - e / 2.0, sign * e / 2.0),
        "unnormalised": (1.0, sign * e),
    }[smoothing]


def centred(m: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Margins minus their batch mean, and the transposed derivative of that map."""
    return m - m.mean(), lambda g: g - g.mean()


def standardised(m: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Margins over their batch standard deviation (with n - 1), and the transposed derivative of that map."""
    n = len(m)
    spread = np.std(m, ddof=1) if n > 1 else np.nan

    def back(g: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return g / spread - (g @ m) * (m - m.mean()) / ((n - 1) * spread**3)

    with np.errstate(invalid="ignore", divide="ignore"):
        return m / spread, back
