"""Is the SFT term that was asked for added with its sign, its weight and its mean?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, logged, scene, worst
from dpocheck.checks import scenes
from dpocheck.checks.loss import ORDINARY, values
from dpocheck.experiment import LossExperiment, Objective, Recipe
from dpocheck.oracle.theory import Theory

UNEQUAL = ((2, 5), (4, 3), (3, 3), (6, 2), (1, 4))


def _sft(theory: Theory) -> list:
    objective = Objective(beta=0.5, sft_weight=0.5)
    recipe = Recipe(objective, learning_rate=scenes.ONE_STEP, batch=4)
    return [
        scene("five pairs of unequal lengths", replace(ORDINARY, objective=objective, lengths=UNEQUAL), family="sft"),
        scene("four pairs, one step of a run", scenes.run(scenes.rectangular(4), theory, recipe), family="sft"),
    ]


@check(
    "LOSS-SFT", chapter="loss", stage="loss", level="must", needs=set(), scenes=_sft,
    claim="With an SFT term the loss grows by its weight times the mean negative log-likelihood of the chosen "
    "completion.",
    source="Pang et al. 2024 (arXiv:2404.19733), Eq. 1; Xu et al. 2024 (arXiv:2401.08417), Eq. 5",
    covers=("LOSS-VALUE", "STEP-LOSS"), why="A wrong sign unlearns the chosen completions while the log looks well.",
    bug="TRL's rpo_alpha once weighed the preference term; fairseq2 added a sum over tokens.",
    fix="Add weight * (-log pi(y_w) / |y_w|) to each pair's loss, or to the batch's.",
)  # fmt: skip
def sft(case: Case) -> Comparison:
    experiment, seen = case.experiments[0], case.observed[0]
    if isinstance(experiment, LossExperiment):
        if seen.via == "derived":
            return Comparison("not-applicable", reason="asked of a whole run instead")
        paper = case.predicted().slopes
        told = [values(case)]
        if seen.slopes is not None:
            limit = np.broadcast_to(np.asarray(case.bound("slopes")), paper.shape)[:2]
            told.append(close(seen.slopes[:2], paper[:2], limit))
        return worst(told)
    return worst([agree(case, "gradient"), logged(case, "loss")])
