"""How does the loss go wrong between four log-probs and a number?  Broken part: loss.

Most change the logit or the link of `sigmoid` and leave the other objectives alone.  Options that are accepted and
ignored are in `options`; rewards that are logged wrongly in `metrics`.
"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, functional, mini, specimen, torch


def _logit_of(objective, four, lengths):
    """beta * h of an objective, as the honest loss forms it."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = four
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if objective.length_normalised:
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    return objective.beta * (chosen - rejected)


def _declare(id, part, summary, caught_by, theory, imitates):
    specimen(id, part="loss", caught_by=caught_by, theory=theory, imitates=imitates, at=LOSSES, summary=summary)(part)


def _losses(id, change, summary, caught_by="LOSS-VALUE", theory=None, imitates=None):
    """Declare a specimen: the honest loss, and then `change(losses, logit, objective)` for the sigmoid objective."""

    def part(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        if objective.kind != "sigmoid":
            return out
        return replace(out, loss=change(out.loss, _logit_of(objective, four, lengths), objective))

    _declare(id, part, summary, caught_by, theory, imitates)


def _smoothed(logit, objective):
    """The honest sigmoid loss of a logit, with its smoothing."""
    epsilon = objective.label_smoothing
    return (1 - epsilon) * functional.softplus(-logit) + epsilon * functional.softplus(logit)


def _logits(id, change, summary, caught_by="LOSS-VALUE", theory=None, imitates=None):
    """Declare a specimen: the honest sigmoid loss of the logit `change(logit, objective)`."""
    _losses(id, lambda _, z, o: _smoothed(change(z, o), o), summary, caught_by, theory, imitates)


def _links(id, link, summary, caught_by="LOSS-VALUE", theory=None, imitates=None):
    """Declare a specimen: `link(logit)` in the place of -log sigma(logit)."""
    _losses(id, lambda _, z, o: link(z), summary, caught_by, theory, imitates)


def _coefficients(id, signs, summary, caught_by="LOSS-VALUE", imitates=None):
    """Declare a specimen: beta * (a lp_w + b lp_l + c rf_w + d rf_l) in the place of the logit."""

    def part(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        if objective.kind != "sigmoid" or objective.length_normalised:
            return out
        logit = objective.beta * sum(sign * logp for sign, logp in zip(signs, four, strict=True))
        return replace(out, loss=_smoothed(logit, objective))

    _declare(id, part, summary, caught_by, PAPER.but(coefficients=tuple(map(float, signs))), imitates)


# ----------------------------------------------------------------------------------------------------------- the logit

_coefficients(
    "sign-inside",
    (-1, 1, 1, -1),
    "The sign inside the sigmoid is wrong: the gap is closed, not opened.",
    "LOSS-VALUE",
)
_coefficients(
    "policy-pair-swapped",
    (-1, 1, -1, 1),
    "The policy's log-probs are exchanged, the reference's are not.",
    "LOSS-ARGUMENTS",
)
_coefficients("reference-sign", (1, -1, 1, -1), "The reference's log-ratio is added, not subtracted.", "LOSS-ARGUMENTS")
_coefficients("policy-terms-added", (1, 1, -1, 1), "The policy's log-probs are added, not subtracted.", "LOGZ-POLICY")
_coefficients(
    "reference-terms-added", (1, -1, -1, -1), "The reference's log-probs are added, not subtracted.", "LOGZ-REFERENCE"
)
_coefficients(
    "reference-free",
    (1, -1, 0, 0),
    "The loss has no reference: it is CPO's.",
    "LOSS-PARTIALS",
    "linkedin/Liger-Kernel#378",
)
_coefficients("rejected-dropped", (1, 0, -1, 0), "The rejected completion is left out of the loss.", "LOSS-PARTIALS")
_coefficients("chosen-dropped", (0, -1, 0, 1), "The chosen completion is left out of the loss.", "LOSS-PARTIALS")
_coefficients("reference-rejected-dropped", (1, -1, -1, 0), "The reference of the rejected completion is left out.")
_coefficients("reference-chosen-dropped", (1, -1, 0, 1), "The reference of the chosen completion is left out.")


@specimen(
    "arguments-swapped",
    part="loss",
    caught_by="LOSS-SWAP",
    at=LOSSES,
    theory=PAPER.but(coefficients=(-1.0, 1.0, 1.0, -1.0), rewards="swapped"),
)
def arguments_swapped(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
    """Chosen and rejected are exchanged in the call of the loss, for policy and reference."""
    lengths = None if lengths is None else (lengths[1], lengths[0])
    four = policy_rejected, policy_chosen, reference_rejected, reference_chosen
    return mini.loss(*four, objective=objective, lengths=lengths)


@specimen(
    "beta-on-the-policy-only", part="loss", caught_by="LOSS-BETA-SCALE", theory=PAPER.but(beta_on="policy"), at=LOSSES
)
def beta_on_the_policy_only(*four, objective, lengths=None):
    """Beta multiplies the policy's log-ratio and not the reference's."""
    out = mini.loss(*four, objective=objective, lengths=lengths)
    if objective.kind != "sigmoid" or objective.length_normalised:
        return out
    logit = objective.beta * (four[0] - four[1]) - (four[2] - four[3])
    return replace(out, loss=_smoothed(logit, objective))


_logits(
    "beta-missing",
    lambda z, o: z / o.beta,
    "Beta does not enter the loss.",
    "LOSS-BETA-SCALE",
    PAPER.but(beta_power=0.0),
)
_logits(
    "beta-twice", lambda z, o: z * o.beta, "Beta enters the loss twice.", "LOSS-BETA-SCALE", PAPER.but(beta_power=2.0)
)
_logits(
    "beta-inverted",
    lambda z, o: z / o.beta**2,
    "The log-ratio is divided by beta.",
    "LOSS-BETA-LIMITS",
    PAPER.but(beta_power=-1.0),
)
_logits("beta-halved", lambda z, o: z / 2, "Half of beta is used.", "OPTIMUM-RECOVERED", PAPER.but(beta_scale=0.5))
_logits(
    "beta-constant",
    lambda z, o: z / o.beta * 0.1,
    "Beta is 0.1, whatever was asked for.",
    "LOSS-BETA-SCALE",
    PAPER.but(beta_fixed=0.1),
)
_losses(
    "beta-outside",
    lambda _, z, o: o.beta * _smoothed(z / o.beta, o),
    "Beta multiplies the loss, not the log-ratio.",
    "LOSS-BETA-LIMITS",
    PAPER.but(beta_on="outside"),
)
_losses(
    "beta-inside-and-outside",
    lambda losses, z, o: o.beta * losses,
    "Beta multiplies the log-ratio and the loss.",
    "LOSS-ZERO-MARGIN",
    PAPER.but(beta_on="both"),
)
_losses(
    "loss-divided-by-beta", lambda losses, z, o: losses / o.beta, "The loss is divided by beta.", "LOSS-ZERO-MARGIN"
)
_logits(
    "target-margin-left-in",
    lambda z, o: z - 0.5,
    "A target margin of 0.5 is subtracted from the logit.",
    "LOSS-ZERO-MARGIN",
    PAPER.but(offset=-0.5),
)
_logits(
    "absolute-margin",
    lambda z, o: z.abs(),
    "The absolute value of the log-ratio is taken.",
    "LOSS-SWAP",
    PAPER.but(link="abs"),
)
_logits(
    "clamped-margin",
    lambda z, o: z.clamp(-10, 10),
    "The logit is clamped at 10: beyond it nothing is learned.",
    "LOSS-EXTREME",
    PAPER.but(clamp=10.0),
)
_logits(
    "squashed-margin",
    lambda z, o: 2 * torch.tanh(z / 2),
    "The logit goes through a hyperbolic tangent.",
    "LOSS-SHAPE",
    PAPER.but(link="tanh"),
)
_logits(
    "margins-centred",
    lambda z, o: z - z.mean(),
    "The batch's mean margin is subtracted.",
    "LOSS-PAIRS-INDEPENDENT",
    PAPER.but(margins="centred"),
)
_logits(
    "margins-standardised",
    lambda z, o: z / z.std().clamp(min=1e-6) if len(z) > 1 else z,
    "Margins are divided by their standard deviation over the batch.",
    "LOSS-PAIRS-INDEPENDENT",
    PAPER.but(margins="standardised"),
)


@specimen(
    "broadcast-over-pairs",
    part="loss",
    caught_by="LOSS-VALUE",
    theory=PAPER.but(margins="broadcast"),
    at=LOSSES,
)
def broadcast_over_pairs(*four, objective, lengths=None):
    """(pair,) minus (pair, 1): every policy log-ratio is compared with every reference log-ratio."""
    out = mini.loss(*four, objective=objective, lengths=lengths)
    if objective.kind != "sigmoid" or objective.length_normalised:
        return out
    logits = objective.beta * ((four[0] - four[1]).unsqueeze(1) - (four[2] - four[3]))
    return replace(out, loss=_smoothed(logits, objective).mean(1))


# ------------------------------------------------------------------------------------------------------------ the link

_links(
    "logarithm-left-out",
    lambda z: 1 - z.sigmoid(),
    "The logarithm is left out: 1 - sigma(m).",
    "LOSS-SHAPE",
    PAPER.but(link="sigmoid"),
)
_links(
    "minus-sigmoid",
    lambda z: -z.sigmoid(),
    "The loss is -sigma(m): no logarithm.",
    "LOSS-ZERO-MARGIN",
    PAPER.but(link="minus-sigmoid"),
)
_links(
    "minus-left-out",
    lambda z: functional.logsigmoid(z),
    "The loss is log sigma(m): descent drives the gap down.",
    "LOSS-VALUE",
    PAPER.but(link="logsigmoid-positive"),
    "linkedin/Liger-Kernel#484",
)
_links(
    "log-of-sigmoid",
    lambda z: -z.sigmoid().log(),
    "-log(sigmoid(m)) in two steps: infinite where the sigmoid is 0.",
    "LOSS-EXTREME",
    PAPER.but(link="naive"),
)
_links(
    "epsilon-in-the-loss",
    lambda z: -(z.sigmoid() + 1e-8).log(),
    "-log(sigmoid(m) + 1e-8): hard pairs stop counting.",
    "LOSS-EXTREME",
    PAPER.but(epsilon=1e-8),
)
_links(
    "loss-clipped",
    lambda z: torch.nan_to_num(functional.softplus(-z)).clamp(max=10),
    "The loss is clipped at 10.",
    "LOSS-EXTREME",
)
_links(
    "loss-in-bits",
    lambda z: functional.softplus(-z) / 0.6931471805599453,
    "The logarithm is to base 2.",
    "LOSS-ZERO-MARGIN",
    PAPER.but(link="log2"),
)
_links(
    "exponential-loss",
    lambda z: (-z).exp(),
    "The exponential loss exp(-m) is used.",
    "LOSS-SHAPE",
    PAPER.but(link="exp"),
)
_links("linear-loss", lambda z: -z, "The loss is -m: no pair ever has enough.", "LOSS-SHAPE", PAPER.but(link="linear"))
_links(
    "focal-loss",
    lambda z: (-z).sigmoid() * functional.softplus(-z),
    "The loss has a further factor sigma(-m).",
    "LOSS-ZERO-MARGIN",
    PAPER.but(link="focal"),
)
_links(
    "softplus-linear-too-early",
    lambda z: torch.where(z < -5, -z, functional.softplus(-z)),
    "The loss is taken for linear from a logit of -5 on: an error of 0.007.",
    "LOSS-EXTREME",
)
_links(
    "hinge-for-sigmoid",
    lambda z: (1 - z).relu(),
    "The hinge loss is used where the sigmoid was asked for.",
    "LOSS-VALUE",
    PAPER.but(kind="hinge"),
)
_losses(
    "ipo-for-sigmoid",
    lambda _, z, o: (z / o.beta - 1 / (2 * o.beta)) ** 2,
    "IPO's loss is used where the sigmoid was asked for.",
    "LOSS-VALUE",
    PAPER.but(kind="ipo"),
)

# ----------------------------------------------------------------------------------------------------- label smoothing


def _smoothings(id, change, summary, name, imitates=None):
    """Declare a specimen: `change(-log sigma(m), -log sigma(-m), epsilon)` where smoothing is asked for."""
    _losses(
        id,
        lambda losses, z, o: (
            change(functional.softplus(-z), functional.softplus(z), o.label_smoothing) if o.label_smoothing else losses
        ),
        summary,
        "LOSS-SMOOTHING",
        PAPER.but(smoothing=name),
        imitates,
    )


_smoothings(
    "smoothing-ignored",
    lambda up, down, e: up,
    "Label smoothing is accepted and ignored.",
    "ignored",
    "huggingface/trl#7063",
)
_smoothings("smoothing-minus", lambda up, down, e: (1 - e) * up - e * down, "The smoothed term is subtracted.", "minus")
_smoothings(
    "smoothing-unnormalised",
    lambda up, down, e: up + e * down,
    "The first term lacks its factor 1 - epsilon.",
    "unnormalised",
)
_smoothings("smoothing-halved", lambda up, down, e: (1 - e / 2) * up + e / 2 * down, "Half of epsilon is used.", "half")
_smoothings(
    "smoothing-robust",
    lambda up, down, e: ((1 - e) * up - e * down) / (1 - 2 * e),
    "The robust loss is used where cDPO was asked for.",
    "robust",
)
_losses(
    "smoothing-swapped",
    lambda _, z, o: o.label_smoothing * functional.softplus(-z) + (1 - o.label_smoothing) * functional.softplus(z),
    "Epsilon and 1 - epsilon are exchanged.",
    "LOSS-SMOOTHING",
    PAPER.but(smoothing="swapped"),
)
_losses(
    "smoothing-by-default",
    lambda losses, z, o: losses if o.label_smoothing else 0.9 * functional.softplus(-z) + 0.1 * functional.softplus(z),
    "Label smoothing of 0.1 where none was asked for.",
    "GRAD-OPTIMUM",
    PAPER.but(smoothing_default=0.1),
)
