"""How far from the exact value may a correct loss of four log-probs be, in floating-point arithmetic?

Every bound holds for any order of the operations and any stable way to write the loss.  `u` is the unit roundoff of
the arithmetic: each operation is exact up to a relative error of u (the standard model: Higham, Accuracy and Stability
of Numerical Algorithms, 2nd ed., section 2.2), and n of them up to gamma(n) = n u / (1 - n u) (Lemma 3.1).
Arguments are taken as exact: they are rounded to the subject's type first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from dpocheck.experiment import Objective
from dpocheck.oracle.losses import softplus
from dpocheck.oracle.objective import Preference, beta_of, kind_of, pair_weights, per_token, score_of
from dpocheck.oracle.theory import Theory

# Some softplus implementations return their argument above 20: log(1 + e^20) - 20 = log1p(e^-20) = 2.07e-9 is then
# missing, and the slope is 1 instead of sigma(20), by as much.
THRESHOLD, MISSING = 20.0, float(np.log1p(np.exp(-20.0)))


def gamma(n: float | np.ndarray, u: float) -> float | np.ndarray:
    """n u / (1 - n u): the relative error of n roundings; infinite where n u reaches 1."""
    return np.where(n * u < 1.0, n * u / np.maximum(1.0 - n * u, u), np.inf)[()]


def softplus_error(m: np.ndarray, e: np.ndarray, u: float, tiny: float, size: np.ndarray) -> np.ndarray:
    """Of -log sigma(m), where m carries an error of at most e and is a difference of terms of at most `size`.

    The slope on [m - e, m + e] is at most min(1, sigma(-m) exp(e)).  The evaluation is max(-m, 0) + log1p(exp(-|m|))
    or an equal: exp, log1p, the maximum and the sum, one relative error each, on terms that are all positive.

    The softmax cross-entropy of two rewards whose difference is m is the same loss, by the shifted log-sum-exp, which
    is accurate in the sense of Blanchard, Higham and Higham (2021, Accurately computing the log-sum-exp and softmax
    functions, IMA J. Numer. Anal. 41).  s = 1 + exp(-|m|) is rounded, and a relative error u of s is an absolute one
    of log s.  greatest + log s is rounded at no more than size + log 2, before a reward is taken from it.  Both are
    absolute: u (size + log 2 + 1), however small the loss is.
    """
    moved = np.minimum(1.0, expit(-m) * np.exp(np.minimum(e, 700.0))) * e
    summed = u * (size + 2.0)
    return moved + 4.0 * u * (softplus(-m) + moved) + summed + tiny + np.where(m < -THRESHOLD, MISSING, 0.0)


def sigmoid_error(m: np.ndarray, e: np.ndarray, u: float, tiny: float) -> np.ndarray:
    """Of sigma(-m), where m carries an error of at most e.

    |d log sigma(-m)| <= 1, so sigma changes by a factor within exp(+-e), and by 1 at most.  Six roundings: exponential,
    sum, quotient, and the products of the chain rule with its sign and weight.  The form sigma(m) - 1, which a binary
    cross-entropy has, rounds at the size of sigma(m): exponential, sum, quotient.  The form exp(-m - log(1 + exp(-m)))
    rounds its exponent, by u |m| at most: less than e, which holds five roundings of m's own terms.
    """
    moved = np.minimum(1.0, expit(-m) * np.expm1(np.minimum(e, 700.0)))
    return moved + 6.0 * u * expit(-m) + 3.0 * u * expit(m) + tiny + np.where(m < -THRESHOLD, MISSING, 0.0)


def score_error(
    kind: str, alpha: float, t: np.ndarray, e: np.ndarray, reach: np.ndarray, u: float, tiny: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a divergence's f'(exp(t)), of its slope in t, and the greatest term of f', where t carries an error e.

    `reach`: |log pi| + |log ref|, the numbers whose difference t is.  f' of the Jensen-Shannon divergence has a slope
    of sigma(-t): as `softplus_error`; log 2 and one more sum; written as log(2u/(1+u)), a relative error of 4 u inside
    the logarithm; written as t - softplus(t) + log 2, roundings at the size of t.  The others are powers u^-a, with
    a = 1 for the forward KL: an error e of t is a factor exp(a e) of the power, and a t rounds twice.  The power itself
    takes four roundings at most (a quotient of two exponentials; its own product), and rounds twice more beside a 1.
    Automatic differentiation forms the slope of expm1 as its value plus 1: roundings at the size of 1, however small
    the power is.
    """
    if kind == "js_divergence":
        value = softplus_error(t, e, u, tiny, reach) + u * (2.0 * softplus(-t) + 8.0)
        return value, sigmoid_error(t, e, u, tiny), np.log(2.0) + softplus(-t) + np.abs(t)
    a = alpha if kind == "alpha_divergence" else 1.0
    with np.errstate(over="ignore"):
        power, off = np.exp(-a * t), np.expm1(np.minimum(a * e + 2.0 * u * a * np.abs(t), 700.0)) + 4.0 * u
        size = (1.0 + power) / a
        return (power * off + tiny) / a + 4.0 * u * size, power * (off + 2.0 * u) + 2.0 * u * (1.0 + power), size


@dataclass(frozen=True, eq=False)
class LossError:
    """Bounds on a batch's loss; shapes as in `Preference`."""

    per_pair: np.ndarray
    reduced: float
    slopes: np.ndarray
    rewards: np.ndarray  # (2, pair)
    margins: np.ndarray


@dataclass(frozen=True, eq=False)
class MarginError:
    """Under a divergence `scores` and `steepness` are of f'(u) and of its slope, (2, pair); otherwise zero."""

    margin: np.ndarray
    size: np.ndarray  # (pair,): what no term of the margin exceeds
    scores: np.ndarray
    steepness: np.ndarray


def margin_error(
    loss: Preference, arguments: np.ndarray, objective: Objective, theory: Theory, lengths: np.ndarray, u: float,
    tiny: float,
) -> MarginError:  # fmt: skip
    """Of the margin, where the four log-probs carry errors of at most `arguments` (4, pair).

    At most four roundings in any order (two differences, the difference of them, the product with beta) on quantities
    no greater than beta * S, S the sum of the absolute log-probs; one more as beta itself is rounded, one more for a
    division by a length.  IPO's h has no beta.  SimPO's gamma is rounded, and its difference.  Under a divergence the
    two log-ratios round first, then f' of each, then the difference and the product with beta.
    """
    divided, kind = per_token(objective, theory), kind_of(objective, theory)
    z = np.concatenate([loss.policy, loss.reference])
    beta = 1.0 if kind == "ipo" else abs(beta_of(objective, theory))
    arguments = arguments / lengths if divided else arguments
    carried, sizes, none = arguments.sum(axis=0), np.abs(z).sum(axis=0), np.zeros_like(loss.policy)
    if score_of(objective, theory):
        reach, moved = np.abs(z[:2]) + np.abs(z[2:]), arguments[:2] + arguments[2:]
        e = moved + gamma(3 if divided else 2, u) * (reach + moved)
        scores, steepness, terms = score_error(kind, objective.alpha, z[:2] - z[2:], e, reach, u, tiny)
        error = beta * (scores.sum(axis=0) + gamma(4, u) * (terms + scores).sum(axis=0))
        return MarginError(error, beta * terms.sum(axis=0), scores, steepness)
    error = beta * (carried + gamma(6 if divided else 5, u) * (sizes + carried))
    if kind == "simpo":
        error = error + u * (np.abs(loss.margins) + 2.0 * abs(objective.gamma))
    return MarginError(error, beta * sizes, none, none)


def curve_error(
    objective: Objective, theory: Theory, margins: np.ndarray, e: np.ndarray, u: float, tiny: float, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(pair,) each: of the loss and of its slope in the margin (IPO: in h), where the margin carries an error e.

    `size` (pair,): beta times the sum of the pair's absolute log-probs, which no term of the margin exceeds.
    """
    kind = kind_of(objective, theory)
    if kind == "hinge":
        # One subtraction and the maximum.  The slope is 1 or 0; on which side of the kink is open within the error.
        value = e + u * (1.0 + np.abs(margins)) + u * np.maximum(1.0 - margins, 0.0) + tiny
        near = np.abs(1.0 - margins) <= e + u * (1.0 + np.abs(margins))
        return value, np.where(near, 1.0, 3.0 * u * (margins < 1.0))
    if kind == "ipo":
        # d = h - 1/(2 tau): tau and the quotient are rounded, then the difference; then the square.
        target = 1.0 / (2.0 * abs(beta_of(objective, theory)))
        d = np.abs(margins - target)
        error = e + 2.0 * u * target + u * (d + e)
        return 2.0 * d * error + error**2 + u * (d + error) ** 2 + tiny, 2.0 * error + 3.0 * u * 2.0 * (d + error)
    shift = objective.gamma if kind == "simpo" else 0.0
    m, size = margins - shift, size + abs(shift)
    smoothing = objective.label_smoothing or theory.smoothing_default
    if not smoothing or theory.smoothing == "ignored":
        return softplus_error(m, e, u, tiny, size), sigmoid_error(m, e, u, tiny)
    # a loss(m) + b loss(-m), or the equal loss(m) + b m: the weight and its product, and the sum, of terms at most
    # `terms`; rDPO's quotient by 1 - 2e and the rounding of that.
    scale = 1.0 / (1.0 - 2.0 * smoothing) if kind == "robust" or theory.smoothing == "robust" else 1.0
    a, b, n = scale * (1.0 - smoothing), scale * smoothing, 3.0 if scale == 1.0 else 5.0
    terms = a * softplus(-m) + b * softplus(m) + b * np.abs(m)
    both = (a + b) * softplus_error(m, e, u, tiny, size) + b * softplus_error(-m, e, u, tiny, size)
    value = both + b * e + n * u * terms
    slope = (a + b) * sigmoid_error(m, e, u, tiny) + b * sigmoid_error(-m, e, u, tiny)
    return value, slope + n * u * (a * expit(-m) + b * expit(m) + b)


def preference_error(
    loss: Preference, objective: Objective, theory: Theory, lengths: np.ndarray, u: float, tiny: float,
    arguments: np.ndarray | None = None, tokens: np.ndarray | None = None,
) -> LossError:  # fmt: skip
    """Bounds on what `objective.preference` predicts.  `arguments` (4, pair): errors that the log-probs carry."""
    carried = np.zeros_like(loss.sums) if arguments is None else arguments
    pairs = len(loss.per_pair)
    off = margin_error(loss, carried, objective, theory, lengths, u, tiny)
    e, beta = off.margin, 1.0 if kind_of(objective, theory) == "ipo" else abs(beta_of(objective, theory))
    value, slope = curve_error(objective, theory, loss.margins, e, u, tiny, off.size)
    sft = objective.sft_weight * (theory.sft == "added") + theory.sft_extra
    if sft:
        # The quotient by the length, the product with the weight, the sum with the preference term.
        term = abs(sft) * np.abs(loss.sums[0]) / lengths[0]
        value = value + abs(sft) * carried[0] / lengths[0] + 3.0 * u * term + u * np.abs(loss.per_pair)
    weights = pair_weights(loss.per_pair, lengths[:2] if tokens is None else tokens, theory)
    # A sum of B terms and the product with 1/B, in any order.
    reduced = float(weights @ value + gamma(pairs + 1, u) * (weights @ np.abs(loss.per_pair)))
    divisors = lengths if per_token(objective, theory) else np.ones_like(lengths)
    # Beyond the curve's slope: products with beta, with the pair's weight, with 1/length, the sum with the SFT term.
    # Under a divergence with its slope as well: |dL/dm| <= sigma(-m) where no label smoothing is added.
    if score_of(objective, theory):
        inner = expit(-loss.margins) if not objective.label_smoothing else np.ones_like(loss.margins)
        slope = slope * loss.steepness + (inner + slope) * off.steepness + gamma(2, u) * inner * loss.steepness
        slope = np.concatenate([slope, slope])
    slopes = beta * weights * slope / divisors + gamma(4, u) * np.abs(loss.slopes) + tiny
    rewards = _reward_error(loss, carried, objective, theory, lengths, u)
    if score_of(objective, theory) and theory.reward_logps == "loss":
        scale = 1.0 if theory.reward_scale == "one" else abs(objective.beta)
        rewards = scale * off.scores + gamma(4, u) * (off.size + scale)
    return LossError(value, reduced, slopes, rewards, e)


def _reward_error(
    loss: Preference, carried: np.ndarray, objective: Objective, theory: Theory, lengths: np.ndarray, u: float
) -> np.ndarray:
    """(2, pair): of beta * (policy - reference): the difference, beta rounded, the product; divisions by lengths."""
    scale = 1.0 if theory.reward_scale == "one" else abs(objective.beta)
    divided = per_token(objective, theory) and theory.reward_logps == "loss"
    carried = carried / lengths if divided else carried
    sizes = np.abs(loss.policy) + np.abs(loss.reference) if divided else np.abs(loss.sums[:2]) + np.abs(loss.sums[2:])
    errors = carried[:2] + carried[2:]
    return scale * (errors + gamma(4 if divided else 3, u) * (sizes + errors))
