"""How do the loss's gradient, its extra terms and the other objectives go wrong?  Broken part: loss, once more."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, STEPS, functional, mini, specimen, torch

# -------------------------------------------------------------------------------------------------------- the gradient


def _with_gradient_of(value, other):
    """The number of one, the gradient of the other."""
    return value.detach() + other - other.detach()


def _changed(id, change, summary, caught_by, theory=None, imitates=None, at=LOSSES):
    """Declare a specimen: `change(honest, four, objective, lengths)` gives the losses."""

    def part(*four, objective, lengths=None):
        honest = mini.loss(*four, objective=objective, lengths=lengths)
        return replace(honest, loss=change(honest.loss, four, objective, lengths))

    specimen(id, part="loss", caught_by=caught_by, theory=theory, imitates=imitates, at=at, summary=summary)(part)


def _again(four, objective, lengths):
    return mini.loss(*four, objective=objective, lengths=lengths).loss


_changed(
    "chosen-detached",
    lambda losses, four, o, n: _again((four[0].detach(), *four[1:]), o, n),
    "The chosen log-prob is detached: the gradient only lowers the rejected one.",
    "LOSS-PARTIALS",
    PAPER.but(detached="chosen"),
)
_changed(
    "rejected-detached",
    lambda losses, four, o, n: _again((four[0], four[1].detach(), *four[2:]), o, n),
    "The rejected log-prob is detached: the gradient only raises the chosen one.",
    "LOSS-PARTIALS",
    PAPER.but(detached="rejected"),
)
_changed(
    "backward-scaled",
    lambda losses, four, o, n: _with_gradient_of(losses, 0.1 * losses),
    "The gradient is a tenth of the loss's.",
    "LOSS-VALUE-GRADIENT",
    PAPER.but(gradient_scale=0.1),
)
_changed(
    "learns-nothing",
    lambda losses, four, o, n: _with_gradient_of(losses, 0 * losses),
    "The losses are right and carry no gradient: nothing is learned.",
    "GRAD-IDENTITY",
    PAPER.but(gradient_scale=0.0),
    "Goekdeniz-Guelmez/mlx-lm-lora#25",
)


def _half_weight(losses, four, objective, lengths):
    if objective.kind != "sigmoid":
        return losses
    return _with_gradient_of(losses, -objective.beta * (four[0] - four[1]) / 2)


_changed(
    "pairs-not-weighted",
    _half_weight,
    "The gradient's weight sigma(-m) is a constant ½: every pair pulls alike.",
    "LOSS-VALUE-GRADIENT",
    PAPER.but(weight="half"),
)

# ------------------------------------------------------------------------------------------- extra terms and arguments


def _length(lengths, side=0):
    return 1 if lengths is None else lengths[side]


_changed(
    "likelihood-term-added",
    lambda losses, four, o, n: losses - 0.1 * four[0] / _length(n),
    "A tenth of the chosen completion's negative log-likelihood is added, undeclared.",
    "GRAD-START",
    PAPER.but(sft_extra=0.1),
)
_changed(
    "divergence-term-added",
    lambda losses, four, o, n: losses + 0.05 * (four[0] - four[2]),
    "A twentieth of the chosen log-ratio is added, undeclared.",
    "GRAD-START",
    PAPER.but(kl_extra=0.05),
)
_changed(
    "losses-times-length",
    lambda losses, four, o, n: losses * (_length(n, 0) + _length(n, 1)) / 2,
    "Each pair's loss is multiplied by its number of tokens.",
    "DEFAULTS-STEP",
    at=STEPS,
)


@specimen("arguments-changed-in-place", part="loss", caught_by="LOSS-PURE", at=("loss",))
def arguments_changed_in_place(*four, objective, lengths=None):
    """Reference log-probs are multiplied by beta in place: the loss is right, its arguments are not what they were."""
    out = mini.loss(*four, objective=objective, lengths=lengths)
    for reference in four[2:]:
        reference.detach().mul_(objective.beta)
    return out


@specimen("loss-in-float16", part="loss", caught_by="LOSS-DTYPES", at=LOSSES)
def loss_in_float16(*four, objective, lengths=None):
    """Log-probs are cast to float16 before they are subtracted."""
    half = [logps.to(torch.float16).to(logps.dtype) for logps in four]
    return mini.loss(*half, objective=objective, lengths=lengths)


# ----------------------------------------------------------------------------------------------------- other objectives


def _objective(id, kind, change, summary, caught_by, theory=None, imitates=None):
    """Declare a specimen that changes one objective only."""
    _changed(
        id,
        lambda losses, four, o, n: change(four, o, n) if o.kind == kind else losses,
        summary,
        caught_by,
        theory,
        imitates,
    )


def _h(four):
    return (four[0] - four[2]) - (four[1] - four[3])


def _mean_h(four, n):
    return (four[0] - four[2]) / _length(n, 0) - (four[1] - four[3]) / _length(n, 1)


def _sft(four, o, n):
    """The likelihood term that the honest loss adds when it is asked for."""
    return -o.sft_weight * four[0] / _length(n) if o.sft_weight else 0


_objective(
    "ipo-by-length",
    "ipo",
    lambda four, o, n: (_mean_h(four, n) - 1 / (2 * o.beta)) ** 2 + _sft(four, o, n),
    "IPO averages log-probs over tokens, though its documentation says that it sums.",
    "LOSS-IPO",
    PAPER.but(ipo_length="mean"),
)
_objective(
    "ipo-averages-the-policy-only",
    "ipo",
    lambda four, o, n: (four[0] / _length(n, 0) - four[1] / _length(n, 1) - four[2] + four[3] - 1 / (2 * o.beta)) ** 2,
    "IPO averages the policy's log-probs and sums the reference's.",
    "LOSS-IPO",
    None,
    "modelscope/ms-swift#9925",
)
_objective(
    "ipo-target-without-half",
    "ipo",
    lambda four, o, n: (_h(four) - 1 / o.beta) ** 2 + _sft(four, o, n),
    "IPO's target is 1/beta, not 1/(2 beta).",
    "LOSS-IPO",
    PAPER.but(ipo="no-half"),
)
_objective(
    "ipo-times-beta",
    "ipo",
    lambda four, o, n: (o.beta * _h(four) - 0.5) ** 2 + _sft(four, o, n),
    "Beta is multiplied into IPO's log-ratio while its target is one half: the loss is beta squared times IPO's.",
    "LOSS-IPO",
    PAPER.but(ipo="beta-squared"),
    "huggingface/trl#1615",
)
_objective(
    "ipo-of-scaled-ratios",
    "ipo",
    lambda four, o, n: (o.beta * _h(four) - 1 / (2 * o.beta)) ** 2 + _sft(four, o, n),
    "The logit of DPO, beta included, is handed to IPO's square, whose target is 1/(2 beta) as in the paper.",
    "LOSS-IPO",
    PAPER.but(ipo="beta-inside"),
)
_objective(
    "hinge-without-beta",
    "hinge",
    lambda four, o, n: (1 - _h(four)).relu() + _sft(four, o, n),
    "The hinge's margin is of the raw log-ratio, without beta.",
    "LOSS-HINGE",
)
_objective(
    "hinge-without-margin",
    "hinge",
    lambda four, o, n: (-o.beta * _h(four)).relu() + _sft(four, o, n),
    "The hinge has no margin: a tie costs nothing.",
    "LOSS-HINGE",
)
_objective(
    "robust-unscaled",
    "robust",
    lambda four, o, n: (
        (1 - o.label_smoothing) * functional.softplus(-o.beta * _h(four))
        - o.label_smoothing * functional.softplus(o.beta * _h(four))
        + _sft(four, o, n)
    ),
    "The robust loss is not divided by 1 - 2 epsilon.",
    "LOSS-ROBUST",
)
_objective(
    "robust-is-cdpo",
    "robust",
    lambda four, o, n: (
        (1 - o.label_smoothing) * functional.softplus(-o.beta * _h(four))
        + o.label_smoothing * functional.softplus(o.beta * _h(four))
        + _sft(four, o, n)
    ),
    "cDPO is used where the robust loss was asked for.",
    "LOSS-ROBUST",
)
_objective(
    "simpo-sums",
    "simpo",
    lambda four, o, n: functional.softplus(o.gamma - o.beta * (four[0] - four[1])) + _sft(four, o, n),
    "SimPO sums log-probs, it does not average them: a count of positive log-probs is always 0 and clamped to 1.",
    "LOSS-SIMPO",
    None,
    "ContextualAI/HALOs@d8fd14f",
)
_objective(
    "simpo-with-reference",
    "simpo",
    lambda four, o, n: functional.softplus(o.gamma - o.beta * _mean_h(four, n)) + _sft(four, o, n),
    "SimPO subtracts the reference.",
    "LOSS-SIMPO",
)
_objective(
    "simpo-margin-added",
    "simpo",
    lambda four, o, n: (
        functional.softplus(-o.gamma - o.beta * (four[0] / _length(n, 0) - four[1] / _length(n, 1))) + _sft(four, o, n)
    ),
    "SimPO's target margin is added to the logit, not subtracted.",
    "LOSS-SIMPO",
)

# ------------------------------------------------------------------------------------------------------------- sft term

_changed(
    "sft-sign",
    lambda losses, four, o, n: losses - 2 * _sft(four, o, n),
    "The likelihood term has the wrong sign: the chosen completion is made less likely.",
    "LOSS-SFT",
    None,
    "hiyouga/LLaMA-Factory@be0a807e",
)
_changed(
    "sft-sum",
    lambda losses, four, o, n: losses - _sft(four, o, n) - o.sft_weight * four[0],
    "The likelihood term is a sum over tokens, not a mean.",
    "LOSS-SFT",
    None,
    "facebookresearch/fairseq2#761",
)
_changed(
    "sft-weighs-the-preference",
    lambda losses, four, o, n: (
        o.sft_weight * (losses - _sft(four, o, n)) - four[0] / _length(n) if o.sft_weight else losses
    ),
    "The weight of the likelihood term multiplies the preference loss.",
    "LOSS-SFT",
    None,
    "huggingface/trl#1868",
)
