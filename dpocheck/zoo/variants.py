"""Which trainers are right though they are written differently?  Every check must pass each of them.

Here they run the model or score its logits otherwise; the rest is in `choices`.
"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.zoo.registry import functional, mini, torch, variant


def _but(**parts):
    return replace(mini.MINIATURE, **parts)


# ------------------------------------------------------------------------------------------------------------- forward


def _rows(batch, index):
    names = ("input_ids", "attention_mask", "completion_mask")
    return replace(batch, **{name: getattr(batch, name)[index] for name in names})


@variant("two-forwards")
def two_forwards():
    """Chosen and rejected rows are run one after the other."""

    def forward(model, batch):
        middle = len(batch.input_ids) // 2
        halves = [half for half in (slice(None, middle), slice(middle, None)) if len(batch.input_ids[half])]
        return torch.cat([mini.forward(model, _rows(batch, half)) for half in halves])

    return _but(forward=forward)


@variant("interleaved-inside")
def interleaved_inside():
    """The model sees chosen and rejected rows in turn; the logits are put back in order."""

    def forward(model, batch):
        rows = len(batch.input_ids)
        order = torch.arange(rows) if rows % 2 else torch.arange(rows).view(2, -1).T.reshape(-1)
        return mini.forward(model, _rows(batch, order))[order.argsort()]

    return _but(forward=forward)


def _placed(batch, pieces):
    """(row, token, vocabulary) logits from each row's own (length, vocabulary) ones; zero at padding."""
    out = pieces[0].new_zeros(*batch.input_ids.shape, pieces[0].shape[-1])
    for row, piece in enumerate(pieces):
        out = out.index_put((torch.tensor(row), batch.attention_mask[row].nonzero()[:, 0]), piece)
    return out


@variant("one-row-at-a-time")
def one_row_at_a_time():
    """Each row is run alone, without padding."""

    def forward(model, batch):
        pieces = []
        for row in range(len(batch.input_ids)):
            real = batch.attention_mask[row].bool()
            alone = replace(_rows(batch, slice(row, row + 1)), attention_mask=torch.ones(1, int(real.sum())).long())
            pieces.append(mini.forward(model, replace(alone, input_ids=batch.input_ids[row][real].unsqueeze(0)))[0])
        return _placed(batch, pieces)

    return _but(forward=forward)


def _attending(model, ids, positions, seen):
    """(token, vocabulary) logits of one row whose token t attends to the tokens of `seen[t]`."""
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    training = model.training
    model.eval()
    try:
        out = model(
            input_ids=ids.unsqueeze(0),
            attention_mask=mask[None, None],
            position_ids=positions.unsqueeze(0),
            use_cache=False,
        )
    finally:
        model.train(training)
    return out.logits[0]


def _causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


@variant("packed-with-borders")
def packed_with_borders():
    """All rows are packed into one, positions restart, and no row attends to another."""

    def forward(model, batch):
        real = [mask.bool() for mask in batch.attention_mask]
        rows = [ids[mask] for ids, mask in zip(batch.input_ids, real, strict=True)]
        lengths = [len(row) for row in rows]
        seen = torch.block_diag(*[_causal(length) for length in lengths]).bool()
        positions = torch.cat([torch.arange(length) for length in lengths])
        return _placed(batch, _attending(model, torch.cat(rows), positions, seen).split(lengths))

    return _but(forward=forward)


@variant("shared-prompt")
def shared_prompt():
    """The prompt is run once for both completions, which do not see each other."""

    def pair_logits(model, prompt, chosen, rejected):
        p, w, l = len(prompt), len(chosen), len(rejected)
        seen = _causal(p + w + l)
        seen[p + w :, p : p + w] = False
        positions = torch.cat([torch.arange(p + w), torch.arange(p, p + l)])
        logits = _attending(model, torch.cat([prompt, chosen, rejected]), positions, seen)
        return logits[: p + w], torch.cat([logits[:p], logits[p + w :]])

    def forward(model, batch):
        pairs = len(batch.input_ids) // 2
        kept = [mask.bool() for mask in batch.attention_mask]
        rows = [ids[mask] for ids, mask in zip(batch.input_ids, kept, strict=True)]
        starts = [len(row) - int(mask.sum()) for row, mask in zip(rows, batch.completion_mask, strict=True)]
        prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
        if len(rows) % 2 or not all(torch.equal(prompts[i], prompts[i + pairs]) for i in range(pairs)):
            return mini.forward(model, batch)
        both = [
            pair_logits(model, prompts[i], rows[i][starts[i] :], rows[i + pairs][starts[i] :]) for i in range(pairs)
        ]
        return _placed(batch, [chosen for chosen, _ in both] + [rejected for _, rejected in both])

    return _but(forward=forward)


@variant("activations-recomputed")
def activations_recomputed():
    """The forward is run again in the backward, as gradient checkpointing does."""

    def forward(model, batch):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(mini.forward, model, batch, use_reentrant=False)

    return _but(forward=forward)


@variant("training-mode-without-dropout")
def training_mode_without_dropout():
    """The model stays in training mode, and its dropout rates are set to zero."""

    def forward(model, batch):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        ids, mask = batch.input_ids, batch.attention_mask
        return model.train()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits

    return _but(forward=forward)


# ------------------------------------------------------------------------------------------------------------- collate


@variant("left-padded")
def left_padded():
    """Rows are padded on the left."""

    def collate(examples, pad):
        batch = mini.collate(examples, pad)
        shifts = (batch.input_ids.shape[1] - batch.attention_mask.sum(1)).tolist()
        names = ("input_ids", "attention_mask", "completion_mask")
        rolled = {n: [row.roll(s) for row, s in zip(getattr(batch, n), shifts, strict=True)] for n in names}
        return replace(batch, **{name: torch.stack(rows) for name, rows in rolled.items()})

    return _but(collate=collate)


@variant("padded-wider")
def padded_wider():
    """Batches are padded to a multiple of eight."""

    def collate(examples, pad):
        batch = mini.collate(examples, pad)
        more = -batch.input_ids.shape[1] % 8
        fill = {"input_ids": pad, "attention_mask": 0, "completion_mask": 0}
        wider = {n: torch.nn.functional.pad(getattr(batch, n), (0, more), value=v) for n, v in fill.items()}
        return replace(batch, **wider)

    return _but(collate=collate)


# --------------------------------------------------------------------------------------------------------------- logps


@variant("cross-entropy")
def cross_entropy():
    """Log-probs are the negative cross-entropy of labels whose ignored positions hold -100."""

    def logps(logits, batch):
        labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)[:, 1:]
        wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        return -functional.cross_entropy(wide.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)

    return _but(logps=logps)


@variant("vocabulary-in-chunks")
def vocabulary_in_chunks():
    """The normaliser is added up over chunks of the vocabulary, and the label's logit subtracted from it."""

    def logps(logits, batch):
        wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        normaliser = torch.stack([chunk.logsumexp(-1) for chunk in wide.split(24, dim=-1)]).logsumexp(0)
        scores = wide.gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1) - normaliser
        return torch.where(batch.completion_mask[:, 1:].bool(), scores, 0.0).sum(1)

    return _but(logps=logps)


@variant("in-float64")
def in_float64():
    """Softmax, sums and loss are computed in float64."""
    return _but(logps=lambda logits, batch: mini.logps(logits.double(), batch))


@variant("summed-from-the-end")
def summed_from_the_end():
    """Tokens and pairs are added in the opposite order, one after the other."""

    def logps(logits, batch):
        counted = batch.completion_mask[:, 1:].bool()
        wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        tokens = wide.log_softmax(-1).gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        total = tokens.new_zeros(len(tokens))
        for position in reversed(range(tokens.shape[1])):
            total = total + torch.where(counted[:, position], tokens[:, position], 0.0)
        return total

    def reduce(losses, pairs, ranks):
        total = losses.new_zeros(())
        for loss in reversed(losses.unbind()):
            total = total + loss * ranks / pairs
        return total

    return _but(logps=logps, reduce=reduce)
