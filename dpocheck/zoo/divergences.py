"""How do divergences other than the reverse KL go wrong?  Broken part: loss; every other objective is left alone."""

from __future__ import annotations

import math
from dataclasses import replace

from dpocheck.experiment import DIVERGENCES
from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, functional, mini, specimen


def _scored(id, score, summary, theory=None, imitates=None, kinds=DIVERGENCES):
    """Declare a specimen: `score(ratio, objective)` stands for f'(u), ratio = log u."""

    def part(*four, objective, lengths=None):
        honest = mini.loss(*four, objective=objective, lengths=lengths)
        if objective.kind not in kinds:
            return honest
        chosen, rejected = (four[i] - four[i + 2] for i in (0, 1))
        if objective.length_normalised:
            chosen, rejected = chosen / lengths[0], rejected / lengths[1]
        margin = objective.beta * (score(chosen, objective) - score(rejected, objective))
        loss = -functional.logsigmoid(margin)
        if objective.sft_weight:
            loss = loss - objective.sft_weight * four[0] / lengths[0]
        return replace(honest, loss=loss)

    specimen(
        id, part="loss", caught_by="LOSS-DIVERGENCE", theory=theory, imitates=imitates, at=LOSSES, summary=summary
    )(part)


_scored(
    "divergence-ignored",
    lambda ratio, o: ratio,
    "The divergence is accepted and DPO is trained: the reverse KL.",
    None,  # its theory, "sigmoid loss whatever was asked for", is that of kind-ignored
    "huggingface/trl#6559",
)
_scored(
    "alpha-is-one-minus-alpha",
    lambda ratio, o: mini.divergence(ratio, replace(o, alpha=1 - o.alpha)),
    "The alpha divergence is computed with 1 - alpha: at alpha 1/2 nobody sees it.",
    PAPER.but(alpha="one-minus"),
    kinds=("alpha_divergence",),
)
_scored(
    "alpha-always-half",
    lambda ratio, o: mini.divergence(ratio, replace(o, alpha=0.5)),
    "Alpha is accepted and ignored.",
    PAPER.but(alpha_fixed=0.5),
    kinds=("alpha_divergence",),
)
_scored(
    "divergence-sign-flipped",
    lambda ratio, o: -mini.divergence(ratio, o),
    "f'(u) has the wrong sign, 1/u for -1/u: the rejected completion is raised.",
    PAPER.but(derivative="negated"),
)
_scored(
    "divergence-of-the-inverse-ratio",
    lambda ratio, o: -mini.divergence(-ratio, o),
    "The exponent has the wrong sign: u stands where -1/u is due, so that likely completions pull without limit.",
    PAPER.but(derivative="mirrored"),
)
_scored(
    "divergence-itself-for-its-derivative",
    lambda ratio, o: {
        "forward_kl": lambda: -ratio,
        "js_divergence": lambda: (
            ratio.exp() * ratio - (ratio.exp() + 1) * (functional.softplus(ratio) - math.log(2))
        ),
        "alpha_divergence": lambda: (
            (((1 - o.alpha) * ratio).exp() - (1 - o.alpha) * ratio.exp() - o.alpha) / (o.alpha * (o.alpha - 1))
        ),
    }[o.kind](),
    "f(u) stands where its derivative is due.",
)
