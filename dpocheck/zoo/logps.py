"""How do log-probs go wrong between logits and sums: which positions are counted, and how?  Broken part: logps."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import SCORES, STEPS, mini, specimen, torch

# ---------------------------------------------------------------------------------- logps: which positions are counted


def _counted(batch, mask):
    return replace(batch, completion_mask=mask.to(batch.completion_mask.dtype))


def _later(mask):
    """The mask one position later; nothing comes in at the front."""
    return torch.nn.functional.pad(mask[:, :-1], (1, 0))


def _earlier(mask):
    return torch.nn.functional.pad(mask[:, 1:], (0, 1))


def _last(mask):
    """Only the last counted position of each row."""
    return (mask.cumsum(1) == mask.sum(1, keepdim=True)) & (mask > 0)


def _counts(id, counted, mask, summary, imitates=None, caught_by="LOGP-TOKENS"):
    """Declare a specimen that counts the positions of `mask(batch)` in the place of the completion's."""

    def part(logits, batch):
        return mini.logps(logits, _counted(batch, mask(batch)))

    theory = None if counted is None else PAPER.but(counted=counted)
    specimen(id, part="logps", caught_by=caught_by, theory=theory, imitates=imitates, at=SCORES, summary=summary)(part)


_counts(
    "counts-prompt",
    "prompt",
    lambda b: b.attention_mask,
    "The prompt's tokens are scored too.",
    "OpenRLHF/OpenRLHF#235",
)
_counts(
    "counts-last-prompt-token",
    "last-prompt",
    lambda b: b.completion_mask | (_earlier(b.completion_mask) & b.attention_mask),
    "The last token of the prompt is scored too.",
)
_counts(
    "skips-first-token",
    "no-first",
    lambda b: b.completion_mask & _later(b.completion_mask),
    "The first token of the completion is not scored.",
    "jingyaogong/minimind#621",
)
_counts(
    "skips-eos",
    "no-eos",
    lambda b: b.completion_mask & _earlier(b.completion_mask),
    "The last token of the completion, its end of sequence, is not scored.",
    "pytorch/torchtune#949",
    "GRAD-TOKENS",
)
_counts(
    "scores-last-token-only",
    "last-only",
    lambda b: _last(b.completion_mask),
    "Only the last token of the completion is scored.",
)
_counts(
    "counts-padding",
    "padding",
    lambda b: b.completion_mask | (1 - b.attention_mask),
    "Padding is scored too: labels were padded with the pad token, not with the ignored label.",
    "eric-mitchell/direct-preference-optimization@21fd7fe",
    "LOGP-PADDING",
)
_counts(
    "counts-one-pad",
    "one-pad",
    lambda b: b.completion_mask | (_later(_last(b.completion_mask).long()) & (1 - b.attention_mask)),
    "The first pad after the completion is scored too.",
    None,
    "LOGP-VALUE",
)
_counts(
    "masks-token-zero",
    "no-zero-id",
    lambda b: b.completion_mask & (b.input_ids != 0),
    "Tokens with id 0 are not scored: 0 serves as the ignored label.",
    None,
    "LOGP-TOKEN-ZERO",
)
_counts(
    "mask-unshifted",
    "mask-unshifted",
    lambda b: _later(b.completion_mask),
    "Labels are shifted by one and the mask is not.",
    None,
)
_counts(
    "chosen-mask-for-both",
    "chosen-mask",
    lambda b: (
        torch.cat([b.completion_mask[: len(b.input_ids) // 2]] * 2) & _later(b.attention_mask)
        if len(b.input_ids) % 2 == 0
        else b.completion_mask
    ),
    "Rejected rows are scored under the mask of their chosen rows.",
    None,
    "GRAD-RAGGED",
)
_counts(
    "longest-row-loses-its-last-token",
    "longest-loses-last",
    lambda b: (
        b.completion_mask * (torch.arange(b.input_ids.shape[1]) < int(b.attention_mask.cumsum(1).argmax(1).max()))
    ),
    "Empty columns are cut off one too many: the longest row of a batch loses its end of sequence.",
    "huggingface/trl#2332",
    "LOGP-BATCH-MATES",
)


@specimen(
    "masks-the-pad-id",
    part="logps",
    caught_by="LOGP-PAD-IS-EOS",
    theory=PAPER.but(counted="no-pad-id"),
    at=SCORES,
    imitates="NVIDIA-NeMo/Megatron-Bridge#4660",
)
def masks_the_pad_id(logits, batch):
    """Every token equal to the padding is left out: where padding is end of sequence, that is not scored either."""
    padding = batch.input_ids[batch.attention_mask == 0]
    pad = getattr(batch, "pad_token_id", padding[0] if len(padding) else -1)
    return mini.logps(logits, _counted(batch, batch.completion_mask * (batch.input_ids != pad)))


@specimen("counts-eos-twice", part="logps", caught_by="LOGP-TOKENS", theory=PAPER.but(counted="eos-twice"), at=SCORES)
def counts_eos_twice(logits, batch):
    """The last token of the completion is scored twice."""
    return mini.logps(logits, batch) + mini.logps(logits, _counted(batch, _last(batch.completion_mask)))


@specimen(
    "unshifted",
    part="logps",
    caught_by="LOGP-VALUE",
    theory=PAPER.but(counted="unshifted"),
    at=SCORES,
    imitates="wyf3/llm_related#33",
)
def unshifted(logits, batch):
    """The logits at a position score the token at that position, not the next."""
    return mini.logps(torch.cat([logits[:, 1:], logits[:, -1:]], dim=1), batch)


@specimen(
    "unshifted-and-padding",
    part="logps",
    caught_by="LOGP-VALUE",
    theory=PAPER.but(counted="unshifted-padding"),
    at=SCORES,
)
def unshifted_and_padding(logits, batch):
    """Logits score the token at their own position, from the end of the prompt to the end of the row."""
    after = batch.completion_mask.cumsum(1) > 0
    return mini.logps(torch.cat([logits[:, 1:], logits[:, -1:]], dim=1), _counted(batch, after))


@specimen(
    "shifted-twice",
    part="logps",
    caught_by="LOGP-VALUE",
    theory=PAPER.but(counted="double-shift"),
    at=SCORES,
    imitates="allenai/open-instruct#1549",
)
def shifted_twice(logits, batch):
    """Logits and labels are shifted once by the data and once more by the loss: the token after the next is scored."""
    return mini.logps(logits.roll(1, 1), _counted(batch, batch.completion_mask * (torch.arange(logits.shape[1]) > 1)))


@specimen("shifts-the-mask-in-place", part="logps", caught_by="REF-START", at=STEPS)
def shifts_the_mask_in_place(logits, batch):
    """The mask is shifted in the batch itself: the reference, which reads it next, counts one position too early."""
    found = mini.logps(logits, batch)
    batch.completion_mask.copy_(_earlier(batch.completion_mask))
    return found


# -------------------------------------------------------------------------------------------------- logps: the numbers


def _tokens(logits, batch, score=None, logits_dtype=None):
    """(row, token - 1) of `score(logits, labels)`, zero where nothing is counted."""
    wide = logits[:, :-1].to(logits_dtype or torch.promote_types(logits.dtype, torch.float32))
    labels = batch.input_ids[:, 1:].unsqueeze(-1)
    values = score(wide, labels).squeeze(-1) if score else wide.log_softmax(-1).gather(-1, labels).squeeze(-1)
    return values.masked_fill(batch.completion_mask[:, 1:] == 0, 0.0)


@specimen(
    "mean-for-sum",
    part="logps",
    caught_by="LOGP-VALUE",
    theory=PAPER.but(logps="mean"),
    at=SCORES,
    imitates="linkedin/Liger-Kernel#676",
)
def mean_for_sum(logits, batch):
    """Log-probs are averaged over the completion's tokens."""
    return mini.logps(logits, batch) / batch.completion_mask[:, 1:].sum(1).clamp(min=1)


@specimen(
    "mean-over-padded-length", part="logps", caught_by="LOGP-PADDING", theory=PAPER.but(logps="mean-padded"), at=SCORES
)
def mean_over_padded_length(logits, batch):
    """Log-probs are divided by the padded length of the batch."""
    return mini.logps(logits, batch) / (batch.input_ids.shape[1] - 1)


@specimen(
    "mean-over-the-batchs-tokens",
    part="logps",
    caught_by="LOGP-BATCH-MATES",
    theory=PAPER.but(logps="mean-batch"),
    at=SCORES,
    imitates="modelscope/ms-swift#9925",
)
def mean_over_the_batchs_tokens(logits, batch):
    """Log-probs are divided by the number of completion tokens of the whole batch."""
    return mini.logps(logits, batch) / batch.completion_mask[:, 1:].sum()


@specimen("sum-over-the-batch", part="logps", caught_by="LOGP-BATCH-MATES", at=SCORES)
def sum_over_the_batch(logits, batch):
    """The sum runs over rows as well: every row gets the log-prob of its half of the batch."""
    found = mini.logps(logits, batch)
    halves = found.chunk(2) if len(found) % 2 == 0 else (found,)
    return torch.cat([half.sum().expand(len(half)) for half in halves])


@specimen(
    "raw-logits",
    part="logps",
    caught_by="LOGP-VALUE",
    theory=PAPER.but(normaliser="none"),
    at=SCORES,
    imitates="OpenRLHF/OpenRLHF@243615b2",
)
def raw_logits(logits, batch):
    """The label's logit is taken for its log-prob: nothing normalises it."""
    return _tokens(logits, batch, lambda wide, labels: wide.gather(-1, labels)).sum(1)


@specimen(
    "greatest-logit-for-log-sum", part="logps", caught_by="LOGP-VALUE", theory=PAPER.but(normaliser="max"), at=SCORES
)
def greatest_logit_for_log_sum(logits, batch):
    """The greatest logit is subtracted, not the logarithm of the sum of exponentials."""
    return _tokens(logits, batch, lambda w, labels: w.gather(-1, labels) - w.amax(-1, keepdim=True)).sum(1)


@specimen("probability-for-log", part="logps", caught_by="LOGP-VALUE", theory=PAPER.but(normaliser="prob"), at=SCORES)
def probability_for_log(logits, batch):
    """Probabilities are summed, without the logarithm."""
    return _tokens(logits, batch, lambda wide, labels: wide.softmax(-1).gather(-1, labels)).sum(1)


@specimen("bits-for-nats", part="logps", caught_by="LOGZ-NORMALISER", theory=PAPER.but(normaliser="log2"), at=SCORES)
def bits_for_nats(logits, batch):
    """Logarithms are to base 2."""
    return mini.logps(logits, batch) / 0.6931471805599453


@specimen("negative-log-likelihood", part="logps", caught_by="LOGP-VALUE", at=SCORES)
def negative_log_likelihood(logits, batch):
    """The cross-entropy is taken for the log-prob: the sign is wrong in policy and reference."""
    return -mini.logps(logits, batch)


@specimen("softmax-over-time", part="logps", caught_by="LOGP-VALUE", at=SCORES)
def softmax_over_time(logits, batch):
    """The softmax runs over positions, not over the vocabulary."""
    return _tokens(logits, batch, lambda wide, labels: wide.log_softmax(1).gather(-1, labels)).sum(1)


@specimen("most-probable-token", part="logps", caught_by="LOGP-VALUE", at=SCORES)
def most_probable_token(logits, batch):
    """The log-prob of the most probable token is taken, whatever the label."""
    return _tokens(logits, batch, lambda wide, labels: wide.log_softmax(-1).amax(-1, keepdim=True)).sum(1)


@specimen("temperature-left-on", part="logps", caught_by="LOGP-VALUE", theory=PAPER.but(temperature=2.0), at=SCORES)
def temperature_left_on(logits, batch):
    """Logits are divided by the sampling temperature, here 2."""
    return mini.logps(logits / 2, batch)


@specimen(
    "clamps-token-log-probs", part="logps", caught_by="LOGP-EXTREME", theory=PAPER.but(token_floor=-3.0), at=SCORES
)
def clamps_token_log_probs(logits, batch):
    """Token log-probs are clamped at -3."""
    return _tokens(logits, batch, lambda w, labels: w.log_softmax(-1).gather(-1, labels).clamp(min=-3.0)).sum(1)


@specimen("epsilon-in-the-logarithm", part="logps", caught_by="LOGP-EXTREME", at=SCORES)
def epsilon_in_the_logarithm(logits, batch):
    """log(softmax + 1e-6): improbable tokens all cost the same."""
    return _tokens(logits, batch, lambda w, labels: (w.softmax(-1).gather(-1, labels) + 1e-6).log()).sum(1)


@specimen("log-of-softmax", part="logps", caught_by="LOGP-EXTREME", at=SCORES)
def log_of_softmax(logits, batch):
    """log(softmax): minus infinity where the probability underflows."""
    return _tokens(logits, batch, lambda w, labels: w.softmax(-1).gather(-1, labels).log()).sum(1)


@specimen(
    "log-probs-in-bfloat16",
    part="logps",
    caught_by="LOGP-VALUE",
    at=SCORES,
    imitates="huggingface/trl#7063",
)
def log_probs_in_bfloat16(logits, batch):
    """Softmax and sum are computed in bfloat16: an error of nats at ordinary lengths."""
    return _tokens(logits, batch, logits_dtype=torch.bfloat16).sum(1).to(logits.dtype)
