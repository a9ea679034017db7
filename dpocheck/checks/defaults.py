"""Does the trainer compute DPO as people run it, with its own defaults?"""

from __future__ import annotations

import numpy as np

from dpocheck.check import Case, Comparison, check, close, labels, scene
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle.theory import PAPER, Theory

ROUNDING = 2.0**-8  # bfloat16


def _plain(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=5, defaults=True)
    return [scene("five pairs, precision, clipping and checkpointing left as they are",
        scenes.run(scenes.ragged(), theory, recipe), family="defaults")]


@check(
    "DEFAULTS-STEP", chapter="defaults", stage="step", level="should", needs={"train.gradient"}, scenes=_plain,
    rivals=(PAPER.but(reference="none"), PAPER.but(logps="mean"), PAPER.but(counted="no-eos")),
    claim="With the trainer's own precision, clipping, checkpointing and limits, the gradient has the right direction.",
    source="Rafailov et al. 2023, section 4; error of bfloat16 2^-8 of the largest element",
    covers=("RUN-MIXED", "LOGP-PREC"),
    why="The other checks switch these defaults off to see sharply; this is what people run.",
    bug="Log-probs summed in bfloat16: 1.7 nats of error at 50 tokens.", fix="Sum log-probs in float32.",
)  # fmt: skip
def step(case: Case) -> Comparison:
    seen, paper = case.observed[0].gradient, case.predicted().gradient
    if not np.any(seen):
        return Comparison("fail", observed="nothing moved", expected="a step", where="gradient")
    scale = float(np.sum(seen * paper) / np.sum(seen * seen))  # clipping may shorten the step
    limit = 4 * ROUNDING * float(np.abs(paper).max())
    told = close(seen * scale, paper, limit, label=labels(case.experiments[0], "gradient"))
    for wrong in case.rivals:
        other = case.rival(**wrong.differs()).gradient
        fitted = other * float(np.sum(other * paper) / np.sum(other * other))
        if np.abs(fitted - paper).max() < 4 * limit / 4:
            return Comparison("unknown", reason=f"{wrong.differs()} is not told apart in this precision")
    return told
