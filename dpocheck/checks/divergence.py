"""Is the loss under another divergence than the reverse KL -log sigma(beta f'(u_w) - beta f'(u_l))?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, close, labels, scene, worst
from dpocheck.checks import draws
from dpocheck.checks.loss import values
from dpocheck.experiment import DIVERGENCES, LossExperiment, Objective
from dpocheck.oracle.theory import PAPER

# alpha is not 1/2, where 1 - alpha is as good
OBJECTIVES = (
    Objective("forward_kl", beta=0.5), Objective("js_divergence", beta=0.5),
    Objective("alpha_divergence", beta=0.5, alpha=0.25),
)  # fmt: skip
# Ratios u on both sides of 1: log u of chosen is 1/2, -5/4, 3/4, -3/8, 3/2, of rejected -1, 5/8, -1/4, 9/8, -7/4.
NEAR = LossExperiment(
    (-3.5, -6.25, -2.75, -9.5, -4.125), (-6.0, -4.75, -2.25, -12.875, -7.625),
    (-4.0, -5.0, -3.5, -9.125, -5.625), (-5.0, -5.375, -2.0, -14.0, -5.875),
)  # fmt: skip
# Ratios from e^-20 to e^20: f' of the forward KL is -4.9e8 there, and a loss 2.4e8, well within float32.
FAR = LossExperiment(
    (-3.5, -26.25, -2.75, -14.0), (-24.0, -4.75, -16.25, -3.0),
    (-23.5, -6.25, -15.25, -3.0), (-4.0, -19.75, -3.0, -18.5),
)  # fmt: skip


def _scenes() -> list:
    found = []
    for objective in OBJECTIVES:
        near, far = (replace(numbers, objective=objective) for numbers in (NEAR, FAR))
        found.append(scene(f"{objective.kind}, ratios near 1", near, family=objective.kind))
        found.append(scene(f"{objective.kind}, ratios to e^20", far, family=objective.kind, tier="full"))
    high = Objective("alpha_divergence", beta=0.5, alpha=0.75)
    return [*found, scene("alpha 3/4", replace(NEAR, objective=high), family=high.kind, tier="full")]


@check(
    "LOSS-DIVERGENCE", chapter="loss", stage="loss", level="must", needs=set(), scenes=_scenes(),
    draw=draws.of_objective(*DIVERGENCES, regions=("plain", "near")),
    rivals=(PAPER.but(kind="sigmoid"), PAPER.but(derivative="mirrored")),
    claim="Under another divergence the loss is -log sigma(beta f'(u_w) - beta f'(u_l)), u = pi/ref of a completion: "
    "f'(u) is -1/u for the forward KL, log(2u/(1+u)) for Jensen-Shannon, (1 - u^-alpha)/alpha for alpha.",
    source="Wang et al. 2023 (arXiv:2309.16240): f' differentiated from each f; the equations' numbers not verified",
    covers=("LOSS-VALUE", "LOSS-TYPE-HONOURED"),
    why="The divergence is all that the method adds; near the reference the wrong one looks like the right one.",
    bug="TRL 1.16 computes the alpha divergence with 1 - alpha for alpha; 0.24 did with alpha.",
    fix="Differentiate f by hand, and try an alpha other than 1/2.",
)  # fmt: skip
def divergence(case: Case) -> Comparison:
    experiment, seen = case.experiments[0], case.observed[0]
    told = [values(case)]
    if seen.slopes is not None:
        paper = case.predicted().slopes
        limit = np.broadcast_to(np.asarray(case.bound("slopes")), paper.shape)
        told.append(close(seen.slopes[:2], paper[:2], limit[:2], label=labels(experiment, "slopes")))
    return worst(told)
