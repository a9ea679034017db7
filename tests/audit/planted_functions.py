"""Which mistakes were planted into hand-written losses, log-probs and steps?  Each function is DPO but for one line."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpocheck.adapter import StepOut, Unsupported

# ------------------------------------------------------------------------------------------------------------- losses


def _h(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def running_baseline(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                     beta):  # fmt: skip
    h = _h(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    kept = running_baseline.__dict__.setdefault("mean", torch.zeros((), dtype=h.dtype))
    running_baseline.mean = 0.9 * kept.to(h.dtype) + 0.1 * h.detach().mean()
    return -F.logsigmoid(beta * (h - kept.to(h.dtype)))


def every_other_pair_swapped(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                             reference_rejected_logps, beta):  # fmt: skip
    h = _h(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    signs = torch.ones_like(h)
    signs[1::2] = -1
    return -F.logsigmoid(beta * signs * h)


def detached_weight_squared(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                            reference_rejected_logps, beta):  # fmt: skip
    h = _h(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(beta * h) * torch.sigmoid(-beta * h).detach()


def hardest_pairs_only(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                       beta):  # fmt: skip
    h = _h(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    losses = -F.logsigmoid(beta * h)
    return torch.where(h > 0, torch.zeros_like(losses), losses)


def chosen_penalty(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """DPO-Positive's penalty, left on."""
    h = _h(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(beta * (h - 5.0 * torch.relu(reference_chosen_logps - policy_chosen_logps)))


def tempered_reference(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                       beta):  # fmt: skip
    h = _h(policy_chosen_logps, policy_rejected_logps, 0.5 * reference_chosen_logps, 0.5 * reference_rejected_logps)
    return -F.logsigmoid(beta * h)


def rounded_to_half(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    h = _h(*(x.half().to(x.dtype) for x in (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                                            reference_rejected_logps)))  # fmt: skip
    return -F.logsigmoid(beta * h)


# ---------------------------------------------------------------------------------------------------------- log-probs


def _per_token(logits, labels):
    kept = labels[:, 1:] != -100
    targets = labels[:, 1:].clamp(min=0)
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, targets[..., None])[..., 0], kept, targets


def repeated_tokens_once(logits, labels):
    """Each distinct token of a completion is scored at its first place alone."""
    scores, kept, targets = _per_token(logits, labels)
    first = torch.ones_like(kept)
    for row, (keep, target) in enumerate(zip(kept, targets, strict=True)):
        seen = set()
        for place in range(len(target)):
            if keep[place]:
                first[row, place] = int(target[place]) not in seen
                seen.add(int(target[place]))
    return (scores * (kept & first)).sum(-1)


def best_thirty_two(logits, labels):
    """The softmax runs over the 32 greatest logits, as a sampler's would."""
    best = logits.topk(32, dim=-1).values[..., -1:]
    scores, kept, _ = _per_token(logits.masked_fill(logits < best, -30.0), labels)
    return (scores * kept).sum(-1)


def last_four_positions(logits, labels):
    scores, kept, _ = _per_token(logits[:, -4:], labels[:, -4:])
    return (scores * kept).sum(-1)


def stops_at_a_zero(logits, labels):
    """The mask is a running product, so that whatever follows a gap or a token 0 is lost."""
    scores, kept, targets = _per_token(logits, labels)
    alive = torch.cumprod(torch.where(kept, targets != 0, True).long(), dim=-1).bool()
    return (scores * (kept & alive)).sum(-1)


def discounted(logits, labels):
    """Later tokens weigh less, as rewards in reinforcement learning do."""
    scores, kept, _ = _per_token(logits, labels)
    age = (kept.cumsum(-1) - 1).clamp(min=0)
    return (scores * kept * 0.9**age).sum(-1)


# -------------------------------------------------------------------------------------------------------------- steps


def _score(model, batch, **changed):
    ids, mask = batch["input_ids"], batch["completion_mask"]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=changed.get("attention", batch["attention_mask"]),
                   position_ids=changed.get("positions", positions)).logits.float()  # fmt: skip
    return (logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)


class Step:
    """A step by hand; a subclass overrides the one part that is wrong."""

    def scores(self, model, batch):
        return _score(model, batch)

    def reference_scores(self, model, batch):
        with torch.no_grad():
            return self.scores(model, batch)

    def margins(self, policy, reference):
        (a, b), (c, d) = policy.chunk(2), reference.chunk(2)
        return _h(a, b, c, d)

    def after(self, policy):
        pass

    def step(self, policy, reference, batch, *, objective):
        if objective.kind != "sigmoid" or objective.label_smoothing or objective.sft_weight:
            raise Unsupported(objective.kind)
        policy.zero_grad()
        held = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
        h = self.margins(self.scores(policy, held), self.reference_scores(reference, held))
        loss = -F.logsigmoid(objective.beta * h).mean()
        loss.backward()
        self.after(policy)
        return StepOut(loss.detach())


class SeesPads(Step):
    def scores(self, model, batch):
        return _score(model, batch, attention=torch.ones_like(batch["attention_mask"]))


class PositionsBackwards(Step):
    def scores(self, model, batch):
        mask = batch["attention_mask"]
        positions = (mask.sum(-1, keepdim=True) - mask.cumsum(-1)).clamp(min=0)
        return _score(model, batch, positions=positions)


class ChosenReferenceTwice(Step):
    def reference_scores(self, model, batch):
        chosen = super().reference_scores(model, batch).chunk(2)[0]
        return torch.cat([chosen, chosen])


class HalvesInterleaved(Step):
    def margins(self, policy, reference):
        return _h(policy[0::2], policy[1::2], reference[0::2], reference[1::2])


class GradientOfTheSign(Step):
    def after(self, policy):
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()


class ClipsEachParameter(Step):
    def after(self, policy):
        for parameter in policy.parameters():
            if parameter.grad is not None:
                torch.nn.utils.clip_grad_norm_([parameter], 1e-3)
