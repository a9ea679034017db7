"""What does DPO compute?  READ FIRST: Direct Preference Optimization (arXiv:2305.18290), in the paper's order.

    a prompt x, a chosen completion y_w, a rejected completion y_l       (y_w is preferred to y_l)
    log π(y|x)              token_logps, sequence_logp    the model's log-probability of a completion
    r̂(x, y)        Eq. 5    implicit_reward               β log π_θ(y|x) / π_ref(y|x)
    p(y_w ≻ y_l)   Eq. 6    preference_logit              the logit of this probability is r̂(x, y_w) − r̂(x, y_l)
    L_DPO          Eq. 7    dpo_loss, mean_over_pairs     −log σ of that logit, averaged over the pairs

Differences from the paper: the term β log Z(x) of Eq. 5 is left out, since Eq. 6 subtracts it from itself; Eq. 7's
expectation is a mean over the pairs of one optimizer step, however they are split into micro-batches.

Log-probabilities are natural logarithms, in nats.  `_w` is chosen, `_l` is rejected.  Shapes: `pair` is the number of
preferences, `row` of token rows, `token` of positions, `vocabulary` of tokens.  Nothing here knows models or data.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log π(y_t | x, y_<t): the log-probability of each token under the logits that predict it.

    The paper leaves the factorisation implicit: log π(y|x) = Σ_t log π(y_t | x, y_<t).

    Args:
        logits: (..., token, vocabulary), already shifted: logits[..., t, :] comes from the position *before* token t.
        token_ids: (..., token) integers, the tokens predicted.
    Returns:
        (..., token) nats, each at most 0; float32 at least, so that bfloat16 logits lose nothing more here.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen_logit = wide.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen_logit - wide.logsumexp(-1)


def sequence_logp(logps: Tensor, is_completion: Tensor) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over the completion's tokens, the end-of-sequence token included.

    A sum, not a mean: with a mean, β would be divided by each completion's own length, and the optimum of section 4
    would be that of another objective.  Positions outside the completion are selected away, not multiplied by zero,
    so that a value that is not finite in a prompt or in padding cannot reach the sum.

    Args:
        logps: (row, token) nats.
        is_completion: (row, token) booleans, true where the token belongs to the completion.
    Returns:
        (row,) nats.
    """
    return torch.where(is_completion, logps, torch.zeros_like(logps)).sum(-1)


def implicit_reward(policy_logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """r̂(x, y) = β (log π_θ(y|x) − log π_ref(y|x)): Eq. 5 without β log Z(x), as in section 4.

    Args:
        policy_logp, reference_logp: (pair,) nats.
        beta: strength of the constraint to the reference, positive.
    Returns:
        (pair,) reward, in units in which Eq. 6 is the Bradley-Terry model.
    """
    return beta * (policy_logp - reference_logp)


def preference_logit(reward_w: Tensor, reward_l: Tensor) -> Tensor:
    """r̂(x, y_w) − r̂(x, y_l) = β h, the margin: Eq. 6 says p(y_w ≻ y_l | x) = σ(β h).

    Args:
        reward_w, reward_l: (pair,) implicit rewards of the chosen and the rejected completion.
    Returns:
        (pair,) the logit of the probability that y_w is preferred.
    """
    return reward_w - reward_l


def dpo_loss(logit: Tensor) -> Tensor:
    """−log σ(β h) for each pair: the term inside Eq. 7.

    logsigmoid is min(0, z) − log(1 + exp(−|z|)): finite and right to the last digits at |β h| = 10⁴ and beyond, where
    log(sigmoid(z)) is −inf.  Its derivative is the weight σ(−β h) of the gradient in section 4, 'What does the DPO
    update do?': ∇L = −β σ(−β h) (∇ log π_θ(y_w|x) − ∇ log π_θ(y_l|x)).

    Args:
        logit: (pair,) β h.
    Returns:
        (pair,) nats, each at least 0; log 2 where policy and reference are equal.
    """
    return -logsigmoid(logit)


def mean_over_pairs(losses: Tensor, pairs_in_step: int) -> Tensor:
    """The share of these pairs in Eq. 7's expectation: Σ losses / N.

    N counts all pairs of the optimizer step, over all its micro-batches and processes.  For micro-batches M_1 … M_k of
    any sizes, Σ_j Σ_{i in M_j} loss_i / N = (1/N) Σ_i loss_i: the gradients that backward adds up are those of one big
    batch.  (The mean of the micro-batches' means is not, unless all are of one size.)

    Args:
        losses: (pair,) of one micro-batch.
        pairs_in_step: N, at least the number of losses.
    Returns:
        a scalar.
    """
    return losses.sum() / pairs_in_step


def metrics(logps: dict[str, Tensor], reward_w: Tensor, reward_l: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """What to watch (section 4), each pair by itself, from the numbers that the loss was made of.

    A rising margin says little alone: log π_θ(y_w|x) may fall at the same time, so both log-probabilities are shown.
    A tie is not counted as accurate: policy equal to reference has accuracy 0.  `kl/k1` is the mean over both
    completions of log π_θ(y|x) − log π_ref(y|x): the k1 estimator of KL(π_θ ‖ π_ref), but on the data set's
    completions instead of the policy's own, so it may be negative.  It is a proxy for how far the policy has moved.

    Args:
        logps: (pair,) nats each: `policy_w`, `policy_l`, and, where the objective has a reference, `reference_w`,
            `reference_l`; sums over tokens whatever the objective divides by.
        reward_w, reward_l: (pair,) rewards that the loss compares.
        losses: (pair,).
    Returns:
        name → (pair,) values; TRL's names where TRL has one.
    """
    values = {
        "loss": losses,
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": preference_logit(reward_w, reward_l),
        "rewards/accuracies": (reward_w > reward_l).to(losses.dtype),
        "logps/chosen": logps["policy_w"],
        "logps/rejected": logps["policy_l"],
    }
    if "reference_w" in logps:
        shift_w = logps["policy_w"] - logps["reference_w"]
        shift_l = logps["policy_l"] - logps["reference_l"]
        values["kl/k1"] = (shift_w + shift_l) / 2
    return values
