"""Bare functions with a planted fault each: what stand-alone scripts of functions are tested on."""

import torch
import torch.nn.functional as F


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """The reference's rejected log-prob has the wrong sign."""
    h = policy_chosen_logps - reference_chosen_logps - policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * h)


class Loss:
    def __init__(self, beta):
        self.beta = beta

    def __call__(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        return dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, self.beta
        )


def get_batch_logps(logits, labels):
    """A mean where a sum is due."""
    each = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    scored = targets != -100
    return (each.gather(2, targets.clamp(min=0)[..., None])[..., 0] * scored).sum(1) / scored.sum(1)


def response_logprob(model, input_ids, attn_mask, response_mask):
    """The same through a model."""
    each = model(input_ids=input_ids, attention_mask=attn_mask).logits[:, :-1].log_softmax(-1)
    scored = response_mask[:, 1:]
    return (each.gather(2, input_ids[:, 1:, None])[..., 0] * scored).sum(1) / scored.sum(1)


def dpo_step(batch, policy, ref_policy, optimizer, beta):
    """The gradient is halved before the optimizer's step."""

    def logps(model, side):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
        each = model(input_ids=ids, attention_mask=batch[f"{side}_attn"]).logits[:, :-1].log_softmax(-1)
        return (each.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)

    h = logps(policy, "chosen") - logps(policy, "rejected")
    with torch.no_grad():
        h_reference = logps(ref_policy, "chosen") - logps(ref_policy, "rejected")
    loss = -F.logsigmoid(beta * (h - h_reference)).mean()
    optimizer.zero_grad()
    (0.5 * loss).backward()
    optimizer.step()
    return loss.item()
