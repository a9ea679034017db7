"""Ways to write that a fresh sample of public code showed; honest unless the name says otherwise."""

import torch
import torch.nn.functional as F


def per_token(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


# ------------------------------------------------------------------------------------------------------------ losses


def lists_rejected_first_dpo_loss(policy_logps, ref_logps, beta):
    def apart(values):
        half = len(values) // 2
        return torch.cat(values[:half]), torch.cat(values[half:])

    policy_rejected, policy_chosen = apart(policy_logps)
    ref_rejected, ref_chosen = apart(ref_logps)
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected))


def cut_rejected_first_dpo_loss(policy_logps, ref_logps, beta):
    n = policy_logps.shape[0] // 2
    gains = policy_logps - ref_logps
    worse, preferred = gains[:n], gains[n:]
    return -F.logsigmoid(beta * (preferred - worse))


def masked_sides_dpo_loss(pi_chosen_logps, pi_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_mask,
                          rejected_mask, beta):  # fmt: skip
    chosen = ((pi_chosen_logps - ref_chosen_logps) * chosen_mask).sum(-1)
    rejected = ((pi_rejected_logps - ref_rejected_logps) * rejected_mask).sum(-1)
    return -F.logsigmoid(beta * (chosen - rejected))


def wrong_masked_sides_dpo_loss(pi_chosen_logps, pi_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_mask,
                                rejected_mask, beta):  # fmt: skip
    chosen = ((pi_chosen_logps - ref_chosen_logps) * chosen_mask).sum(-1) / chosen_mask.sum(-1)
    rejected = ((pi_rejected_logps - ref_rejected_logps) * rejected_mask).sum(-1) / rejected_mask.sum(-1)
    return -F.logsigmoid(beta * (chosen - rejected))


def short_sides_dpo_loss(logp_pi_ch, logp_pi_rj, logp_ref_ch, logp_ref_rj, beta):
    return -F.logsigmoid(beta * ((logp_pi_ch - logp_pi_rj) - (logp_ref_ch - logp_ref_rj)))


def numbered_dpo_loss(logp_1, logp_ref_1, logp_2, logp_ref_2, beta):
    return -F.logsigmoid(beta * (logp_1 - logp_ref_1 - logp_2 + logp_ref_2))


def weighted_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    h = policy_chosen_logps - policy_rejected_logps - ref_chosen_logps + ref_rejected_logps
    return -F.logsigmoid(beta * h) * torch.exp(policy_chosen_logps).detach()


# --------------------------------------------------------------------------------------------------------- log-probs


def encoded_logps(model, enc, completion_mask):
    logits = model(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"]).logits
    return (per_token(logits, enc["input_ids"]) * completion_mask[:, 1:]).sum(1)


def listed_logp(model, prompt_ids: list[int], completion_ids: list[int]):
    whole = list(prompt_ids) + list(completion_ids)
    if len(whole) > model.max_seq_len:
        raise ValueError("too long")
    logits = model(torch.tensor([whole]))
    each = F.log_softmax(logits, dim=-1)[0, torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
    return each[len(prompt_ids) - 1 :].sum()


def zeroed_labels_logps(logits, labels):
    labels = labels[:, 1:]
    return (logits[:, :-1].log_softmax(-1).gather(2, labels[..., None])[..., 0] * (labels != 0)).sum(-1)


def padded_labels_logps(model, input_ids, attention_mask, labels):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    labels = labels[:, 1:]
    counted = labels.ne(model.config.pad_token_id)
    return logits, (logits.log_softmax(-1)[:, :-1].gather(2, labels[..., None])[..., 0] * counted).sum(-1)


def wrong_prompt_counting_logps(logits, labels):
    labels = labels[:, 1:]
    return (logits[:, :-1].log_softmax(-1).gather(2, labels[..., None])[..., 0] * (labels != 0)).sum(-1)


def its_caller(model, rows):
    return wrong_prompt_counting_logps(model(rows), rows)


def reduced_logps(model, input_ids, attention_mask, response_mask, reduction):
    logits = model(input_ids, attn_mask=attention_mask)["logits"]
    each = per_token(logits, input_ids) * response_mask[:, 1:]
    return {"sum": each.sum(1), "mean": each.sum(1) / response_mask[:, 1:].sum(1)}[reduction]


def sides_logps(model, batch, is_policy_model: bool):
    with torch.set_grad_enabled(is_policy_model):
        sides = [(batch[f"{side}_input_ids"], batch[f"{side}_mask"]) for side in ("chosen", "rejected")]
        chosen, rejected = ((per_token(model(ids).logits, ids) * mask[:, 1:]).sum(1) for ids, mask in sides)
    return chosen, rejected


def sequence_first_logps(model, tokens, prompt_length):
    seq_len, batch_size = tokens.shape  # noqa: RUF059
    each = model(tokens).log_softmax(-1)[:-1].gather(2, tokens[1:, :, None])[..., 0]
    counted = torch.arange(seq_len - 1)[:, None] >= prompt_length - 1
    return (each * counted).sum(0)


def targets_beside_logps(model, input_ids, targets):
    logits = model(input_ids, targets)
    return per_token(logits, targets).sum(1)


# -------------------------------------------------------------------------------------------------------------- steps


def _sides(model, batch):
    for side in ("chosen", "rejected"):
        ids = batch[f"{side}_ids"]
        yield (per_token(model(ids).logits, ids) * batch[f"{side}_mask"][:, 1:]).sum(1)


def maskless_dpo_step(model, ref_model, batch, beta, normalize_rejected=False, rejected_weight=1.0):
    chosen, rejected = _sides(model, batch)
    with torch.no_grad():
        ref_chosen, ref_rejected = _sides(ref_model, batch)
    if normalize_rejected:
        raise ValueError("never asked for")
    return -F.logsigmoid(beta * (chosen - rejected_weight * rejected - ref_chosen + ref_rejected)).mean()


def configured_dpo_step(config, model, ref_model, batch):
    told = config.require("train")
    if config.dpo_loss_type != "sigmoid":
        raise ValueError(config.dpo_loss_type)
    return maskless_dpo_step(model, ref_model, batch, told["beta"])


def logits_or_logps_dpo_loss(chosen_logits, rejected_logits, chosen_labels, rejected_labels, chosen_masks,
                             rejected_masks, beta, ref_chosen_log_probs=None, ref_rejected_log_probs=None,
                             ref_chosen_logits=None, ref_rejected_logits=None):  # fmt: skip
    def total(logits, labels, masks, known=None):
        each = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] if known is None else known
        return (each * masks).sum(1)

    chosen = total(chosen_logits, chosen_labels, chosen_masks)
    rejected = total(rejected_logits, rejected_labels, rejected_masks)
    chosen = chosen - total(ref_chosen_logits, chosen_labels, chosen_masks, ref_chosen_log_probs)
    rejected = rejected - total(ref_rejected_logits, rejected_labels, rejected_masks, ref_rejected_log_probs)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


class KeptDefaults:
    def __init__(self, model, optimizer, folder, reduction="sum"):
        folder.mkdir()
        self.reduction = reduction

    def compute_dpo_loss(self, batch):
        chosen, rejected = _sides(self.model, batch)
        with torch.no_grad():
            ref_chosen, ref_rejected = _sides(self.ref_model, batch)
        if self.reduction != "sum":
            raise ValueError(self.reduction)
        return -F.logsigmoid(self.beta * (chosen - rejected - ref_chosen + ref_rejected)).mean()


# ------------------------------------------------------- what a second sample showed: targets, defaults, other models


def targets_beside_its_model_logps(model, input_ids, targets, reduction="mean"):
    """Of a data set whose inputs end one token early and whose targets begin one late; its sum is an option."""
    each = model(input_ids)["logits"].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    mask = targets != -100
    total = (each * mask).sum(-1)
    return total if reduction == "sum" else total / mask.sum(-1)


def first_of_output_logps(model, input_ids, labels):
    outputs = model(input_ids)
    each = outputs[0][:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (each * (labels[:, 1:] != -100)).sum(-1)


def text_dpo_loss(batch, tokenizer, policy_model, ref_model, beta):
    rows = [tokenizer.apply_chat_template(text) for text in batch["chosen"]]
    other = [tokenizer.apply_chat_template(text) for text in batch["rejected"]]
    gains = policy_model(rows).logits - ref_model(other).logits
    return -F.logsigmoid(beta * gains.sum())


def may_be_none_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                         offsets: torch.Tensor | None, beta: float = 0.1):  # fmt: skip
    h = policy_chosen_logps - policy_rejected_logps - ref_chosen_logps + ref_rejected_logps
    return -F.logsigmoid(beta * h if offsets is None else beta * h - offsets)


def unused_reference_simpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                                reference_rejected_logps, beta=2.0, gamma=0.5):  # fmt: skip
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma)


def slic_hinge_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    return torch.relu(1 - beta * (policy_chosen_logps - policy_rejected_logps))


def nca_pair_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    chosen, rejected = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * chosen) - (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)) / 2


class HypoTrainer:
    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        reference = (reference_chosen_logps - reference_rejected_logps).clamp(min=0)
        return -F.logsigmoid(self.beta * (policy_chosen_logps - policy_rejected_logps - reference))
