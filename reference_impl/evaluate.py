"""How good is the policy on pairs: while training, and on held-out sets with confidence intervals?

Evaluation leaves no trace in training: modes and generators are put back, and no gradient is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reference_impl import dpo, randomness
from reference_impl.config import TrainConfig
from reference_impl.data import TokenPair
from reference_impl.logps import pair_logps
from reference_impl.metrics import PairSums
from reference_impl.models import Policy, evaluating
from reference_impl.objectives import OBJECTIVES, PairLogps, score_pairs
from reference_impl.reference import Reference


def judge(
    policy: Policy, reference: Reference | None, pairs: Sequence[TokenPair], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of pairs (pair,), with their graph where gradients are on, and the metrics of each pair."""
    with policy.precision():
        policy_w, policy_l = pair_logps(policy.model, pairs, pad_id=policy.pad_id, path=config.logps)
    named = {"policy_w": policy_w, "policy_l": policy_l}
    reference_w = reference_l = None
    if OBJECTIVES[config.objective].reference:
        reference_w, reference_l = reference(pairs)
        reference_w, reference_l = reference_w.to(policy_w), reference_l.to(policy_l)
        named |= {"reference_w": reference_w, "reference_l": reference_l}
    tokens_w = policy_w.new_tensor([len(pair.chosen) for pair in pairs])
    tokens_l = policy_l.new_tensor([len(pair.rejected) for pair in pairs])
    scored = score_pairs(PairLogps(policy_w, policy_l, reference_w, reference_l, tokens_w, tokens_l), config)
    return scored.losses, dpo.metrics(named, scored.reward_w, scored.reward_l, scored.losses)


def evaluate(
    policy: Policy, reference: Reference | None, pairs: Sequence[TokenPair], config: TrainConfig
) -> dict[str, float]:
    """Means over all pairs, whatever the size of the batches, and intervals that cover with config.confidence.

    `loss/low`, `loss/high`: Student's t interval of the mean; `rewards/accuracies/low`, `…/high`: Clopper and
    Pearson's exact interval of a proportion.  Both take the pairs for independent.
    """
    generators = randomness.capture()
    sums, losses, right = PairSums(), [], 0
    size = config.eval_batch or config.batch
    with evaluating(policy.model):
        for start in range(0, len(pairs), size):
            _, values = judge(policy, reference, pairs[start : start + size], config)
            sums.add(values)
            losses.append(values["loss"].double().cpu())
            right += int(values["rewards/accuracies"].sum().item())
    randomness.restore(generators)
    means = sums.means()
    low, high = mean_interval(torch.cat(losses), config.confidence)
    below, above = proportion_interval(right, len(pairs), config.confidence)
    return {
        **means,
        "loss/low": low,
        "loss/high": high,
        "rewards/accuracies/low": below,
        "rewards/accuracies/high": above,
        "pairs": float(len(pairs)),
    }


def mean_interval(values: Tensor, confidence: float) -> tuple[float, float]:
    """Student's t interval of a mean; values (pair,) float64.  One value says nothing: (−∞, ∞)."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * values.std().item() / math.sqrt(count)
    return values.mean().item() - half, values.mean().item() + half


def proportion_interval(successes: int, count: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's exact two-sided interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)
