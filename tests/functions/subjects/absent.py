"""A training script on a machine where half of what it imports is missing."""

import math

import nobody_has_this as logger
import torch
from nobody_has_that import Base, helper
from torch.nn import functional as F

BETA = 0.25 * math.sqrt(4.0)
model = logger.load("gpt")


def margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    return policy_chosen - policy_rejected - ref_chosen + ref_rejected


def dpo_loss(policy_chosen: torch.Tensor, policy_rejected: helper.Tensor, ref_chosen, ref_rejected):
    return -F.logsigmoid(BETA * margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


class Trainer(Base):
    @logger.timed
    def fit(self):
        return helper(self)

    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        model = margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return -F.logsigmoid(self.beta * model)


class PlainTrainer(Base):
    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        model = margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return -F.logsigmoid(self.beta * model)


def helped_dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return helper(beta * margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


class Adapter:
    def loss(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        return helper(policy_chosen)


@logger.register("sigmoid")
class RegisteredLoss(Base):
    def __init__(self, beta=0.1):
        self.beta = beta

    def compute_loss(self, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        return -F.logsigmoid(
            self.beta * margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        )
