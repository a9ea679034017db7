"""Which loss is made of a pair's log-probabilities?  One named function for each objective, with its source.

Each compares a score of the chosen completion with a score of the rejected one.  With s = log π_θ(y|x) − log π_ref(y|x)
(SimPO: log π_θ(y|x) alone), a sum over tokens in nats, or that sum divided by the completion's number of tokens:

    name       score         loss of a pair, with h = s_w − s_l                         source
    dpo        sum           −log σ(β h)                                                Rafailov et al. 2023, Eq. 7
    dpo_norm   mean          −log σ(β h)                                                Lambert et al. 2024 (Tülu 3)
    cdpo       sum           −(1−ε) log σ(β h) − ε log σ(−β h)                          Mitchell 2023
    robust     sum           [−(1−ε) log σ(β h) + ε log σ(−β h)] / (1−2ε)               Chowdhury et al. 2024
    ipo        sum or mean   (h − 1/(2β))², β being the paper's τ                       Azar et al. 2023, Eq. 17
    hinge      sum           max(0, 1 − β h)                                            Liu et al. 2023 (after SLiC)
    simpo      mean          −log σ(β h − γ)                                            Meng et al. 2024, Eq. 6

The reward that is logged is β s, so the margin is β h and the accuracy is that of the objective's own comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu

from reference_impl import dpo


class Settings(Protocol):
    """What is read of a run's config."""

    objective: str
    beta: float
    label_smoothing: float
    gamma: float
    ipo_length: Literal["sum", "mean"]
    sft_weight: float


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs; each tensor is (pair,).

    policy_*, reference_*: sums over the completion's tokens, nats; *_tokens: the completions' numbers of tokens.
    The reference is absent for an objective that has none.
    """

    policy_w: Tensor
    policy_l: Tensor
    reference_w: Tensor | None
    reference_l: Tensor | None
    tokens_w: Tensor
    tokens_l: Tensor


@dataclass(frozen=True)
class Scored:
    """An objective's answer, each (pair,): the losses, and the rewards β s that were compared."""

    losses: Tensor
    reward_w: Tensor
    reward_l: Tensor


def cdpo_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """(1−ε) L(β h) + ε L(−β h): the label is wrong with probability ε.  See Mitchell, 'A note on DPO with noisy
    preferences and relationship to IPO', 2023, Eq. 3.  logit (pair,); 0 ≤ ε ≤ ½; returns (pair,) nats."""
    return (1 - label_smoothing) * dpo.dpo_loss(logit) + label_smoothing * dpo.dpo_loss(-logit)


def robust_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """[(1−ε) L(β h) − ε L(−β h)] / (1−2ε): unbiased under labels flipped with probability ε.  See Chowdhury et al.,
    'Provably Robust DPO', arXiv:2403.00409.  logit (pair,); 0 ≤ ε < ½; returns (pair,) nats, unbounded below.
    """
    kept, flipped = dpo.dpo_loss(logit), dpo.dpo_loss(-logit)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(h: Tensor, tau: float) -> Tensor:
    """(h − 1/(2τ))².  See Azar et al., 'A General Theoretical Paradigm to Understand Learning from Human Preferences',
    arXiv:2310.12036, Eq. 17.  h (pair,) nats *without* β; τ > 0; returns (pair,) nats²."""
    return (h - 1 / (2 * tau)) ** 2


def hinge_loss(logit: Tensor) -> Tensor:
    """max(0, 1 − β h): SLiC's ranking loss (Zhao et al., arXiv:2305.10425) on the log-ratio, with margin 1, as in Liu
    et al., 'Statistical Rejection Sampling', arXiv:2309.06657.  logit (pair,) β h; returns (pair,)."""
    return relu(1 - logit)


def simpo_loss(logit: Tensor, gamma: float) -> Tensor:
    """−log σ(β h − γ), h a difference of mean log-probabilities.  See Meng et al., 'SimPO', arXiv:2405.14734, Eq. 6.
    γ itself is given, not the ratio γ/β that the authors' recipes list.  logit (pair,) β h; returns (pair,) nats."""
    return dpo.dpo_loss(logit - gamma)


def sft_loss(policy_w: Tensor, tokens_w: Tensor) -> Tensor:
    """−log π_θ(y_w|x) / |y_w|: negative log-likelihood of the chosen completion per token.  See Pang et al., 'Iterative
    Reasoning Preference Optimization', arXiv:2404.19733, Eq. 1.  Each pair's own mean, so that a pair's loss is a
    function of the pair alone and any split into micro-batches gives the same sum.  (pair,) in; (pair,) nats out."""
    return -policy_w / tokens_w


@dataclass(frozen=True)
class Objective:
    """A named objective: what it compares, and what it makes of the comparison.

    score: 'sum' or 'mean' of token log-probabilities, or the setting that says which.
    reference: whether the reference enters.
    options: settings of the config that act on it, besides beta and sft_weight.
    loss: (β h, config) → (pair,).
    """

    score: Literal["sum", "mean", "ipo_length"]
    reference: bool
    options: tuple[str, ...]
    loss: Callable[[Tensor, Settings], Tensor]


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective("sum", True, (), lambda logit, c: dpo.dpo_loss(logit)),
    "dpo_norm": Objective("mean", True, (), lambda logit, c: dpo.dpo_loss(logit)),
    "cdpo": Objective("sum", True, ("label_smoothing",), lambda logit, c: cdpo_loss(logit, c.label_smoothing)),
    "robust": Objective("sum", True, ("label_smoothing",), lambda logit, c: robust_loss(logit, c.label_smoothing)),
    "ipo": Objective("ipo_length", True, ("ipo_length",), lambda logit, c: ipo_loss(logit / c.beta, c.beta)),
    "hinge": Objective("sum", True, (), lambda logit, c: hinge_loss(logit)),
    "simpo": Objective("mean", False, ("gamma",), lambda logit, c: simpo_loss(logit, c.gamma)),
}


def score_pairs(logps: PairLogps, config: Settings) -> Scored:
    """Losses and rewards of a batch of pairs under the config's objective, sft_weight included."""
    objective = OBJECTIVES[config.objective]
    length = config.ipo_length if objective.score == "ipo_length" else objective.score
    policy_w, policy_l = logps.policy_w, logps.policy_l
    if objective.reference:
        reference_w, reference_l = logps.reference_w, logps.reference_l
    else:  # the same for every completion, so that it cancels in the comparison
        reference_w, reference_l = torch.zeros_like(policy_w), torch.zeros_like(policy_l)
    if length == "mean":
        policy_w, reference_w = policy_w / logps.tokens_w, reference_w / logps.tokens_w
        policy_l, reference_l = policy_l / logps.tokens_l, reference_l / logps.tokens_l
    reward_w = dpo.implicit_reward(policy_w, reference_w, config.beta)
    reward_l = dpo.implicit_reward(policy_l, reference_l, config.beta)
    losses = objective.loss(dpo.preference_logit(reward_w, reward_l), config)
    if config.sft_weight:
        losses = losses + config.sft_weight * sft_loss(logps.policy_w, logps.tokens_w)
    return Scored(losses, reward_w, reward_l)
