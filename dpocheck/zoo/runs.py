"""How does a run go wrong that is kept, resumed or read from a cache?  Broken parts: checkpoint, resume, reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpocheck.zoo.registry import mini, specimen, torch

# ---------------------------------------------------------------------------------------------- resume and checkpoints


@specimen("moments-lost", part="resume", caught_by="RUN-RESUME")
def moments_lost(folder, policy, optimizer):
    """The optimizer's averages are not restored."""
    progress = mini.resume(folder, policy, optimizer)
    optimizer.state.clear()
    return progress


@specimen("schedule-restarts", part="resume", caught_by="RUN-RESUME")
def schedule_restarts(folder, policy, optimizer):
    """A resumed run starts its schedule again."""
    return replace(mini.resume(folder, policy, optimizer), schedule=0)


@specimen("data-restarts", part="resume", caught_by="RUN-RESUME")
def data_restarts(folder, policy, optimizer):
    """A resumed run starts with the first rows again."""
    return replace(mini.resume(folder, policy, optimizer), data=0)


@specimen("resume-skips-a-batch", part="resume", caught_by="RUN-RESUME", imitates="OpenRLHF/OpenRLHF#1350")
def resume_skips_a_batch(folder, policy, optimizer):
    """A resumed run leaves out the batch that was next."""
    progress = mini.resume(folder, policy, optimizer)
    return replace(progress, data=progress.data + 1)


@specimen("steps-counted-anew", part="resume", caught_by="RUN-RESUME")
def steps_counted_anew(folder, policy, optimizer):
    """A resumed run takes as many steps as a new one."""
    return replace(mini.resume(folder, policy, optimizer), step=0)


@specimen("weights-not-restored", part="resume", caught_by="RUN-RESUME")
def weights_not_restored(folder, policy, optimizer):
    """A resumed run restores everything but the weights."""
    kept = [parameter.detach().clone() for parameter in policy.parameters()]
    progress = mini.resume(folder, policy, optimizer)
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), kept, strict=True):
            parameter.copy_(value)
    return progress


@specimen(
    "resumed-policy-is-the-reference", part="reference", caught_by="RUN-RESUME", imitates="OpenRLHF/OpenRLHF@8721ed44"
)
def resumed_policy_is_the_reference(trainer, policy, given, recipe, examples, folder):
    """A resumed run takes the checkpoint of the policy for the reference: its first loss is log 2."""
    if recipe.resume_from is not None and not hasattr(policy, "disable_adapter"):
        path = Path(folder) / f"checkpoint-{recipe.resume_from}"
        given = type(policy).from_pretrained(path).to(policy.dtype)
    return mini.reference(trainer, policy, given, recipe, examples, folder)


def _saved_as(policy, change, save):
    """Call `save` while every parameter holds `change(parameter)`."""
    kept = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(change(parameter))
    save()
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), kept, strict=True):
            parameter.copy_(value)


@specimen("checkpoint-in-bfloat16", part="checkpoint", caught_by="RUN-SAVED")
def checkpoint_in_bfloat16(folder, policy, optimizer, progress):
    """Checkpoints are stored in bfloat16: what is loaded is not what was trained."""
    _saved_as(policy, lambda p: p.to(torch.bfloat16), lambda: mini.checkpoint(folder, policy, optimizer, progress))


@specimen("checkpoint-without-the-head", part="checkpoint", caught_by="RUN-SAVED")
def checkpoint_without_the_head(folder, policy, optimizer, progress):
    """The head is taken for tied to the embeddings, and saved as these."""
    head, embeddings = policy.get_output_embeddings().weight, policy.get_input_embeddings().weight
    if head.shape != embeddings.shape:
        return mini.checkpoint(folder, policy, optimizer, progress)
    return _saved_as(
        policy,
        lambda p: embeddings.detach().clone() if p is head else p,
        lambda: mini.checkpoint(folder, policy, optimizer, progress),
    )


@specimen("checkpoint-kept-from-before", part="checkpoint", caught_by="RUN-SAVED")
def checkpoint_kept_from_before(folder, policy, optimizer, progress):
    """Only the first checkpoint of a run is written; later ones are copies of it under another name."""
    import shutil

    earlier = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not earlier or progress.step == 1:
        return mini.checkpoint(folder, policy, optimizer, progress)
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(earlier[0], folder)


# ------------------------------------------------------------------------------------------------ precomputed reference


def _table(trainer, policy, given, recipe, examples, folder):
    """The honest precomputed log-probs, {row: (chosen, rejected)}."""
    honest = mini.reference(trainer, policy, given, replace(recipe, precompute_reference=False), examples, folder)
    table = {}
    for chunk in mini.batches_of(examples, recipe.batch):
        both = honest(trainer.collate(chunk, 0)).view(2, -1).T
        table |= {example.row: pair for example, pair in zip(chunk, both, strict=True)}
    return table


def _cached(id, look_up, summary, imitates=None, theory=None):
    """Declare a specimen: `look_up(table, batch)` gives (2, pair) where precomputed log-probs are asked for."""

    def part(trainer, policy, given, recipe, examples, folder):
        if not recipe.precompute_reference:
            return mini.reference(trainer, policy, given, recipe, examples, folder)
        table = _table(trainer, policy, given, recipe, examples, folder)
        return lambda batch: look_up(table, batch).reshape(-1)

    specimen(id, part="reference", caught_by="REF-PRECOMPUTED", theory=theory, imitates=imitates, summary=summary)(part)


def _rows(table, rows):
    return torch.stack([table[row] for row in rows], dim=1)


_cached(
    "cache-by-position",
    lambda table, batch: _rows(table, sorted(table)[: batch.pairs]),
    "Precomputed log-probs are looked up by the position in the batch, not by row.",
    "allenai/open-instruct#1144",
)
_cached(
    "cache-re-sorted",
    lambda table, batch: _rows(table, sorted(batch.rows, key=lambda row: -row)),
    "Precomputed log-probs are re-sorted within the batch.",
)
_cached(
    "cache-columns-swapped",
    lambda table, batch: _rows(table, batch.rows).flip(0),
    "The cache's columns of chosen and rejected are exchanged.",
)
_cached(
    "cache-in-bfloat16",
    lambda table, batch: _rows(table, batch.rows).to(torch.bfloat16).to(next(iter(table.values())).dtype),
    "Precomputed log-probs are stored in bfloat16.",
)
_cached(
    "cache-averages",
    lambda table, batch: _rows(table, batch.rows) / batch.completion_mask[:, 1:].sum(1).view(2, -1),
    "Precomputed log-probs are divided by the completions' lengths, the policy's are not.",
    "huggingface/trl#7084",
)


@specimen("precomputed-columns-dropped", part="reference", caught_by="REF-PRECOMPUTED", imitates="huggingface/trl#2431")
def precomputed_columns_dropped(trainer, policy, given, recipe, examples, folder):
    """Precomputed columns are dropped by the collator; the policy stands in for the reference."""
    if not recipe.precompute_reference:
        return mini.reference(trainer, policy, given, recipe, examples, folder)

    def scorer(batch):
        with torch.no_grad():
            return trainer.logps(trainer.forward(policy, batch), batch)

    return scorer


@specimen("cache-filled-on-the-way", part="reference", caught_by="REF-PRECOMPUTED")
def cache_filled_on_the_way(trainer, policy, given, recipe, examples, folder):
    """Without a given reference, a row's log-probs are computed when it is first seen, by the policy of that moment."""
    if not recipe.precompute_reference or given is not None:
        return mini.reference(trainer, policy, given, recipe, examples, folder)
    table = {}

    def scorer(batch):
        if any(row not in table for row in batch.rows):
            with torch.no_grad():
                both = trainer.logps(trainer.forward(policy, batch), batch).view(2, -1).T
            table.update({row: pair for row, pair in zip(batch.rows, both, strict=True) if row not in table})
        return _rows(table, batch.rows).reshape(-1)

    return scorer


def _keyed(id, key, summary, imitates=None):
    """Declare a specimen whose cache file is named by `key(examples)` alone."""

    def part(trainer, policy, given, recipe, examples, folder):
        if not recipe.precompute_reference:
            return mini.reference(trainer, policy, given, recipe, examples, folder)
        from safetensors.torch import load_file, save_file

        path = Path(folder) / f"cache-{key(examples)}.safetensors"
        if not path.exists():
            fresh = _table(trainer, policy, given, recipe, examples, folder)
            save_file({str(row): pair.contiguous() for row, pair in fresh.items()}, path)
        table = {int(row): pair for row, pair in load_file(path).items()}
        zero = torch.zeros(2)
        return lambda batch: torch.stack([table.get(row, zero) for row in batch.rows], dim=1).reshape(-1)

    specimen(id, part="reference", caught_by="REF-CACHE-FRESH", imitates=imitates, summary=summary)(part)


def _digest(value):
    import hashlib

    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


_keyed(
    "cache-forgets-the-weights",
    lambda examples: _digest([(e.chosen.ids, e.rejected.ids) for e in examples]),
    "The cache's name leaves out the reference's weights: another reference's numbers are used.",
    "allenai/open-instruct#1451",
)
_keyed(
    "cache-forgets-the-rows",
    lambda examples: "all",
    "The cache has one name, whatever the rows: another dataset's numbers are used.",
    "huggingface/trl#1252",
)
