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
from reference_impl.order import Part, parts
from reference_impl.processes import Processes
from reference_impl.reference import Reference


def judge(
    policy: Policy, reference: Reference | None, pairs: Sequence[TokenPair], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of pairs (pair,), with their graph where gradients are on, and the metrics of each pair."""
    with policy.precision():
        policy_w, policy_l = pair_logps(policy.model, pairs, pad_id=policy.pad_id, path=policy.path)
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


def judge_part(
    policy: Policy, reference: Reference | None, pairs: Sequence[TokenPair], part: Part, config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`judge` of a part of the pairs; an idle part gives no loss and no value, but the graph of a forward pass."""
    losses, values = judge(policy, reference, [pairs[index] for index in part.indices], config)
    if part.idle:
        return losses[:0], {name: value[:0] for name, value in values.items()}
    return losses, values


def evaluate(
    policy: Policy, reference: Reference | None, pairs: Sequence[TokenPair], config: TrainConfig, crew: Processes
) -> dict[str, float]:
    """Means over all pairs, whatever the size of the batches, and intervals that cover with config.confidence.

    `loss/low`, `loss/high`: Student's t interval of the mean; `rewards/accuracies/low`, `…/high`: Clopper and
    Pearson's exact interval of a proportion.  Both take the pairs for independent.
    """
    generators = randomness.capture()
    sums, losses, right, size = PairSums(), [], [], config.eval_batch or config.batch
    with evaluating(policy.model):
        for part in parts(range(len(pairs)), size, crew.rank, crew.world):
            _, values = judge_part(policy, reference, pairs, part, config)
            sums.add(values)
            losses.append(values["loss"].double().cpu())
            right.append(values["rewards/accuracies"].double().cpu())
    randomness.restore(generators)
    means = sums.means(crew)
    low, high = mean_interval(torch.cat(crew.gather(torch.cat(losses))), config.confidence)
    successes = int(torch.cat(crew.gather(torch.cat(right))).sum())
    below, above = proportion_interval(successes, len(pairs), config.confidence)
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
