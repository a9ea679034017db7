"""How does the gradient of a step go wrong?  Broken parts: reduce, accumulate, clip."""

from __future__ import annotations

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import STEPS, mini, specimen, torch

# -------------------------------------------------------------------------------------------------------------- reduce


def _reduces(id, change, summary, caught_by="GRAD-IDENTITY", theory=None, imitates=None, at=STEPS):
    """Declare a specimen: `change(losses)`, a scalar, is the batch's mean; batches are weighted by their pairs."""

    def part(losses, pairs, ranks):
        return change(losses) * len(losses) / pairs

    specimen(id, part="reduce", caught_by=caught_by, theory=theory, imitates=imitates, at=at, summary=summary)(part)


_reduces(
    "summed-over-the-micro-batch",
    lambda losses: losses.sum(),
    "Losses are summed inside a micro-batch and averaged over micro-batches; the logged loss is the mean.",
    "ACCUM-EVEN",
    PAPER.but(reduction="sum"),
    "ContextualAI/HALOs@8e5c7ba",
)
_reduces(
    "divided-by-rows",
    lambda losses: losses.mean() / 2,
    "The sum is divided by the number of rows, two for each pair.",
    theory=PAPER.but(reduction="rows"),
)
_reduces(
    "divided-by-one-more",
    lambda losses: losses.sum() / (len(losses) + 1),
    "The sum is divided by one pair too many.",
    theory=PAPER.but(reduction="plus-one"),
)
_reduces(
    "first-pair-only",
    lambda losses: losses[0],
    "Only the first pair of a batch counts.",
    theory=PAPER.but(reduction="first"),
    caught_by="ONE-TRAINER",
)
_reduces(
    "last-pair-dropped",
    lambda losses: losses[:-1].sum() / max(len(losses) - 1, 1),
    "The last pair of a batch does not count.",
    theory=PAPER.but(reduction="no-last"),
    caught_by="STEP-PERMUTATION",
)
_reduces(
    "greatest-loss-only",
    lambda losses: losses.max(),
    "The greatest loss of a batch stands for all.",
    theory=PAPER.but(reduction="max"),
)
_reduces("median-loss", lambda losses: losses.median(), "The median loss of a batch stands for all.")


# ---------------------------------------------------------------------------------------------------------- accumulate


def _window(trainer, policy, window, score, recipe, weigh, before=lambda index: None, after=lambda index: None):
    """Backward of `weigh(losses, batch)`, a scalar, for each micro-batch of a window."""
    seen = []
    for index, batch in enumerate(window):
        before(index)
        scored = score(batch)
        weigh(scored.losses, batch).backward()
        after(index)
        seen.append(scored.detached())
    return seen


@specimen(
    "accumulation-not-divided",
    part="accumulate",
    caught_by="ACCUM-EVEN",
    theory=PAPER.but(accumulation="sum"),
    imitates="huggingface/trl#2615",
)
def accumulation_not_divided(trainer, policy, window, score, recipe):
    """The mean loss of each micro-batch is not divided by their number: the gradient is that many times too large."""
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, batch.pairs, recipe.world_size),
    )


@specimen(
    "accumulation-divided-twice",
    part="accumulate",
    caught_by="ACCUM-EVEN",
    theory=PAPER.but(accumulation="twice"),
    imitates="hiyouga/LLaMA-Factory#5747",
)
def accumulation_divided_twice(trainer, policy, window, score, recipe):
    """The loss is divided by the number of micro-batches by the trainer and by its host."""
    pairs = sum(batch.pairs for batch in window)
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, pairs, recipe.world_size) / len(window),
    )


@specimen(
    "last-window-divided-as-if-full",
    part="accumulate",
    caught_by="ACCUM-LAST-WINDOW",
    theory=PAPER.but(incomplete_window="full-divisor"),
    imitates="huggingface/transformers#38837",
)
def last_window_divided_as_if_full(trainer, policy, window, score, recipe):
    """The loss of a micro-batch is divided by the accumulation steps asked for, not by those of its window."""
    pairs = sum(batch.pairs for batch in window)
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, pairs, recipe.world_size) * len(window) / recipe.accumulation,
    )


@specimen(
    "micro-batches-weigh-the-same",
    part="accumulate",
    caught_by="ACCUM-UNEVEN",
    imitates="modelscope/ms-swift#10144",
)
def micro_batches_weigh_the_same(trainer, policy, window, score, recipe):
    """Unequal micro-batches weigh the same, though the documentation promises that every pair does."""
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, batch.pairs * len(window), recipe.world_size),
    )


@specimen(
    "micro-batches-weigh-by-tokens", part="accumulate", caught_by="ACCUM-TOKENS", imitates="hiyouga/LLaMA-Factory#10544"
)
def micro_batches_weigh_by_tokens(trainer, policy, window, score, recipe):
    """Micro-batches are weighted by their completion tokens: pairs count by their length."""
    tokens = sum(int(batch.completion_mask.sum()) for batch in window)
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: (
            trainer.reduce(losses, batch.pairs, recipe.world_size) * int(batch.completion_mask.sum()) / tokens
        ),
    )


@specimen(
    "gradient-cleared-in-the-window", part="accumulate", caught_by="ACCUM-EVEN", theory=PAPER.but(accumulation="last")
)
def gradient_cleared_in_the_window(trainer, policy, window, score, recipe):
    """The gradient is cleared before each micro-batch: only the last one counts."""
    pairs = sum(batch.pairs for batch in window)
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, pairs, recipe.world_size),
        before=lambda index: policy.zero_grad(),
    )


@specimen(
    "steps-at-every-micro-batch", part="accumulate", caught_by="ACCUM-EVEN"
)
def steps_at_every_micro_batch(trainer, policy, window, score, recipe):
    """An optimizer step is taken after every micro-batch."""

    def after(index):
        if index == len(window) - 1:
            return
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.grad is not None:
                    parameter -= recipe.learning_rate * parameter.grad
        policy.zero_grad()

    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, batch.pairs, recipe.world_size),
        after=after,
    )


@specimen("clips-every-micro-batch", part="accumulate", caught_by="CLIP-NORM", theory=PAPER.but(clip="micro"))
def clips_every_micro_batch(trainer, policy, window, score, recipe):
    """The gradient accumulated so far is clipped after every micro-batch."""
    pairs = sum(batch.pairs for batch in window)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return _window(
        trainer,
        policy,
        window,
        score,
        recipe,
        lambda losses, batch: trainer.reduce(losses, pairs, recipe.world_size),
        after=lambda index: trainer.clip(parameters, recipe.clip_norm),
    )


# ---------------------------------------------------------------------------------------------------------------- clip


@specimen("clipping-ignored", part="clip", caught_by="CLIP-NORM", theory=PAPER.but(clip="ignored"))
def clipping_ignored(parameters, limit):
    """`clip_norm` is accepted and the gradient never clipped."""
    return mini.clip(parameters, None)


@specimen("clips-by-value", part="clip", caught_by="CLIP-NORM", theory=PAPER.but(clip="value"))
def clips_by_value(parameters, limit):
    """Each element of the gradient is clipped to the limit, not the norm."""
    norm = mini.clip(parameters, None)
    if limit is not None:
        torch.nn.utils.clip_grad_value_(parameters, limit)
    return norm


@specimen("always-normalised", part="clip", caught_by="CLIP-INACTIVE", theory=PAPER.but(clip="always"))
def always_normalised(parameters, limit):
    """The gradient is scaled to the limit where it is below it, too."""
    norm = mini.clip(parameters, None)
    if limit is not None and norm > 0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)
    return norm


@specimen("clips-by-default", part="clip", caught_by="RUN-GRADIENT")
def clips_by_default(parameters, limit):
    """The gradient is clipped to a norm of 1 where nobody asked for it."""
    return mini.clip(parameters, 1.0 if limit is None else limit)


@specimen("clips-by-the-squared-norm", part="clip", caught_by="CLIP-NORM")
def clips_by_the_squared_norm(parameters, limit):
    """The root is left out: the gradient is divided by its squared norm."""
    norm = mini.clip(parameters, None)
    if limit is not None and norm**2 > limit:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm**2)
    return norm
