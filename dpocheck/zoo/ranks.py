"""How does a run in several processes go wrong?  Broken parts: share, reduce, accumulate, exchange, gather, reference.

Alone, each of them is the honest miniature: `mini.here()` says which of how many processes this one is.
"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import mini, specimen, torch

# -------------------------------------------------------------------------------------------------- who takes which row


@specimen("every-rank-sees-the-same-rows", part="share", caught_by="RANKS-SPLIT", imitates="ContextualAI/HALOs@c062b56")
def every_rank_sees_the_same_rows(rows, size):
    """The rows are not split between ranks: each takes those of the first."""
    return rows[:size]


@specimen("ranks-filled-up", part="share", caught_by="RANKS-PAIRS", theory=PAPER.but(ranks_tail="repeated"))
def ranks_filled_up(rows, size):
    """The last ranks of a short batch are filled up with rows from its start, which count twice: what
    torch.utils.data.DistributedSampler does, here without a word in the documentation."""
    _, ranks = mini.here()
    filled = [rows[i % len(rows)] for i in range(size * ranks)] if ranks > 1 else rows
    return mini.share(filled, size)


@specimen("short-rank-left-out", part="share", caught_by="RANKS-PAIRS")
def short_rank_left_out(rows, size):
    """A rank that cannot fill its batch takes none: the last pairs of an epoch are never seen."""
    own = mini.share(rows, size)
    return own if len(own) == size or mini.here()[1] == 1 else []


# --------------------------------------------------------------------------------------------------------- the gradient


@specimen("ranks-added", part="reduce", caught_by="RANKS-SPLIT")
def ranks_added(losses, pairs, ranks):
    """Each rank divides by its own pairs, and the ranks' gradients are added, not averaged."""
    return mini.reduce(losses, pairs, ranks) * ranks


@specimen("mean-of-rank-means", part="accumulate", caught_by="RANKS-PAIRS", imitates="allenai/open-instruct")
def mean_of_rank_means(trainer, policy, window, score, recipe):
    """Each rank takes the mean over its own pairs, and the mean of these is taken: pairs of a short rank weigh more."""
    own, seen = sum(batch.pairs for batch in window), []
    for batch in window:
        scored = score(batch)
        trainer.reduce(scored.losses, own * recipe.world_size, recipe.world_size).backward()
        seen.append(scored.detached())
    return seen


@specimen("ranks-not-synchronised", part="exchange", caught_by="RANKS-SPLIT")
def ranks_not_synchronised(parameters):
    """Gradients are not exchanged: each rank learns from its own share."""


@specimen("gradient-reaches-one-rank", part="exchange", caught_by="RANKS-WEIGHTS")
def gradient_reaches_one_rank(parameters):
    """Gradients are reduced to the first rank instead of to all: it trains rightly, the others on their own share."""
    own = [None if p.grad is None else p.grad.clone() for p in parameters]
    mini.exchange(parameters)
    if mini.here()[0]:
        for parameter, grad in zip(parameters, own, strict=True):
            parameter.grad = grad


# ------------------------------------------------------------------------------------------------------- what is logged


@specimen("metrics-of-the-first-rank", part="gather", caught_by="RANKS-METRICS", imitates="huggingface/trl#2468")
def metrics_of_the_first_rank(seen):
    """What is logged is the first rank's own share."""
    return list(seen)


@specimen("evaluation-counts-fillers", part="evaluate", caught_by="RANKS-EVALUATION", imitates="huggingface/trl#7045")
def evaluation_counts_fillers(trainer, policy, score, batches):
    """In evaluation a short rank is filled up with copies of its last pair, and the metrics count the copies."""
    with torch.no_grad():
        seen = [score(batch) for batch in batches]
    own, (_, ranks) = sum(len(scored.losses) for scored in seen), mini.here()
    missing = max(0, -(-mini.added(own) // ranks) - own)
    last = [mini.Scored(*(value[-1:] for value in vars(seen[-1]).values()))] * missing if seen else []
    return trainer.metrics(trainer.gather([*seen, *last]))


# -------------------------------------------------------------------------------------------------------- the reference


@specimen(
    "reference-cached-by-rank", part="reference", caught_by="RANKS-PRECOMPUTED", imitates="allenai/open-instruct#1144"
)
def reference_cached_by_rank(trainer, policy, given, recipe, examples, folder):
    """Each rank precomputes every second row, and the ranks' numbers are put one after the other: a row is given
    another row's reference."""
    honest = mini.reference(trainer, policy, given, recipe, examples, folder)
    _, ranks = mini.here()
    if not recipe.precompute_reference or ranks == 1:
        return honest
    order = [example.row for rank in range(ranks) for example in examples[rank::ranks]]
    taken = {example.row: row for example, row in zip(examples, order, strict=True)}
    return lambda batch: honest(replace(batch, rows=tuple(taken[row] for row in batch.rows)))


@specimen("reference-trained-on-other-ranks", part="reference", caught_by="RANKS-REFERENCE")
def reference_trained_on_other_ranks(trainer, policy, given, recipe, examples, folder):
    """On all ranks but the first, the reference is moved by what the policy's weights are: it is not frozen there."""
    honest = mini.reference(trainer, policy, given, recipe, examples, folder)
    if given is None or not mini.here()[0]:
        return honest

    def scorer(batch):
        found = honest(batch)
        with torch.no_grad():
            for mine, theirs in zip(given.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
        return found

    return scorer
