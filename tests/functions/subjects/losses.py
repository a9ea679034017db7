"""Losses of log-probs as people write them; honest unless the name says otherwise."""

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial, wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BETA = 0.1


def token_dpo_loss(ref_log_probs, policy_log_probs, mask, beta):
    """Log-probs token by token, chosen rows first."""
    gain = ((policy_log_probs - ref_log_probs) * mask).sum(dim=1)
    half = gain.shape[0] // 2
    return F.softplus(beta * (gain[half:] - gain[:half])).mean()


def four_names(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
               beta, label_smoothing=0.0, ipo=False, reference_free=False):  # fmt: skip
    h = policy_chosen_logps - policy_rejected_logps
    if not reference_free:
        h = h - (reference_chosen_logps - reference_rejected_logps)
    if ipo:
        each = (h - 1 / (2 * beta)) ** 2
    else:
        each = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    won = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    lost = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return each, won, lost


def indexed_dpo(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    advantage = pi_logps - ref_logps
    each = F.softplus(-beta * (advantage[yw_idxs] - advantage[yl_idxs]))
    return each, beta * advantage.detach()


def british_dpo(model_prefered_logprob, model_disprefered_logprob, ref_prefered_logprob, ref_disprefered_logprob,
                beta=0.5):  # fmt: skip
    better = model_prefered_logprob - ref_prefered_logprob
    worse = model_disprefered_logprob - ref_disprefered_logprob
    loss = -F.logsigmoid(beta * (better - worse)).mean()
    return loss, better.mean(), worse.mean(), (better > worse).float().mean(), (better - worse).mean()


def other_order_loss(policy_chosen, reference_chosen, policy_rejected, reference_rejected, *, beta):
    return -F.logsigmoid(beta * (policy_chosen - reference_chosen - policy_rejected + reference_rejected))


def short_dpo(pi_w, pi_l, ref_w, ref_l, β=0.3):
    return F.softplus(β * (pi_l - pi_w + ref_w - ref_l)).sum() / len(pi_w)


def letters_dpo(pc, pr, rc, rr, beta):
    return -torch.log(torch.sigmoid(beta * ((pc - rc) - (pr - rr)))).mean()


def unnamed_dpo_loss(a, b, c, d, temperature):
    return -F.logsigmoid(temperature * ((a - b) - (c - d)))


def ratio_loss(chosen_logratios, rejected_logratios, beta=0.1):
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def model_ratio_loss(pi_logratios, ref_logratios, beta=0.1):
    return -F.logsigmoid(beta * (pi_logratios - ref_logratios))


def typed_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
              label_smoothing=0.0, loss_type="sigmoid"):  # fmt: skip
    h = (policy_chosen_logps - policy_rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    if loss_type == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    raise ValueError(loss_type)


def fixed_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(0.25 * h)


def betaless_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(h)


def global_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(BETA * h)


def configured_dpo(config, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return {"loss": -F.logsigmoid(config.dpo.beta * h).mean(), "chosen_rewards": policy_chosen_logps - ref_chosen_logps}


def numpy_dpo(policy_logprob_preferred, policy_logprob_rejected, ref_logprob_preferred, ref_logprob_rejected, beta=0.1):
    h = (policy_logprob_preferred - ref_logprob_preferred) - (policy_logprob_rejected - ref_logprob_rejected)
    return np.log1p(np.exp(-beta * h)), {"margin": h}


def plain_number_dpo(pi_chosen: float, pi_rejected: float, ref_chosen: float, ref_rejected: float, beta: float = 0.1):
    gain, loss = pi_chosen - ref_chosen, pi_rejected - ref_rejected
    return math.log1p(math.exp(-beta * (gain - loss))), beta * gain, beta * loss


def only_ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, tau):
    return ((policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps) - 0.5 / tau) ** 2


def simpo_loss(policy_chosen_logps, policy_rejected_logps, beta=2.0, gamma=0.5):
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma)


lambda_dpo = lambda pi_w, pi_l, ref_w, ref_l, beta=0.1: -F.logsigmoid(beta * (pi_w - pi_l - ref_w + ref_l))  # noqa: E731

partial_dpo = partial(british_dpo, beta=0.7)


def noted(function):
    @wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@noted
def decorated_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    won, lost = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (won - lost))


class DPOCriterion(nn.Module):
    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.scale, self.smoothing_rate = beta, label_smoothing

    def forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        m = self.scale * (policy_chosen_logps - policy_rejected_logps)
        m = m - self.scale * (reference_chosen_logps - reference_rejected_logps)
        return (1 - self.smoothing_rate) * F.softplus(-m) + self.smoothing_rate * F.softplus(m)


class BigTrainer:
    """Cannot be built here; its loss reads two attributes and calls a method of its own."""

    def __init__(self, model, dataset_path, config):
        self.rows = dataset_path.read_text()
        self.beta = config.beta

    def _h(self, a, b, c, d):
        return (a - b) - (c - d)

    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        h = self._h(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return -F.logsigmoid(self.beta * h.to(self.accelerator.device))

    @staticmethod
    def static_loss(pi_w, pi_l, ref_w, ref_l, beta):
        return -F.logsigmoid(beta * (pi_w - pi_l - ref_w + ref_l))


ready_criterion = DPOCriterion(beta=0.125)

Out = namedtuple("Out", "loss chosen_rewards rejected_rewards")


@dataclass
class Record:
    loss: torch.Tensor
    margin: torch.Tensor


def named_tuple_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    return Out(F.softplus(-beta * (pi_w - pi_l - ref_w + ref_l)), beta * (pi_w - ref_w), beta * (pi_l - ref_l))


def record_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    h = pi_w - pi_l - ref_w + ref_l
    return Record(F.softplus(-beta * h).mean(), h)


def halves_dpo(policy_logps, ref_logps, beta):
    """All rows in one vector, chosen first."""
    half = len(policy_logps) // 2
    gain = policy_logps - ref_logps
    return F.softplus(beta * (gain[half:] - gain[:half]))


def counted_halves_dpo(policy_logps, reference_logps, batch_size, beta):
    gain = policy_logps - reference_logps
    return F.softplus(beta * (gain[batch_size:] - gain[:batch_size])), gain.detach()


def turns_dpo(policy_logps, ref_logps, beta):
    """Chosen and rejected rows take turns."""
    gain = policy_logps - ref_logps
    return F.softplus(beta * (gain[1::2] - gain[::2]))


def tuples_dpo(policy_logps, ref_logps, beta):
    won, lost = policy_logps
    return F.softplus(beta * (lost - ref_logps[1] - won + ref_logps[0]))


def token_halves_dpo(ref_probs, probs, beta):
    """Log-probs token by token, zeros elsewhere, called probs."""
    gain = probs.sum(dim=1) - ref_probs.sum(dim=1)
    won, lost = gain.chunk(2)
    return F.softplus(beta * (lost - won)).mean()


def margin_dpo_loss(margin, beta):
    return F.softplus(-beta * margin)


def delta_dpo_loss(delta_logp, delta_logp_ref, beta=0.1):
    return F.softplus(beta * (delta_logp_ref - delta_logp))


def gains_preference_loss(d_w, d_l, beta, variant):
    if variant == "dpo":
        return F.softplus(beta * (d_l - d_w))
    raise ValueError(variant)


def logits_named_dpo(model_chosen_logits, model_rejected_logits, ref_chosen_logits, ref_rejected_logits, beta):
    """Calls log-probs logits."""
    h = (model_chosen_logits - ref_chosen_logits) - (model_rejected_logits - ref_rejected_logits)
    return F.softplus(-beta * h)


def flagged_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, normalize=True):
    """`normalize` has nothing to do with lengths."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return F.softplus(-beta * h) if normalize else -beta * h


def one_pair_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    """Written for one pair, in torch."""
    h = pi_w - pi_l - ref_w + ref_l
    if h > 0:
        return torch.log1p(torch.exp(-beta * h))
    return -beta * h + torch.log1p(torch.exp(beta * h))


def numpy_one_pair_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    h = pi_w - pi_l - ref_w + ref_l
    return np.log1p(np.exp(-beta * h)), {"margin": float(h)}


class RecordsDPO:
    """Takes what each model said as one record."""

    def __init__(self, beta=0.1):
        self.beta = beta

    def __call__(self, policy_outputs, reference_outputs):
        won = policy_outputs.chosen_logps - reference_outputs.chosen_logps
        lost = policy_outputs.rejected_logps - reference_outputs.rejected_logps
        return F.softplus(self.beta * (lost - won)), self.beta * won.detach(), self.beta * lost.detach()


class ResultOf:
    def __init__(self, value):
        self.value = value


class LocalMathDPO:
    """Plain numbers, its module imported inside, a result object; the class says what `compute` computes."""

    def __init__(self, beta=0.1):
        self.beta = beta

    def compute(self, pi_chosen: float, pi_rejected: float, ref_chosen: float, ref_rejected: float):
        import math

        return ResultOf(math.log1p(math.exp(-self.beta * (pi_chosen - pi_rejected - ref_chosen + ref_rejected))))


def told_simpo_loss(pi_chosen, pi_rejected, len_chosen, len_rejected, beta, gamma):
    """Divides by the lengths itself."""
    return F.softplus(gamma - beta * (pi_chosen / len_chosen - pi_rejected / len_rejected))


def told_ipo_loss(pi_w, pi_l, ref_w, ref_l, eta):
    return (pi_w - pi_l - ref_w + ref_l - 0.5 / eta) ** 2


def float_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    """A plain number comes back."""
    return F.softplus(-beta * (pi_w - pi_l - ref_w + ref_l)).mean().item()


class SimpleSimPO:
    """Its loss types are curves of one margin, not objectives."""

    def __init__(self, beta=2.0, gamma_beta_ratio=0.25, loss_type="sigmoid"):
        self.beta, self.gamma_beta_ratio, self.loss_type = beta, gamma_beta_ratio, loss_type

    def simpo_loss(self, policy_chosen_logps, policy_rejected_logps):
        m = self.beta * (policy_chosen_logps - policy_rejected_logps - self.gamma_beta_ratio)
        return F.softplus(-m) if self.loss_type == "sigmoid" else torch.relu(1 - m)


def ratio_simpo_loss(policy_chosen_logps, policy_rejected_logps, beta=2.0, gamma=0.25):
    """Its gamma is a ratio to beta, as in the code of SimPO's authors."""
    return F.softplus(-beta * (policy_chosen_logps - policy_rejected_logps - gamma))


def dpo_pair_margin(pi_w, pi_l, ref_w, ref_l, beta):
    """Not a loss."""
    return beta * (pi_w - pi_l - ref_w + ref_l)


# ------------------------------------------------------------------------------------------------------------- wrong


def wrong_token_mean_dpo_loss(ref_log_probs, policy_log_probs, mask, beta):
    """Divides by the number of tokens."""
    gain = ((policy_log_probs - ref_log_probs) * mask).sum(dim=1) / mask.sum(dim=1)
    half = gain.shape[0] // 2
    return F.softplus(beta * (gain[half:] - gain[:half])).mean()


def wrong_two_dpo_loss(chosen_logps, rejected_logps, beta=0.1):
    """There is no reference."""
    return F.softplus(beta * (rejected_logps - chosen_logps))


def wrong_sign_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Adds the reference's rejected log-prob on the wrong side."""
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps - ref_chosen_logps - ref_rejected_logps))


def wrong_twice_dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """beta twice."""
    return -F.logsigmoid(beta * beta * (chosen_logps - rejected_logps - ref_chosen_logps + ref_rejected_logps))


def wrong_swapped_dpo(rejected_logps, chosen_logps, ref_rejected_logps, ref_chosen_logps, beta=0.1):
    """Named right and computed the other way round."""
    return -F.logsigmoid(beta * (rejected_logps - chosen_logps - ref_rejected_logps + ref_chosen_logps)).mean()


def wrong_detached_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    """No gradient through the rejected completion."""
    return -F.logsigmoid(beta * (pi_w - pi_l.detach() - ref_w + ref_l))


def wrong_no_reference_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    """The reference is forgotten."""
    return -F.logsigmoid(beta * (pi_w - pi_l))
