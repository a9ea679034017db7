"""Liger-Kernel 0.5 to 0.8: the fused linear DPO loss, from hidden states and head to loss and gradients, by chunks."""

import inspect
from importlib.metadata import version

from dpocheck.adapter import Says, StepOut, Unsupported

LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "hinge": "hinge"}


class Adapter:
    name = "liger-kernel (fused linear DPO loss)"
    package = "liger-kernel"

    def __init__(self):
        self.forced = {"compiled": False}
        release = tuple(int(part) for part in version(self.package).split(".")[:3])
        # The docstrings of `dpo_loss.py`: the loss is an expectation over pairs; label smoothing is "for robust /
        # exo_pair / cDPO".
        offered = ("sigmoid", "cdpo", "robust", "hinge", "sft") if release >= (0, 8, 5) else ("sigmoid", "sft")
        self.says = Says(reduction="mean" if release >= (0, 5) else None, reward_scale="beta", objectives=offered)

    def fused(self, objective):
        """The loss of the installed release with the objective's settings; refuses what it has no setting for."""
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Loss

        if objective.kind not in LOSSES:
            raise Unsupported(f"the loss {objective.kind}")
        known = inspect.signature(Loss.__init__).parameters
        asked = {
            "loss_type": (LOSSES[objective.kind], "sigmoid"), "label_smoothing": (objective.label_smoothing, 0.0),
            "average_log_prob": (objective.length_normalised, False), "alpha": (objective.sft_weight or 1.0, 1.0),
            "use_ref_model": (True, True),
        }  # fmt: skip
        for name, (value, usual) in asked.items():
            if name not in known and value != usual:
                raise Unsupported(f"{name}: this release has no such setting")
        settings = {name: value for name, (value, _) in asked.items() if name in known}
        return Loss(beta=objective.beta, compute_nll_loss=bool(objective.sft_weight), compiled=False, **settings)

    def step(self, policy, reference, batch, *, objective):
        import torch

        fused = self.fused(objective)
        target = torch.where(batch.completion_mask[:, 1:].bool(), batch.input_ids[:, 1:], -100)

        def hidden(model):
            return model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[:, :-1]

        with torch.no_grad():
            beside = {"ref_input": hidden(reference), "ref_weight": reference.lm_head.weight}
        # The first releases take the reference's head alone, or no reference at all.
        known = inspect.signature(fused.forward).parameters
        given = {name: value for name, value in beside.items() if name in known}
        loss, (chosen, rejected, *more) = fused(policy.lm_head.weight, hidden(policy), target, **given)
        loss.backward()
        metrics = {"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()}
        if len(more) >= 5:  # two means of logits, the NLL, then the rewards
            metrics |= {"rewards/chosen": more[3].mean(), "rewards/rejected": more[4].mean()}
        return StepOut(loss, metrics)

    def sequence_logps(self, model, batch):
        """Every row as chosen and as rejected at once: the loss hands back the log-probs that it was made of."""
        import torch

        from dpocheck.experiment import Objective

        fused = self.fused(Objective())
        target = torch.where(batch.completion_mask[:, 1:].bool(), batch.input_ids[:, 1:], -100)
        hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[:, :-1]
        both, head = torch.cat([hidden, hidden]), model.lm_head.weight
        known = inspect.signature(fused.forward).parameters
        given = {name: value for name, value in (("ref_input", both), ("ref_weight", head)) if name in known}
        return fused(head, both, torch.cat([target, target]), **given)[1][0].detach()
