"""How do token rows go wrong on their way to logits?  Broken parts: collate, forward."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import SCORES, STEPS, mini, specimen, torch

# ------------------------------------------------------------------------------------------------------------- forward


@specimen("attention-mask-not-passed", part="forward", caught_by="GRAD-ATTENTION", at=("sequence_logps", "step"))
def attention_mask_not_passed(model, batch):
    """The attention mask is not passed on: with padding on the left, pads are attended."""
    return mini.forward(model, replace(batch, attention_mask=torch.ones_like(batch.attention_mask)))


@specimen(
    "token-zero-is-not-attended", part="forward", caught_by="GRAD-ATTENTION", at=SCORES, imitates="huggingface/trl#1284"
)
def token_zero_is_not_attended(model, batch):
    """The attention mask is made from ids that are not 0, the default for a pad token: a real token 0 is not seen."""
    mask = batch.attention_mask * (batch.input_ids != 0)
    return mini.forward(model, replace(batch, attention_mask=mask))


@specimen("positions-all-zero", part="forward", caught_by="GRAD-ATTENTION", at=SCORES)
def positions_all_zero(model, batch):
    """Position ids are zero everywhere: the order of the context is lost."""
    positions = torch.zeros_like(batch.input_ids)
    return model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits


@specimen(
    "positions-count-backwards", part="forward", caught_by="GRAD-ATTENTION", at=SCORES,
    theory=PAPER.but(attention="backwards"),
)  # fmt: skip
def positions_count_backwards(model, batch):
    """Position ids fall from the first real token to the last: each distance has the opposite sign."""
    positions = (batch.attention_mask.sum(1, keepdim=True) - batch.attention_mask.cumsum(1)).clamp(min=0)
    ids, mask = batch.input_ids, batch.attention_mask
    return model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def _in_one_row(model, batch, groups):
    """Each group of rows is laid out in one causal row, and its logits are put back where they belong."""
    ids, attention = batch.input_ids, batch.attention_mask.bool()
    out = None
    for group in groups:
        row = torch.cat([ids[index][attention[index]] for index in group]).unsqueeze(0)
        whole = torch.ones_like(row)
        logits = mini.forward(model, replace(batch, input_ids=row, attention_mask=whole, completion_mask=whole))[0]
        if out is None:
            out = logits.new_zeros(*ids.shape, logits.shape[-1])
        for index, piece in zip(group, logits.split([int(attention[i].sum()) for i in group]), strict=True):
            out = out.index_put((torch.tensor(index), attention[index].nonzero()[:, 0]), piece)
    return out


@specimen(
    "rejected-attends-to-chosen",
    part="forward",
    caught_by="GRAD-ATTENTION",
    at=STEPS,
    imitates="hiyouga/LLaMA-Factory#10544",
)
def rejected_attends_to_chosen(model, batch):
    """Chosen and rejected share one row, and nothing keeps the second from attending to the first."""
    pairs = len(batch.input_ids) // 2
    return _in_one_row(model, batch, [(pair, pair + pairs) for pair in range(pairs)])


@specimen(
    "packed-rows-attend-to-each-other",
    part="forward",
    caught_by="GRAD-ATTENTION",
    at=SCORES,
    imitates="OpenRLHF/OpenRLHF@15517919",
)
def packed_rows_attend_to_each_other(model, batch):
    """All rows are packed into one, without borders between them."""
    return _in_one_row(model, batch, [tuple(range(len(batch.input_ids)))])


@specimen("chosen-attention-for-both", part="forward", caught_by="GRAD-ATTENTION", at=STEPS)
def chosen_attention_for_both(model, batch):
    """Rejected rows are run under the attention mask of their chosen rows."""
    mask = torch.cat([batch.attention_mask[: len(batch.input_ids) // 2]] * 2)
    return mini.forward(model, replace(batch, attention_mask=mask))


@specimen("forgets-the-prompt", part="forward", caught_by="LOGP-PROMPT-MATTERS", at=SCORES)
def forgets_the_prompt(model, batch):
    """The model is shown the completion alone: every prompt token is replaced by one and the same."""
    ids = torch.where(batch.completion_mask == 1, batch.input_ids, batch.input_ids.new_tensor(1))
    return mini.forward(model, replace(batch, input_ids=ids))


@specimen("embeddings-frozen", part="forward", caught_by="STEP-ALL-PARAMETERS", at=SCORES)
def embeddings_frozen(model, batch):
    """The embeddings are looked up outside the graph: they never learn."""
    mask = batch.attention_mask
    embedded = model.get_input_embeddings()(batch.input_ids).detach()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model.eval()(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False).logits


@specimen(
    "rejected-without-graph", part="forward", caught_by="GRAD-IDENTITY", theory=PAPER.but(detached="rejected"), at=STEPS
)
def rejected_without_graph(model, batch):
    """The rejected half runs under no_grad: the gradient never lowers it."""
    logits = mini.forward(model, batch)
    half = len(logits) // 2
    return torch.cat([logits[:half], logits[half:].detach()])


@specimen("policy-dropout-on", part="forward", caught_by="POLICY-NO-DROPOUT", at=STEPS, imitates="ContextualAI/HALOs")
def policy_dropout_on(model, batch):
    """Dropout stays on in the policy and is off in the reference."""
    if not torch.is_grad_enabled():
        return mini.forward(model, batch)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    ids, mask = batch.input_ids, batch.attention_mask
    return model.train()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


# ------------------------------------------------------------------------------------------------------------- collate


@specimen("pads-left-masks-right", part="collate", caught_by="RUN-GRADIENT", imitates="OpenRLHF/OpenRLHF@a32a7322")
def pads_left_masks_right(examples, pad):
    """Rows are padded on the left and the completion mask is laid out for padding on the right."""
    batch = mini.collate(examples, pad)
    lengths = batch.attention_mask.sum(1).tolist()
    width = batch.input_ids.shape[1]

    def left(rows):
        return torch.stack([row.roll(width - length) for row, length in zip(rows, lengths, strict=True)])

    return replace(batch, input_ids=left(batch.input_ids), attention_mask=left(batch.attention_mask))


@specimen("label-slice-too-short", part="collate", caught_by="RUN-GRADIENT", imitates="hiyouga/LLaMA-Factory@692b132d")
def label_slice_too_short(examples, pad):
    """Labels are cut out as [prompt length : completion length]: the tail of the completion is never scored."""
    batch = mini.collate(examples, pad)
    sides = [example.chosen for example in examples] + [example.rejected for example in examples]
    ends = torch.tensor([len(side.ids) - side.start for side in sides]).unsqueeze(1)
    scored = batch.completion_mask * (torch.arange(batch.input_ids.shape[1]) < ends)
    return replace(batch, completion_mask=scored)


@specimen("counts-padding-by-side", part="collate", caught_by="RUN-GRADIENT",
          theory=PAPER.but(counted="padding-by-side"))  # fmt: skip
def counts_padding_by_side(examples, pad):
    """Chosen and rejected rows are each padded to their own longest, and that padding is scored."""
    batch = mini.collate(examples, pad)
    lengths = batch.attention_mask.sum(1)
    widths = torch.cat([half.max().expand_as(half) for half in lengths.chunk(2)])
    places = torch.arange(batch.input_ids.shape[1])
    padding = (places >= lengths[:, None]) & (places < widths[:, None])
    return replace(batch, completion_mask=batch.completion_mask | padding.long())


@specimen("interleaved-but-split-in-halves", part="collate", caught_by="RUN-GRADIENT", imitates="NVIDIA-NeMo/RL#730")
def interleaved_but_split_in_halves(examples, pad):
    """Rows are laid out chosen, rejected, chosen, rejected; the loss takes the first half for chosen."""
    batch = mini.collate(examples, pad)
    order = torch.arange(2 * len(examples)).view(2, -1).T.reshape(-1)
    parts = {name: getattr(batch, name)[order] for name in ("input_ids", "attention_mask", "completion_mask")}
    return replace(batch, **parts)


@specimen("rejected-cut-to-the-chosen-width", part="collate", caught_by="RUN-GRADIENT")
def rejected_cut_to_the_chosen_width(examples, pad):
    """The batch is as wide as its longest chosen row: longer rejected rows lose their end."""
    batch = mini.collate(examples, pad)
    width = max(len(example.chosen.ids) for example in examples)
    parts = {name: getattr(batch, name)[:, :width] for name in ("input_ids", "attention_mask", "completion_mask")}
    return replace(batch, **parts)
