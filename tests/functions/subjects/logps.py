"""Sums of log-probs as people write them; honest unless the name says otherwise."""

import numpy as np
import torch
import torch.nn.functional as F


def get_batch_logps(logits, labels, average_log_prob=False):
    labels = labels[:, 1:].clone()
    counted = labels != -100
    labels[labels == -100] = 0
    each = logits[:, :-1].log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    total = (each * counted).sum(-1)
    return total / counted.sum(-1) if average_log_prob else total


def logps_and_count(logits, labels, label_pad_token_id=-100):
    labels = labels[:, 1:].clone()
    mask = labels.ne(label_pad_token_id)
    labels = labels.masked_fill(~mask, 0)
    return (torch.gather(logits[:, :-1].log_softmax(-1), 2, labels[..., None])[..., 0] * mask).sum(1), mask.sum(1)


def cross_entropy_logps(logits, labels):
    shifted = logits[..., :-1, :].transpose(1, 2)
    return -F.cross_entropy(shifted, labels[..., 1:], reduction="none").sum(-1)


def masked_logprobs(logits, labels, selection_mask=None):
    tokens = labels[:, 1:]
    each = torch.gather(F.log_softmax(logits[:, :-1], dim=-1), -1, tokens.unsqueeze(-1)).squeeze(-1)
    return (each * selection_mask[:, 1:]).sum(-1)


def response_logprob(model, input_ids, attn_mask, response_mask):
    logits = model(input_ids, attention_mask=attn_mask).logits[:, :-1]
    each = torch.log_softmax(logits, dim=-1).gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (each * response_mask[:, 1:]).sum(dim=-1)


def raw_model_logp(model, ids, mask):
    """For a model that returns logits, as nanoGPT's do."""
    logits = model(ids)
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).sum(1)


def tuple_model_logp(model, x, response_mask):
    """For a model that returns logits and a loss."""
    logits, _ = model(x)
    return (logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0] * response_mask[:, 1:]).sum(1)


def labelled_logp(model, input_ids, attention_mask, labels):
    out = model(input_ids=input_ids, attention_mask=attention_mask)["logits"]
    return get_batch_logps(out, labels)


def prompt_length_logp(logits, labels, prompt_lengths, attention_mask):
    each = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None]).squeeze(2)
    place = torch.arange(1, labels.shape[1])
    return (each * (place >= prompt_lengths[:, None]) * attention_mask[:, 1:]).sum(1)


def premoved_logps(logits, y, completion_mask):
    """Its caller moves logits and tokens, see below."""
    return (logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) * completion_mask).sum(-1)


def caller(model, ids, mask):
    return premoved_logps(model(ids).logits[:, :-1], ids[:, 1:], mask[:, 1:])


def token_logps(model, input_ids, attention_mask, labels):
    """One number a token: what is not completion is left in, as in a per-token log-prob."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def sequence_logprob(model, prompt_ids, completion_ids):
    ids = torch.cat([prompt_ids, completion_ids], dim=-1)
    logits = model(ids).logits
    total = 0.0
    for place in range(prompt_ids.shape[-1], ids.shape[-1]):
        total = total + logits[:, place - 1].log_softmax(-1)[0, ids[0, place]]
    return total


def prefix_logp(model, input_ids, prompt_len):
    """One sequence, without padding: the length of its prompt is a number."""
    each = model(input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return each[:, prompt_len - 1 :].sum()


def concatenated_forward(model, batch):
    """Log-probs of chosen and of rejected, from one forward over both."""
    ids = torch.cat([batch["chosen_input_ids"], batch["rejected_input_ids"]])
    labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])
    attention = torch.cat([batch["chosen_attention_mask"], batch["rejected_attention_mask"]])
    both = get_batch_logps(model(ids, attention_mask=attention).logits, labels)
    pairs = batch["chosen_input_ids"].shape[0]
    return both[:pairs], both[pairs:]


def iterating_forward(model, batch):
    """Joins whatever tensors the batch has, by the names of its keys."""
    both = {}
    for side in ("chosen", "rejected"):
        for key in batch:
            if key.startswith(side + "_"):
                both.setdefault("both" + key.removeprefix(side), []).append(batch[key])
    joined = {key: torch.cat(parts) for key, parts in both.items()}
    logits = model(joined["both_input_ids"], attention_mask=joined["both_attention_mask"]).logits
    logps = get_batch_logps(logits, joined["both_labels"])
    return {"chosen_logps": logps[: len(logps) // 2], "rejected_logps": logps[len(logps) // 2 :]}


class PaddingScorer:
    """Asks its tokenizer for nothing but the padding's id."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def batch_logps(self, input_ids, attention_mask, labels):
        safe = labels[:, 1:].masked_fill(labels[:, 1:] == -100, self.tokenizer.pad_token_id)
        each = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
        return (each.gather(-1, safe[..., None])[..., 0] * (labels[:, 1:] != -100)).sum(-1)


class Scorer:
    pad_token_id = 0

    def __init__(self, model, tokenizer):
        self.model = model

    def batch_log_probs(self, input_ids, attention_mask, response_mask):
        return response_logprob(self.model, input_ids, attention_mask, response_mask)

    def compute_logprobs(self, model, input_ids, attention_mask, response_mask):
        return response_logprob(model, input_ids, attention_mask, response_mask)


def batch_logprob(model, batch, *, length_normalize=True):
    """Takes one batch of rows, not of pairs; by default it divides by the length."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["response_mask"][:, 1:]
    total = (each * mask).sum(-1)
    return total / mask.sum(-1) if length_normalize else total


def flat_logprob(model, full_ids, prompt_len):
    """One sequence, without a batch axis and without padding."""
    ids = full_ids.unsqueeze(0)
    each = model(ids)["logits"][0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return each[prompt_len - 1 :].sum()


def gradless_logps(model, input_ids, attention_mask, labels, requires_grad=False):
    """Has to be told to keep its graph."""
    with torch.set_grad_enabled(requires_grad):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return get_batch_logps(logits, labels)


def idle_logps(self, logits, labels, prompt_len, pad_token_id):
    """A method that was cut out of its class, and uses nothing of it."""
    labels, logits = labels[:, prompt_len:], logits[:, prompt_len - 1 : -1]
    each = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    return (each * (labels != pad_token_id)).sum(-1)


def numpy_logps(logits, targets, mask):
    """Takes logits and targets that are moved already, in numpy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    each = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0] - np.log(np.exp(shifted).sum(axis=-1))
    return (each * mask).sum(axis=-1)


# ------------------------------------------------------------------------------------------------------------- wrong


def wrong_attention_logps(logits, input_ids, attention_mask):
    """Counts all that is attended to."""
    each = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return (each * attention_mask[:, 1:]).sum(1)


def wrong_hundred_logps(logits, labels):
    """Knows the label -100, and takes it for an index."""
    mask = labels[:, 1:] != -100
    return (logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None]).squeeze(2) * mask).sum(1)


def wrong_unmoved_logps(logits, labels):
    """Scores each token with the logits after it; nothing in the file moves anything for it."""
    mask = labels != -100
    return (logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * mask).sum(1)


def wrong_mean_logp(model, input_ids, attn_mask, response_mask):
    """The mean, not the sum."""
    logits = model(input_ids, attention_mask=attn_mask).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (each * response_mask[:, 1:]).sum(1) / response_mask[:, 1:].sum(1)


def wrong_mask_logp(model, input_ids, attn_mask, response_mask):
    """Its mask is one place late: the first completion token is lost and no last one gained."""
    logits = model(input_ids, attention_mask=attn_mask).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (each * response_mask[:, :-1]).sum(1)


def wrong_all_logp(model, input_ids, attn_mask, response_mask):
    """The prompt is counted too."""
    logits = model(input_ids, attention_mask=attn_mask).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (each * attn_mask[:, 1:]).sum(1)


def wrong_labels_logp(model, input_ids, attention_mask, labels):
    """Takes labels as token ids, so that nothing says where the completion begins: the prompt is counted."""
    each = model(input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
    return (each.gather(-1, labels[:, 1:, None]).squeeze(-1) * attention_mask[:, 1:]).sum(-1)
