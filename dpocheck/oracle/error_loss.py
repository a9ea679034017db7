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
from dpocheck.oracle.objective import Preference, beta_of, kind_of, pair_weights, per_token
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


@dataclass(frozen=True, eq=False)
class LossError:
    """Bounds on a batch's loss; shapes as in `Preference`."""

    per_pair: np.ndarray
    reduced: float
    slopes: np.ndarray
    rewards: np.ndarray  # (2, pair)
    margins: np.ndarray


def margin_error(
    loss: Preference, arguments: np.ndarray, objective: Objective, theory: Theory, lengths: np.ndarray, u: float
) -> np.ndarray:
    """(pair,): of the margin, where the four log-probs carry errors of at most `arguments` (4, pair).

    At most four roundings in any order (two differences, the difference of them, the product with beta) on quantities
    no greater than beta * S, S the sum of the absolute log-probs; one more as beta itself is rounded, one more for a
    division by a length.  IPO's h has no beta.  SimPO's gamma is rounded, and its difference.
    """
    divided = per_token(objective, theory)
    z = np.concatenate([loss.policy, loss.reference])
    beta = 1.0 if kind_of(objective, theory) == "ipo" else abs(beta_of(objective, theory))
    carried = (arguments / lengths if divided else arguments).sum(axis=0)
    error = beta * (carried + gamma(6 if divided else 5, u) * (np.abs(z).sum(axis=0) + carried))
    if kind_of(objective, theory) == "simpo":
        error = error + u * (np.abs(loss.margins) + 2.0 * abs(objective.gamma))
    return error


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
    e = margin_error(loss, carried, objective, theory, lengths, u)
    beta = 1.0 if kind_of(objective, theory) == "ipo" else abs(beta_of(objective, theory))
    size = beta * np.abs(np.concatenate([loss.policy, loss.reference])).sum(axis=0)
    value, slope = curve_error(objective, theory, loss.margins, e, u, tiny, size)
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
    slopes = beta * weights * slope / divisors + gamma(4, u) * np.abs(loss.slopes) + tiny
    return LossError(value, reduced, slopes, _reward_error(loss, carried, objective, theory, lengths, u), e)


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
