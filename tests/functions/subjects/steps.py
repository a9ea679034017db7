"""Training steps as people write them; honest unless the name says otherwise."""

import torch
import torch.nn.functional as F

BETA = 0.1


def response_logprob(model, input_ids, attn_mask, response_mask):
    logits = model(input_ids, attention_mask=attn_mask).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (each * response_mask[:, 1:]).sum(-1)


def labelled_logps(logits, labels):
    labels = labels[:, 1:]
    mask = labels != -100
    each = logits[:, :-1].log_softmax(-1).gather(-1, labels.masked_fill(~mask, 0)[..., None])[..., 0]
    return (each * mask).sum(-1)


def dpo_step(batch, policy, ref_policy, optimizer):
    """The textbook's."""
    pi_w = response_logprob(policy, batch["chosen_ids"], batch["chosen_attn"], batch["chosen_mask"])
    pi_l = response_logprob(policy, batch["rejected_ids"], batch["rejected_attn"], batch["rejected_mask"])
    with torch.no_grad():
        ref_w = response_logprob(ref_policy, batch["chosen_ids"], batch["chosen_attn"], batch["chosen_mask"])
        ref_l = response_logprob(ref_policy, batch["rejected_ids"], batch["rejected_attn"], batch["rejected_mask"])
    loss = -F.logsigmoid(BETA * ((pi_w - ref_w) - (pi_l - ref_l))).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def clears_last_step(batch, policy, ref_policy, optimizer, beta=0.1):
    loss = losses_of(batch, policy, ref_policy, beta).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "chosen_reward": torch.tensor(0.25)}


def losses_of(batch, policy, ref_model, beta):
    """Labels, and masks that are attention masks."""
    logps = {}
    for side in ("chosen", "rejected"):
        ids, mask, labels = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"]
        logps[side] = labelled_logps(policy(input_ids=ids, attention_mask=mask).logits, labels)
        with torch.no_grad():
            frozen = labelled_logps(ref_model(input_ids=ids, attention_mask=mask).logits, labels)
        logps[side] = logps[side] - frozen
    return F.softplus(beta * (logps["rejected"] - logps["chosen"]))


def compute_loss(model, ref_model, batch, beta):
    """Returns the loss; the caller goes backward."""
    return losses_of(batch, model, ref_model, beta).mean()


def masks_without_attention_loss(batch, policy_model, reference_model, beta):
    """`chosen` are the ids, `chosen_mask` the completion; right padding needs no attention mask in a causal model."""
    def each(model, ids, mask):
        logits = model(ids).logits[:, :-1]
        return (logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(-1)

    w = each(policy_model, batch["chosen"], batch["chosen_mask"])
    l = each(policy_model, batch["rejected"], batch["rejected_mask"])
    with torch.no_grad():
        ref_w = each(reference_model, batch["chosen"], batch["chosen_mask"])
        ref_l = each(reference_model, batch["rejected"], batch["rejected_mask"])
    return F.softplus(-beta * (w - l - ref_w + ref_l)).mean()


def one_mask_loss(batch, policy, reference, beta):
    """One mask for both: all real tokens are counted.  The prompt is the same on both sides and cancels."""
    def each(model, side):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
        logits = model(ids, attention_mask=batch["chosen_mask"] if side == "chosen" else batch["rejected_mask"]).logits
        return (logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(-1)

    with torch.no_grad():
        ref = each(reference, "chosen") - each(reference, "rejected")
    return -F.logsigmoid(beta * (each(policy, "chosen") - each(policy, "rejected") - ref)).mean()


def nested_loss(policy, reference, batch, beta=0.1):
    sides = []
    for side in (batch["chosen"], batch["rejected"]):
        logps = labelled_logps(policy(side["input_ids"], attention_mask=side["attention_mask"]).logits, side["labels"])
        with torch.no_grad():
            out = reference(side["input_ids"], attention_mask=side["attention_mask"])
            frozen = labelled_logps(out.logits, side["labels"])
        sides.append(logps - frozen)
    return -F.logsigmoid(beta * (sides[0] - sides[1])).mean()


def tensors_loss(policy, reference, chosen_ids, rejected_ids, chosen_response_mask, rejected_response_mask, *, beta):
    """The tensors of the batch one by one."""
    def each(model, ids, mask):
        return response_logprob(model, ids, torch.ones_like(ids), mask)

    with torch.no_grad():
        frozen = each(reference, chosen_ids, chosen_response_mask)
        frozen -= each(reference, rejected_ids, rejected_response_mask)
    h = each(policy, chosen_ids, chosen_response_mask) - each(policy, rejected_ids, rejected_response_mask) - frozen
    return F.softplus(-beta * h)


def cached_reference_step(batch, policy, optimizer, beta):
    """The reference's log-probs come with the batch."""
    w = labelled_logps(policy(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits,
                       batch["chosen_labels"])  # fmt: skip
    l = labelled_logps(policy(batch["rejected_input_ids"], attention_mask=batch["rejected_attention_mask"]).logits,
                       batch["rejected_labels"])  # fmt: skip
    h = w - l - batch["reference_chosen_logps"] + batch["reference_rejected_logps"]
    loss = F.softplus(-beta * h).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def joined_prompt_loss(batch, policy, reference, beta):
    """Prompts and completions come apart, and are joined here."""
    total = 0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        ids = torch.cat([batch["prompt_input_ids"], batch[f"{side}_input_ids"]], 1)
        attention = torch.cat([batch["prompt_attention_mask"], batch[f"{side}_attention_mask"]], 1)
        mask = torch.cat([torch.zeros_like(batch["prompt_attention_mask"]), batch[f"{side}_attention_mask"]], 1)
        total = total + sign * response_logprob(policy, ids, attention, mask)
        with torch.no_grad():
            frozen = response_logprob(reference, ids, attention, mask)
        total = total - sign * frozen
    return F.softplus(-beta * total).mean()


def full_step(model, ref_model, batch, optimizer, scheduler, scaler, accelerator, beta, grad_accum=8, max_norm=0.001):
    """With everything around it: what it cannot do without is given, and neither scales nor clips nor divides."""
    loss = losses_of(batch, model, ref_model, beta).mean() / grad_accum
    accelerator.backward(scaler.scale(loss))
    scaler.unscale_(optimizer)
    accelerator.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    optimizer.zero_grad()
    return {"loss": loss}


def clipping_step(policy, ref_model, batch, optimizer, beta):
    """A hard-coded clipping at one: far above the gradient of the logits of any pair."""
    optimizer.zero_grad()
    loss = losses_of(batch, policy, ref_model, beta).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return loss


def tight_clipping_step(policy, ref_model, batch, optimizer, beta):
    """Clips at a hundredth, which the gradient of the logits does exceed."""
    optimizer.zero_grad()
    loss = losses_of(batch, policy, ref_model, beta).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=0.01)
    optimizer.step()
    return loss


class Settings:
    beta, smoothing, scaled_by = 0.3, 0.0, 1.0


class Indexed:
    """All rows in one tensor, and which of them are chosen; settings of its own that may be left out."""

    def __init__(self, config=None):
        self.config = config or Settings()

    def compute_dpo_loss(self, policy_model, reference_model, input_ids, attention_mask, labels, yw_idxs, yl_idxs):
        gain = labelled_logps(policy_model(input_ids, attention_mask=attention_mask).logits, labels)
        with torch.no_grad():
            frozen = labelled_logps(reference_model(input_ids, attention_mask=attention_mask).logits, labels)
        gain = self.config.scaled_by * (gain - frozen)
        loss = F.softplus(self.config.beta * (gain[yl_idxs] - gain[yw_idxs]))
        return loss, self.config.beta * gain.detach(), {"reward_accuracy": 0.5}


class Trainer:
    def __init__(self, model, ref_model, optimizer, beta=0.1):
        self.model, self.ref_model, self.optimizer, self.beta = model, ref_model, optimizer, beta

    def train_step(self, batch):
        loss = losses_of(batch, self.model, self.ref_model, self.beta).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), {"rewards/chosen": 1.5, "margin": 2.0}


def shared_length_loss(policy, reference, batch, beta):
    """One prompt length for both completions of a pair."""

    def total(model, side):
        ids = batch[f"{side}_input_ids"]
        each = model(ids, attention_mask=batch[f"{side}_attention_mask"]).logits[:, :-1].log_softmax(-1)
        after = torch.arange(1, ids.shape[1]) >= batch["prompt_lengths"][: len(ids), None]
        kept = after * batch[f"{side}_attention_mask"][:, 1:]
        return (each.gather(-1, ids[:, 1:, None]).squeeze(-1) * kept).sum(-1)

    with torch.no_grad():
        known = total(reference, "chosen") - total(reference, "rejected")
    return F.softplus(-beta * (total(policy, "chosen") - total(policy, "rejected") - known)).mean()


def logits_dpo_loss(policy_chosen_logits, policy_rejected_logits, ref_chosen_logits, ref_rejected_logits,
                    chosen_labels, rejected_labels, beta):  # fmt: skip
    """Given what the models say; it moves labels and logits by one itself."""
    y_w, y_l = chosen_labels, rejected_labels
    won = labelled_logps(policy_chosen_logits, y_w) - labelled_logps(ref_chosen_logits, y_w)
    lost = labelled_logps(policy_rejected_logits, y_l) - labelled_logps(ref_rejected_logits, y_l)
    return F.softplus(beta * (lost - won)).mean()


def moved_logits_dpo_loss(logits_accepted, logits_rejected, logits_accepted_ref, logits_rejected_ref,
                          y_accepted, y_rejected, cmask_accepted, cmask_rejected, beta=0.1):  # fmt: skip
    """Its caller has moved everything; tokens and masks apart."""

    def total(logits, y, cmask):
        return (logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) * cmask).sum(-1)

    won = total(logits_accepted, y_accepted, cmask_accepted) - total(logits_accepted_ref, y_accepted, cmask_accepted)
    lost = total(logits_rejected, y_rejected, cmask_rejected) - total(logits_rejected_ref, y_rejected, cmask_rejected)
    return F.softplus(beta * (lost - won)).mean()


def half_logits_dpo_loss(pi_chosen_logits, pi_rejected_logits, ref_chosen_logps, ref_rejected_logps, chosen_labels,
                         rejected_labels, beta=0.1):  # fmt: skip
    """The reference's log-probs are known beforehand."""
    won = labelled_logps(pi_chosen_logits, chosen_labels) - ref_chosen_logps
    lost = labelled_logps(pi_rejected_logits, rejected_labels) - ref_rejected_logps
    return F.softplus(beta * (lost - won)).mean()


# ------------------------------------------------------------------------------------------------------------- wrong


def wrong_logits_dpo_loss(policy_chosen_logits, policy_rejected_logits, ref_chosen_logits, ref_rejected_logits,
                          chosen_labels, rejected_labels, beta):  # fmt: skip
    """The policy's rejected logits are taken for the reference's."""
    won = labelled_logps(policy_chosen_logits, chosen_labels) - labelled_logps(ref_chosen_logits, chosen_labels)
    lost = labelled_logps(policy_rejected_logits, rejected_labels)
    return F.softplus(beta * (lost - lost.detach() - won)).mean()


def wrong_never_clears(batch, policy, ref_policy, optimizer, beta=0.1):
    """Gradients of the step before are added."""
    loss = losses_of(batch, policy, ref_policy, beta).mean()
    loss.backward()
    optimizer.step()
    return loss


def wrong_live_reference_step(batch, policy, reference, beta=0.1):
    """The policy is its own reference."""
    return losses_of(batch, policy, policy, beta).mean()


def wrong_sum_loss(batch, policy, reference, beta=0.1):
    """The sum over pairs."""
    return losses_of(batch, policy, reference, beta).sum()
