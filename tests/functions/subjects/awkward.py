"""A script without a main guard, with all that is hard to recognise or to call."""

import math  # noqa: F401
from functools import reduce  # noqa: F401

import torch
import torch.nn.functional as F

raise SystemExit("this script trains when it is imported")


async def async_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps - ref_chosen_logps + ref_rejected_logps))


def yielding_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    yield policy_chosen_logps


def starred_dpo_loss(*args, **kwargs):
    return args[0]


def kwargs_dpo_loss(pi_w, pi_l, ref_w, ref_l, beta, **kwargs):
    return F.softplus(-beta * (pi_w - pi_l - ref_w + ref_l))


def positional_dpo_loss(alpha, bravo, charlie, delta, echo):
    return F.softplus(-echo * (alpha - bravo - charlie + delta))


def dpo_loss_three(a, b, c):
    return a


def dpo_loss_with_more(pi_w, pi_l, ref_w, ref_l, beta, temperature_schedule):
    return a  # noqa: F821


def loose(self, pi_w, pi_l, ref_w, ref_l, beta):
    return self.beta


def evaluate(batch, policy, reference):
    return 0.0


def accuracy(logits, labels):
    return (logits.argmax(-1) == labels).float().mean()


def kto_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    return policy_chosen_logps


def get_batch_logps(logits, labels):
    return logits.sum((1, 2))


def fixed_loss(pi_w, pi_l, ref_w, ref_l):
    return F.softplus(-0.3 * (pi_w - pi_l - ref_w + ref_l))


keyword_dpo = lambda pi_w, pi_l, ref_w, ref_l, *, beta: torch.zeros(())  # noqa: E731


class Trainer:
    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        return self.beta * policy_chosen_logps

    def train_step(self, batch):
        return self.model(batch["chosen_ids"]) - self.model(batch["rejected_ids"]) + self.ref_model(batch["chosen_ids"])


if True:

    def hidden_dpo_step(batch, policy, ref_policy, optimizer):
        return (batch["chosen_ids"], batch["rejected_ids"])
