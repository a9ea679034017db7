"""What do four log-probs per pair become under an objective and a theory?

Composes the papers' formulas (`losses.py`) and their known wrong counterparts (`wrong.py`): per-token means, the
reference actually used, coefficients, the objective's curve, further terms, the reduction; and the derivative of the
reduced loss with respect to each of the four arguments, by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpocheck.experiment import DIVERGENCES, Objective
from dpocheck.oracle import losses, wrong
from dpocheck.oracle.theory import PAPER, Theory

LIVE = ("policy-live", "policy-graph")


@dataclass(frozen=True, eq=False)
class Preference:
    """The loss of a batch.  All arrays are float64; arguments are in the order of `LossExperiment.arguments`."""

    per_pair: np.ndarray  # (pair,)
    reduced: float
    slopes: np.ndarray  # (4, pair): d reduced / d argument
    policy: np.ndarray  # (2, pair): log-probs of chosen and rejected as the loss uses them
    reference: np.ndarray  # (2, pair)
    sums: np.ndarray  # (4, pair): the same four before any division by a length, the reference as it is used
    margins: np.ndarray  # (pair,): what the curve is applied to, less offsets
    steepness: np.ndarray  # (2, pair): under a divergence df'(u) / d log u of chosen and rejected, else 1


def beta_of(objective: Objective, theory: Theory) -> float:
    """The beta that the loss uses."""
    return fixed_beta(objective, theory) ** theory.beta_power * theory.beta_scale


def fixed_beta(objective: Objective, theory: Theory) -> float:
    return objective.beta if theory.beta_fixed is None else theory.beta_fixed


def kind_of(objective: Objective, theory: Theory) -> str:
    return theory.kind or objective.kind


def score_of(objective: Objective, theory: Theory) -> Callable[[np.ndarray], losses.Curve] | None:
    """What a divergence puts in the place of a completion's log-ratio; None where that stays as it is."""
    kind = kind_of(objective, theory)
    if kind not in DIVERGENCES:
        return None
    alpha = objective.alpha if theory.alpha_fixed is None else theory.alpha_fixed
    alpha = 1.0 - alpha if theory.alpha == "one-minus" else alpha
    scores = {"forward_kl": losses.forward_kl, "js_divergence": losses.jensen_shannon}
    return wrong.turned(scores.get(kind, lambda t: losses.alpha_divergence(t, alpha)), theory.derivative)


def per_token(objective: Objective, theory: Theory) -> bool:
    """Whether the loss is on log-probs per token rather than summed ones."""
    if theory.normalised != "asked":
        return theory.normalised == "always"
    kind = kind_of(objective, theory)
    return objective.length_normalised or kind == "simpo" or (kind == "ipo" and theory.ipo_length == "mean")


def needs_lengths(objective: Objective, theory: Theory) -> bool:
    sft = (objective.sft_weight and theory.sft == "added") or theory.sft_extra
    return per_token(objective, theory) or bool(sft and theory.sft_mean != "sum") or theory.reduction == "tokens"


def preference(
    arguments: np.ndarray, lengths: np.ndarray, objective: Objective, theory: Theory = PAPER, *,
    dtype: str = "float64", tokens: np.ndarray | None = None,
) -> Preference:  # fmt: skip
    """The loss of a batch of pairs.

    `arguments` (4, pair): log-probs of policy chosen, policy rejected, reference chosen, reference rejected.
    `lengths` (4, pair): what each is divided by where the objective wants log-probs per token.  `tokens` (2, pair):
    completion tokens, for weights by tokens; by default `lengths`.
    """
    tokens = lengths[:2] if tokens is None else tokens
    used = np.concatenate([arguments[:2], _reference(arguments, theory)])
    divisors = lengths if per_token(objective, theory) else np.ones_like(lengths)
    z = used / divisors
    a = np.array(_coefficients(objective, theory))[:, None]
    shares, steepness = a * z, np.ones((2, z.shape[1]))
    if score := score_of(objective, theory):
        scores, steepness = score(np.stack([shares[0] + shares[2], -shares[1] - shares[3]]))
        shares = np.stack([scores[0], -scores[1], *np.zeros((2, z.shape[1]))])
    value, slope_policy, slope_reference, margins, weights = _curve(shares, objective, theory, dtype, tokens)
    if score:
        slope_reference = slope_policy
    slopes = a * np.stack([slope_policy, slope_policy, slope_reference, slope_reference]) / divisors
    slopes = slopes * np.concatenate([steepness, steepness])
    value, slopes = _further_terms(value, slopes, weights, used, lengths, objective, theory)
    reduced = _reduced(value, weights, theory)
    slopes = _gradient_faults(_through_reference(slopes, theory), theory)
    return Preference(value, reduced, slopes, z[:2], z[2:], used, margins, steepness)


def _coefficients(objective: Objective, theory: Theory) -> tuple[float, float, float, float]:
    a = theory.coefficients
    return (a[0], a[1], 0.0, 0.0) if kind_of(objective, theory) == "simpo" else a


def _reference(arguments: np.ndarray, theory: Theory) -> np.ndarray:
    """(2, pair): the reference log-probs that the theory says are used."""
    reference = arguments[2:]
    if theory.reference in LIVE:
        return arguments[:2]
    if theory.reference == "none":
        return np.zeros_like(reference)
    if theory.reference == "swapped":
        return reference[::-1]
    if theory.reference == "rolled":
        return np.roll(reference, -1, axis=1)
    if theory.reference == "batch-mean":
        return np.broadcast_to(reference.mean(axis=1, keepdims=True), reference.shape)
    return reference


def _through_reference(slopes: np.ndarray, theory: Theory) -> np.ndarray:
    """Derivatives with respect to the reference used, as derivatives with respect to the arguments given."""
    policy, reference = slopes[:2], slopes[2:]
    if theory.reference == "policy-graph":
        return np.concatenate([policy + reference, np.zeros_like(reference)])
    if theory.reference in ("none", "policy-live"):
        reference = np.zeros_like(reference)
    elif theory.reference == "swapped":
        reference = reference[::-1]
    elif theory.reference == "rolled":
        reference = np.roll(reference, 1, axis=1)
    elif theory.reference == "batch-mean":
        reference = np.broadcast_to(reference.mean(axis=1, keepdims=True), reference.shape)
    return np.concatenate([policy, reference])


def curve_of(objective: Objective, theory: Theory, dtype: str) -> Callable[[np.ndarray], losses.Curve]:
    """The objective's function of the margin (IPO: of h)."""
    kind = kind_of(objective, theory)
    if kind == "hinge":
        return losses.hinge
    if kind == "ipo":
        tau = beta_of(objective, theory)
        return lambda h: losses.ipo(h, tau) if theory.ipo == "paper" else wrong.ipo_with_beta(h, tau, theory.ipo)
    smoothing = objective.label_smoothing or theory.smoothing_default
    robust = kind == "robust"
    if theory.link == "logsigmoid" and theory.smoothing == "asked" and not theory.epsilon:
        return lambda m: losses.rdpo(m, smoothing) if robust else losses.cdpo(m, smoothing)
    base = wrong.link(theory.link, dtype, theory.epsilon)
    forward, backward = wrong.mixture(theory.smoothing, smoothing, robust)

    def mixed(m: np.ndarray) -> losses.Curve:
        value, slope = base(m)
        if backward == 0.0:
            return forward * value, forward * slope
        opposite, opposite_slope = base(-m)
        return forward * value + backward * opposite, forward * slope - backward * opposite_slope

    return mixed


def _logit(
    shares: np.ndarray, objective: Objective, theory: Theory
) -> tuple[np.ndarray, np.ndarray, float, float, float]:
    """Policy's and reference's share of the logit, the factor on each, and the constant added."""
    kind, beta = kind_of(objective, theory), beta_of(objective, theory)
    policy, reference = shares[0] + shares[1], shares[2] + shares[3]
    on_policy = 1.0 if kind == "ipo" or theory.beta_on == "outside" else beta
    on_reference = 1.0 if theory.beta_on == "policy" else on_policy
    constant = theory.offset
    if kind == "simpo" and theory.gamma != "ignored":
        constant -= objective.gamma * (beta if theory.gamma == "gamma-beta" else 1.0)
    return policy, reference, on_policy, on_reference, constant


def _curve(
    shares: np.ndarray, objective: Objective, theory: Theory, dtype: str, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Losses, the slope of the reduced loss in policy's and in reference's share, margins, reduction weights.

    `shares` (4, pair): the signed terms of the logit, without beta.
    """
    policy, reference, on_policy, on_reference, constant = _logit(shares, objective, theory)
    function = curve_of(objective, theory, dtype)
    beta = beta_of(objective, theory)
    factor = theory.scale * {"outside": beta, "both": beta, "divided": 1.0 / beta}.get(theory.beta_on, 1.0)
    if theory.margins == "broadcast":
        crossed = on_policy * policy[:, None] + on_reference * reference[None, :]
        value, slope = _evaluated(function, crossed, constant, theory)
        losses_ = factor * value.mean(axis=1)
        weights = pair_weights(losses_, tokens, theory)
        both = factor * weights[:, None] * slope / len(policy)
        return losses_, both.sum(axis=1) * on_policy, both.sum(axis=0) * on_reference, crossed.diagonal(), weights
    own = on_policy * policy + on_reference * reference
    margins, back = own, None
    if theory.margins != "own":
        margins, back = {"centred": wrong.centred, "standardised": wrong.standardised}[theory.margins](own)
    value, slope = _evaluated(function, margins, constant, theory)
    losses_ = factor * value
    weights = pair_weights(losses_, tokens, theory)
    share = factor * weights * slope
    share = share if back is None else back(share)
    return losses_, share * on_policy, share * on_reference, own, weights


def _evaluated(function: Callable, margins: np.ndarray, constant: float, theory: Theory) -> losses.Curve:
    m = margins + constant
    inside = np.ones_like(m)
    if theory.clamp is not None:
        inside = (np.abs(m) <= theory.clamp).astype(float)
        m = np.clip(m, -theory.clamp, theory.clamp)
    value, slope = function(m)
    if theory.weight == "half":
        slope = np.broadcast_to(function(np.zeros(1))[1], m.shape)
    return value, slope * inside


def pair_weights(value: np.ndarray, tokens: np.ndarray, theory: Theory) -> np.ndarray:
    """(pair,): how much each pair's loss weighs in the scalar that is differentiated.  The paper: 1/B each."""
    n = len(value)
    if theory.reduction in ("mean", "none"):
        return np.full(n, 1.0 / n)
    if theory.reduction == "tokens":
        count = tokens[0] + tokens[1]
        return count / count.sum()
    constant = {"sum": 1.0, "rows": 0.5 / n, "plus-one": 1.0 / (n + 1)}
    if theory.reduction in constant:
        return np.full(n, constant[theory.reduction])
    weights, rank = np.zeros(n), np.argsort(value, kind="stable")
    if theory.reduction == "first":
        weights[0] = 1.0
    elif theory.reduction == "no-last":
        weights[: n - 1] = 1.0 / max(n - 1, 1)
    elif theory.reduction == "max":
        weights[rank[-1]] = 1.0
    elif theory.reduction == "median":
        weights[rank[(n - 1) // 2]] = 1.0  # the lower one, as tensor libraries do
    else:
        weights = (value != 0.0) / max(np.count_nonzero(value), 1)
    return weights


def _further_terms(
    value: np.ndarray, slopes: np.ndarray, weights: np.ndarray, used: np.ndarray, lengths: np.ndarray,
    objective: Objective, theory: Theory,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The SFT term that was asked for, and undeclared ones."""
    asked = objective.sft_weight
    if asked and theory.sft == "replaces":
        value, slopes, asked = asked * value, asked * slopes, 1.0
    elif theory.sft == "ignored":
        asked = 0.0
    chosen, n = used[0], len(value)
    divisor = {"pair": lengths[0], "tokens": np.full(n, lengths[0].sum() / n), "sum": np.ones(n)}[theory.sft_mean]
    for multiple, length in ((asked, divisor), (theory.sft_extra, lengths[0])):
        if multiple:
            value = value + multiple * losses.negative_log_likelihood(chosen, length)
            slopes = slopes.copy()
            slopes[0] -= multiple * weights / length
    if theory.kl_extra:
        value = value + theory.kl_extra * (chosen - used[2])
        slopes = slopes.copy()
        slopes[0] += theory.kl_extra * weights
        slopes[2] -= theory.kl_extra * weights
    return value, slopes


def _reduced(value: np.ndarray, weights: np.ndarray, theory: Theory) -> float:
    """The scalar.  A pair without weight takes no part, even where its loss is infinite."""
    if theory.reduction in ("mean", "none"):
        return float(value.mean())
    return float(value[weights != 0.0] @ weights[weights != 0.0])


def _gradient_faults(slopes: np.ndarray, theory: Theory) -> np.ndarray:
    slopes = slopes * theory.gradient_scale
    if theory.detached != "none":
        slopes[0 if theory.detached == "chosen" else 1] = 0.0
    return slopes


def rewards(loss: Preference, objective: Objective, theory: Theory) -> tuple[np.ndarray, np.ndarray]:
    """Implicit rewards of chosen and rejected, (pair,) each, as the theory logs them.

    Under a divergence beta (f'(u) - f'(1)), by Wang et al. 2023 up to the prompt's constant: 0 where the policy is the
    reference, as beta log u is.
    """
    beta = fixed_beta(objective, theory)
    scale = {"beta": beta, "one": 1.0, "squared": beta**2}[theory.reward_scale]
    policy, reference = loss.policy, loss.reference
    if theory.reward_logps == "sum":
        policy, reference = loss.sums[:2], loss.sums[2:]
    if kind_of(objective, theory) == "simpo" or theory.rewards == "policy-only":
        reference = np.zeros_like(reference)
    reference = -reference if theory.rewards == "sum" else reference
    found = losses.implicit_reward(policy, reference, scale)
    if (score := score_of(objective, theory)) and theory.reward_logps == "loss":
        found = scale * (score(policy - reference)[0] - score(np.zeros(1))[0])
    if theory.rewards == "swapped":
        found = found[::-1]
    if theory.rewards == "clipped":
        found = np.clip(found, -5.0, 5.0)
    return found[0], found[1]
