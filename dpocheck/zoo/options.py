"""Which options are accepted and do nothing, or something else?  Broken parts of every stage, one option each."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, mini, specimen


def _objective(id, change, summary, caught_by="OPTION-ACTS", theory=None, imitates=None):
    """Declare a specimen whose loss sees `change(objective)`."""

    def part(*four, objective, lengths=None):
        return mini.loss(*four, objective=change(objective), lengths=lengths)

    specimen(id, part="loss", caught_by=caught_by, theory=theory, imitates=imitates, at=LOSSES, summary=summary)(part)


_objective(
    "kind-ignored",
    lambda o: replace(o, kind="sigmoid", gamma=0.0),
    "The kind of loss is accepted and the sigmoid is trained.",
    "LOSS-IPO",
    PAPER.but(kind="sigmoid"),
    "modelscope/ms-swift#10167",
)
_objective(
    "sft-weight-ignored",
    lambda o: replace(o, sft_weight=0.0),
    "The weight of the likelihood term is accepted and ignored.",
    imitates="axolotl-ai-cloud/axolotl#3566",
)
_objective(
    "sft-weight-always-one",
    lambda o: replace(o, sft_weight=1.0 if o.sft_weight else 0.0),
    "The likelihood term has weight 1, whatever was asked for.",
    "LOSS-SFT",
    imitates="linkedin/Liger-Kernel#1194",
)
_objective(
    "length-normalisation-ignored",
    lambda o: replace(o, length_normalised=False),
    "Length normalisation is accepted and ignored.",
)
_objective(
    "gamma-ignored",
    lambda o: replace(o, gamma=0.0),
    "SimPO's target margin is accepted and ignored.",
    "LOSS-SIMPO",
    PAPER.but(gamma="ignored"),
)


def _optimizer(id, change, summary, caught_by="STEP-ADAM"):
    """Declare a specimen: `change(group, recipe)` sets an optimizer's group back before every step."""

    def part(optimizer, recipe, clock, total):
        for group in optimizer.param_groups:
            change(group, recipe)
        return mini.update(optimizer, recipe, clock, total)

    specimen(id, part="update", caught_by=caught_by, summary=summary)(part)


def _set(group, **values):
    group.update({name: value for name, value in values.items() if name in group})


_optimizer(
    "betas-ignored", lambda group, recipe: _set(group, betas=(0.9, 0.999)), "Adam's betas are accepted and ignored."
)
_optimizer("epsilon-ignored", lambda group, recipe: _set(group, eps=1e-8), "Adam's epsilon is accepted and ignored.")
_optimizer(
    "weight-decay-ignored",
    lambda group, recipe: _set(group, weight_decay=0.0),
    "Weight decay is accepted and ignored.",
    "OPTION-ACTS",
)
_optimizer(
    "momentum-ignored",
    lambda group, recipe: _set(group, momentum=0.0),
    "Momentum is accepted and ignored.",
    "OPTION-ACTS",
)


@specimen("learning-rate-halved", part="update", caught_by="RUN-GRADIENT")
def learning_rate_halved(optimizer, recipe, clock, total):
    """The step is half of what the learning rate says, which is logged as asked."""
    return 2 * mini.update(optimizer, replace(recipe, learning_rate=recipe.learning_rate / 2), clock, total)


@specimen("accumulation-ignored", part="order", caught_by="ACCUM-EVEN", theory=PAPER.but(accumulation="steps"))
def accumulation_ignored(rows, recipe, epoch):
    """Accumulation is accepted, and every micro-batch is a step of its own."""
    return mini.order(rows, replace(recipe, accumulation=1), epoch)


@specimen("drop-last-ignored", part="order", caught_by="OPTION-ACTS", theory=PAPER.but(last_batch="always-kept"))
def drop_last_ignored(rows, recipe, epoch):
    """`drop_last` is accepted, and a short last batch is kept."""
    return mini.order(rows, replace(recipe, drop_last=False), epoch)


@specimen("lora-alpha-ignored", part="reference", caught_by="OPTION-ACTS")
def lora_alpha_ignored(trainer, policy, given, recipe, examples, folder):
    """An adapter's alpha is accepted and its scale always 1."""
    for module in policy.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, 1.0)
    return mini.reference(trainer, policy, given, recipe, examples, folder)
