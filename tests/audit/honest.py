"""How else may DPO be written?  Losses, log-probs and steps that are right, in the styles that people use."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dpocheck.adapter import StepOut, Unsupported

# ------------------------------------------------------------------------------------------------------------- losses


def by_softplus(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    z = beta * (policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps)
    return F.softplus(-z).mean()


def summed(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    ratios = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (ratios[0] - ratios[1])).sum()


def as_logaddexp(pi_w, pi_l, ref_w, ref_l, beta):
    """-log sigma(m) = log(1 + exp(-m)), by the two-term log-sum-exp."""
    m = beta * ((pi_w - pi_l) - (ref_w - ref_l))
    return torch.logaddexp(torch.zeros_like(m), -m)


def as_cross_entropy(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):  # noqa: E501
    """A choice between two rewards: class 0 is the chosen one."""
    rewards = beta * torch.stack(
        [policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps], dim=-1
    )
    return F.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long), reduction="none")


def as_choice(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """The same choice, its log-sum-exp before the chosen reward is taken from it."""
    rewards = torch.stack([beta * (policy_chosen_logps - reference_chosen_logps),
                           beta * (policy_rejected_logps - reference_rejected_logps)])  # fmt: skip
    return torch.logsumexp(rewards, dim=0) - rewards[0]


def with_rewards(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                 beta=0.1, label_smoothing=0.0, reference_free=False):  # fmt: skip
    """The original implementation's signature: (losses, chosen_rewards, rejected_rewards)."""
    if reference_free:
        reference_chosen_logps = reference_rejected_logps = torch.zeros_like(policy_chosen_logps)
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    m = chosen - rejected
    losses = -F.logsigmoid(m) * (1 - label_smoothing) - F.logsigmoid(-m) * label_smoothing
    return losses, chosen.detach(), rejected.detach()


def many_kinds(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta,
               loss_type="sigmoid"):  # fmt: skip
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    raise ValueError(loss_type)


class DPOLoss(torch.nn.Module):
    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        h = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
        return -F.logsigmoid(self.beta * h).mean()


# ---------------------------------------------------------------------------------------------------------- log-probs


def ignored_labels(logits, labels):
    """Labels of -100 outside the completion; per-token losses by cross-entropy."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return -losses.sum(-1)


def masked_gather(logits, input_ids, completion_mask):
    shifted, targets, mask = logits[:, :-1], input_ids[:, 1:], completion_mask[:, 1:].bool()
    chosen = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - shifted.logsumexp(-1)
    return torch.where(mask, chosen, torch.zeros_like(chosen)).sum(-1)


def row_by_row(model, input_ids, attention_mask, completion_mask):
    """No padding at all: every row is cut to its real tokens and run alone."""
    scores = []
    for ids, real, counted in zip(input_ids, attention_mask.bool(), completion_mask, strict=True):
        ids, counted = ids[real], counted[real]
        losses = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        scores.append(-(losses * counted[1:]).sum())
    return torch.stack(scores)


def two_halves(model, input_ids, attention_mask, completion_mask):
    """Chosen and rejected in a forward each, as wide as they need."""
    halves = []
    for ids, real, counted in zip(*(t.chunk(2) for t in (input_ids, attention_mask, completion_mask)), strict=True):
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=real, position_ids=positions).logits
        scores = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        halves.append((scores * counted[:, 1:]).sum(-1))
    return torch.cat(halves)


# -------------------------------------------------------------------------------------------------------------- steps


class HandStep:
    """A step of an adapter, by hand; the reference runs under no_grad."""

    def scores(self, model, batch):
        return two_halves(model, batch.input_ids, batch.attention_mask, batch.completion_mask)

    def step(self, policy, reference, batch, *, objective):
        if objective.kind != "sigmoid" or objective.label_smoothing or objective.sft_weight:
            raise Unsupported(objective.kind)
        policy.zero_grad(set_to_none=True)
        with torch.no_grad():
            c, d = self.scores(reference, batch).chunk(2)
        a, b = self.scores(policy, batch).chunk(2)
        losses = -F.logsigmoid(objective.beta * ((a - c) - (b - d)))
        losses.mean().backward()
        margins = (objective.beta * ((a - c) - (b - d))).detach()
        return StepOut(losses.mean().detach(), {"rewards/margins": float(margins.mean())})


class RowStep(HandStep):
    def scores(self, model, batch):
        return row_by_row(model, batch.input_ids, batch.attention_mask, batch.completion_mask)


class PairStep(HandStep):
    """Backward after every pair, so that one pair's graph is all that is ever held."""

    def step(self, policy, reference, batch, *, objective):
        if objective.kind != "sigmoid" or objective.label_smoothing or objective.sft_weight:
            raise Unsupported(objective.kind)
        policy.zero_grad()
        pairs, total = batch.pairs, 0.0
        for i in range(pairs):
            rows = [i, pairs + i]
            one = [getattr(batch, name)[rows] for name in ("input_ids", "attention_mask", "completion_mask")]
            with torch.no_grad():
                c, d = two_halves(reference, *one)
            a, b = two_halves(policy, *one)
            loss = -F.logsigmoid(objective.beta * ((a - c) - (b - d))) / pairs
            loss.backward()
            total += float(loss.detach())
        return StepOut(torch.tensor(total))


class NumpyLoss:
    """No torch in it: values only, no gradient."""

    def loss(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        numbers = [np.asarray(x.detach(), float) for x in (policy_chosen, policy_rejected, reference_chosen,
                                                           reference_rejected)]  # fmt: skip
        m = objective.beta * ((numbers[0] - numbers[2]) - (numbers[1] - numbers[3]))
        return torch.from_numpy(np.logaddexp(0.0, -m))

