"""Which mistakes did somebody invent who has not written the checks?  Bare functions; each is DPO but for one line."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return beta * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected))


def through_probabilities(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                          reference_rejected_logps, beta):  # fmt: skip
    """A binary cross-entropy of sigmoid's output: torch cuts its logarithm off at -100."""
    m = _margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta)
    preferred = torch.sigmoid(m)
    return F.binary_cross_entropy(preferred, torch.ones_like(preferred), reduction="none")


def floor_under_long_completions(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                                 reference_rejected_logps, beta):  # fmt: skip
    """Log-probs of whole completions are kept above -100, 'for stability'."""
    four = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(_margin(*(x.clamp(min=-100.0) for x in four), beta))


def slope_lost_at_zero(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                       beta):  # fmt: skip
    """The stable form of softplus out of |m| and relu, whose slopes at zero are both zero: the first step is lost."""
    four = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    m = _margin(*four, beta)
    return torch.log1p(torch.exp(-m.abs())) + torch.relu(-m)


_calls = 0


def beta_grows(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """Beta is annealed by a counter that nobody resets."""
    global _calls
    _calls += 1
    four = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(_margin(*four, beta * (1.0 + 0.001 * _calls)))


def chosen_log_ratio_squared(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                             reference_rejected_logps, beta):  # fmt: skip
    """A proximity term from another method is left in."""
    four = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(_margin(*four, beta)) + 1e-3 * (policy_chosen_logps - reference_chosen_logps) ** 2


def smoothed_targets(logits, labels):
    """The cross-entropy of the fine-tuning script, label smoothing and all."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none",
                             label_smoothing=0.1)  # fmt: skip
    return -losses.sum(-1)


def capped_logits(logits, labels):
    """Soft-capping at 30, of an architecture that has it, on one that has not."""
    logits = 30.0 * torch.tanh(logits / 30.0)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return -losses.sum(-1)


def impossible_tokens_are_free(logits, labels):
    """log(softmax), and what is minus infinity is set to zero."""
    kept = labels[:, 1:] != -100
    p = logits[:, :-1].softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (p.log().nan_to_num(neginf=0.0) * kept).sum(-1)


def last_logit_is_dropped(logits, labels):
    """The vocabulary is cut to a multiple that the last token does not fit in."""
    kept = labels[:, 1:] != -100
    scores = logits[:, :-1, :-1].log_softmax(-1)
    targets = labels[:, 1:].clamp(min=0, max=scores.shape[-1] - 1)
    return (scores.gather(-1, targets[..., None])[..., 0] * kept).sum(-1)


def mask_in_bytes(logits, input_ids, mask):
    """The sum of a mask times the scores runs in half precision."""
    scores = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (scores.half() * mask[:, 1:].half()).sum(-1).to(logits.dtype)
