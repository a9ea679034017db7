"""What are the losses, and what are their derivatives?

One plain function per objective, straight from its paper: arrays in, (value, slope) out, both elementwise and
float64.  The slope is the derivative with respect to the function's first argument.  Notation: `h` is the log-ratio
margin (log pi_theta - log pi_ref)(chosen) - (the same of rejected), the margin is m = beta * h.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

Curve = tuple[np.ndarray, np.ndarray]  # value, slope


def softplus(t: np.ndarray) -> np.ndarray:
    """log(1 + exp(t)), without overflow and with full relative precision on both sides."""
    return np.maximum(t, 0.0) + np.log1p(np.exp(-np.abs(t)))


def dpo(m: np.ndarray) -> Curve:
    """-log sigma(m).  Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; slope -sigma(-m), section 4."""
    return softplus(-m), -expit(-m)


def cdpo(m: np.ndarray, smoothing: float) -> Curve:
    """-(1-e) log sigma(m) - e log sigma(-m).  Mitchell 2023 (a note on DPO with noisy preferences), Eq. 3."""
    value = (1.0 - smoothing) * softplus(-m) + smoothing * softplus(m)
    return value, smoothing * expit(m) - (1.0 - smoothing) * expit(-m)


def rdpo(m: np.ndarray, smoothing: float) -> Curve:
    """The unbiased estimate under label noise e < 1/2.  Chowdhury et al. 2024 (arXiv:2403.00409)."""
    value = ((1.0 - smoothing) * softplus(-m) - smoothing * softplus(m)) / (1.0 - 2.0 * smoothing)
    slope = (-(1.0 - smoothing) * expit(-m) - smoothing * expit(m)) / (1.0 - 2.0 * smoothing)
    return value, slope


def hinge(m: np.ndarray) -> Curve:
    """max(0, 1 - m).  Liu et al. 2023 (RSO, arXiv:2309.06657), after SLiC-HF (arXiv:2305.10425); slope 0 at m = 1."""
    return np.maximum(0.0, 1.0 - m), np.where(m < 1.0, -1.0, 0.0)


def ipo(h: np.ndarray, tau: float) -> Curve:
    """(h - 1/(2 tau))^2.  Azar et al. 2023 (arXiv:2310.12036), Eq. 17.  The slope is with respect to h."""
    distance = h - 1.0 / (2.0 * tau)
    return distance**2, 2.0 * distance


def simpo_margin(chosen: np.ndarray, rejected: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    """beta * (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma, of log-probs *per token*; the loss is `dpo` of it.

    Meng et al. 2024 (arXiv:2405.14734), Eq. 6.
    """
    return beta * (chosen - rejected) - gamma


def forward_kl(t: np.ndarray) -> Curve:
    """f'(u) = -1/u at u = exp(t), of f(u) = -log u.  Wang et al. 2023 (arXiv:2309.16240); slope with respect to t.

    Here and below the loss is -log sigma(beta f'(u_w) - beta f'(u_l)), u = pi_theta/pi_ref of a completion; a constant
    in f' cancels.  With f(u) = u log u, f'(u) = log u + 1 of the reverse KL, it is DPO.
    """
    with np.errstate(over="ignore"):
        inverse = np.exp(-t)
    return -inverse, inverse


def jensen_shannon(t: np.ndarray) -> Curve:
    """f'(u) = log(2u/(1+u)) at u = exp(t), of f(u) = u log u - (u+1) log((u+1)/2).  As above."""
    return np.log(2.0) - softplus(-t), expit(-t)


def alpha_divergence(t: np.ndarray, alpha: float) -> Curve:
    """f'(u) = (1 - u^-alpha)/alpha at u = exp(t), of f(u) = (u^(1-alpha) - (1-alpha) u - alpha) / (alpha (alpha-1)).

    As above.  Towards alpha = 0 it is the reverse KL, at alpha = 1 the forward KL.
    """
    with np.errstate(over="ignore"):
        return -np.expm1(-alpha * t) / alpha, np.exp(-alpha * t)


def log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected) -> np.ndarray:
    """h: what remains of the reward difference when log Z(x) has cancelled.  Rafailov et al. 2023, Eq. 6 and 7."""
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)


def implicit_reward(policy: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    """beta * log(pi_theta / pi_ref), the reward up to beta log Z(x).  Rafailov et al. 2023, Eq. 5."""
    return beta * (policy - reference)


def negative_log_likelihood(chosen: np.ndarray, length: np.ndarray) -> np.ndarray:
    """-log pi(y_w) / |y_w|, the term that RPO adds.  Pang et al. 2024 (arXiv:2404.19733), Eq. 1."""
    return -chosen / length
