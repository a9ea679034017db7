"""Does the gradient of the batch equal the sigmoid-weighted difference of SFT gradients?"""

from __future__ import annotations

from dpocheck.check import Case, Comparison, agree, check, scene
from dpocheck.checks import scenes
from dpocheck.oracle.theory import PAPER

SOURCE = "Rafailov et al. 2023, section 4, 'What does the DPO update do?'"


@check(
    "GRAD-IDENTITY", chapter="gradient", stage="gradient", level="must", needs={"step.gradient"},
    scenes=[scene("five pairs, policy away from the reference", scenes.step(scenes.rectangular(5)))],
    rivals=(PAPER.but(reference="none"), PAPER.but(beta_power=2.0), PAPER.but(logps="mean")),
    claim="The gradient is -beta * sigma(-m) * (grad log pi(y_w) - grad log pi(y_l)), averaged over the pairs.",
    source=SOURCE, covers=("STEP-GRAD", "STEP-SGD", "STEP-PAIR-LINEAR"),
    why="Everything that training does, it does through this gradient.",
)  # fmt: skip
def identity(case: Case) -> Comparison:
    return agree(case, "gradient")
