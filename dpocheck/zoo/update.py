"""How do weights go wrong under a right gradient, and the rows that come next?  Broken parts: update, order."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import mini, specimen, torch

DECAYS = PAPER.but(weight_decay_extra=0.01 / 2**20)  # a decay of parameters, in the unit of logits

# -------------------------------------------------------------------------------------------------------------- update


def _parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@specimen("ascends", part="update", caught_by="RUN-GRADIENT", theory=PAPER.but(update=-1.0))
def ascends(optimizer, recipe, clock, total):
    """The step goes up the gradient."""
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:
            parameter.grad.neg_()
    return mini.update(optimizer, recipe, clock, total)


@specimen("gradient-never-cleared", part="update", caught_by="STEP-TWO", theory=PAPER.but(stale="kept"))
def gradient_never_cleared(optimizer, recipe, clock, total):
    """Gradients are not cleared after a step: the next one adds to them."""
    kept = [None if p.grad is None else p.grad.clone() for p in _parameters(optimizer)]
    rate = mini.update(optimizer, recipe, clock, total)
    for parameter, gradient in zip(_parameters(optimizer), kept, strict=True):
        parameter.grad = gradient
    return rate


@specimen(
    "undeclared-weight-decay", part="update", caught_by="STEP-NOTHING-HIDDEN", theory=DECAYS
)
def undeclared_weight_decay(optimizer, recipe, clock, total):
    """A weight decay of 0.01, the optimizer's own default, where none was asked for."""
    for group in optimizer.param_groups:
        group["weight_decay"] = recipe.weight_decay or 0.01
    return mini.update(optimizer, recipe, clock, total)


@specimen("undeclared-momentum", part="update", caught_by="STEP-TWO", theory=PAPER.but(momentum_extra=0.9))
def undeclared_momentum(optimizer, recipe, clock, total):
    """A momentum of 0.9 where none was asked for."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = recipe.momentum or 0.9
    return mini.update(optimizer, recipe, clock, total)


@specimen("adam-without-bias-correction", part="update", caught_by="STEP-ADAM")
def adam_without_bias_correction(optimizer, recipe, clock, total):
    """Adam's averages are not corrected for starting at zero: the first steps are too small or too large."""
    if recipe.optimizer != "adamw":
        return mini.update(optimizer, recipe, clock, total)
    taken = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0) + 1
    first, second = (1 - beta**taken for beta in recipe.betas)
    for group in optimizer.param_groups:
        group["eps"] = recipe.epsilon / second**0.5
    scaled = replace(recipe, learning_rate=recipe.learning_rate * first / second**0.5)
    return mini.update(optimizer, scaled, clock, total) / (first / second**0.5)


def _clocked(id, change, summary, theory=None, caught_by="STEP-SCHEDULE", imitates=None):
    """Declare a specimen: `change(recipe, clock, total)` gives the recipe, clock and horizon that the schedule sees."""

    def part(optimizer, recipe, clock, total):
        return mini.update(optimizer, *change(recipe, clock, total))

    specimen(id, part="update", caught_by=caught_by, theory=theory, imitates=imitates, summary=summary)(part)


_clocked(
    "schedule-per-micro-step",
    lambda r, clock, total: (r, min(total, clock * r.accumulation), total),
    "The schedule advances at every micro-batch: it ends before the run does.",
    PAPER.but(schedule="micro-step"),
)
_clocked(
    "schedule-constant",
    lambda r, clock, total: (replace(r, schedule="constant"), clock, total),
    "The schedule is accepted and the rate constant.",
    PAPER.but(schedule="constant"),
)
_clocked(
    "horizon-doubled",
    lambda r, clock, total: (r, clock, 2 * total),
    "The schedule's horizon is multiplied by the epochs twice: the rate never decays to its end.",
    None,
    "STEP-SCHEDULE",
    "OpenRLHF/OpenRLHF#359",
)
_clocked(
    "warm-up-skipped",
    lambda r, clock, total: (replace(r, warmup_steps=0), clock, total),
    "Warm-up steps are accepted and skipped.",
)


@specimen("weights-stored-in-bfloat16", part="update", caught_by="STEP-TWO")
def weights_stored_in_bfloat16(optimizer, recipe, clock, total):
    """Weights are rounded to bfloat16 after each step: small updates are lost."""
    rate = mini.update(optimizer, recipe, clock, total)
    with torch.no_grad():
        for parameter in _parameters(optimizer):
            parameter.copy_(parameter.to(torch.bfloat16))
    return rate


@specimen("vectors-never-updated", part="update", caught_by="STEP-ALL-PARAMETERS", imitates="huggingface/trl#7268")
def vectors_never_updated(optimizer, recipe, clock, total):
    """Vectors, the norms' weights among them, are left out of the update."""
    for parameter in _parameters(optimizer):
        if parameter.ndim == 1:
            parameter.grad = None
    return mini.update(optimizer, recipe, clock, total)


# --------------------------------------------------------------------------------------------------------------- order


def _ordered(id, change, summary, caught_by="RUN-COVERAGE", theory=None, imitates=None):
    """Declare a specimen: `change(rows, recipe, epoch)` gives the arguments of the honest order."""

    def part(rows, recipe, epoch):
        return mini.order(*change(rows, recipe, epoch))

    specimen(id, part="order", caught_by=caught_by, theory=theory, imitates=imitates, summary=summary)(part)


_ordered(
    "same-order-every-epoch",
    lambda rows, recipe, epoch: (rows, recipe, 0),
    "Every epoch has the first one's order.",
    "RUN-SHUFFLE",
)
_ordered(
    "never-shuffled",
    lambda rows, recipe, epoch: (rows, replace(recipe, shuffle=False), epoch),
    "The shuffled dataset is thrown away: rows come as they stand.",
    "RUN-SHUFFLE",
    None,
    "allenai/open-instruct#560",
)
_ordered(
    "seed-ignored",
    lambda rows, recipe, epoch: (rows, replace(recipe, seed=0), epoch),
    "The seed is accepted and the order always the same.",
    "RUN-SHUFFLE",
)
_ordered(
    "last-row-dropped",
    lambda rows, recipe, epoch: (rows - 1 if rows > recipe.batch else rows, recipe, epoch),
    "The last row of the dataset is never seen.",
)
_ordered(
    "last-batch-dropped",
    lambda rows, recipe, epoch: (rows, replace(recipe, drop_last=rows >= recipe.batch), epoch),
    "The last batch of an epoch is dropped unasked where it is short.",
    theory=PAPER.but(last_batch="dropped"),
)
_ordered(
    "resumes-with-the-first-epochs-order",
    lambda rows, recipe, epoch: (rows, recipe, 0 if recipe.resume_from is not None else epoch),
    "A resumed run counts its epochs from the first again: rows of the interrupted epoch come twice or never.",
    "RUN-RESUME-EPOCH",
    None,
    "OpenRLHF/OpenRLHF#1350",
)


@specimen("unseeded", part="order", caught_by="RUN-SAME-SEED")
def unseeded(rows, recipe, epoch):
    """The order is drawn from the operating system: no run can be repeated."""
    import secrets

    return mini.order(rows, replace(recipe, seed=secrets.randbelow(2**20)), epoch)


@specimen("last-batch-filled-up", part="order", caught_by="RUN-COVERAGE", theory=PAPER.but(last_batch="padded"))
def last_batch_filled_up(rows, recipe, epoch):
    """A short last batch is filled up with rows from the start of the epoch, which count twice."""
    windows = mini.order(rows, recipe, epoch)
    first, last = [index for window in windows for batch in window for index in batch], windows[-1][-1]
    missing = recipe.batch * recipe.world_size - len(last)
    filled = last + (first * (missing // len(first) + 1))[:missing]
    return [*windows[:-1], [*windows[-1][:-1], filled]]


@specimen("drawn-with-replacement", part="order", caught_by="RUN-COVERAGE")
def drawn_with_replacement(rows, recipe, epoch):
    """Rows are drawn with replacement: some come twice in an epoch, others never."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    drawn = torch.randint(rows, (rows,), generator=generator).tolist()
    return [[[drawn[index] for index in batch] for batch in window] for window in mini.order(rows, recipe, epoch)]
