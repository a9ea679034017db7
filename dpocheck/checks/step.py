"""Is one optimizer step what its pairs add up to?"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.check import Case, Comparison, agree, check, equal, scene, worst
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle.theory import PAPER, Theory

MEAN = "Rafailov et al. 2023, Eq. 7: the expectation over the data set is a mean over pairs"


def _even(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    base = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=6)
    return [
        scene(f"six pairs as {parts} micro-batches of {6 // parts}",
              scenes.run(pairs, theory, replace(base, batch=6 // parts, accumulation=parts)), family="accumulation")
        for parts in (2, 3, 6)
    ]  # fmt: skip


@check(
    "ACCUM-EVEN", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_even,
    rivals=(PAPER.but(accumulation="sum"), PAPER.but(accumulation="last")),
    claim="Micro-batches of equal size add up to the gradient of one big batch.", source=MEAN,
    covers=("ACCUM-EVEN", "ACCUM-STEP", "RUN-ACCUM"),
    why="The learning rate that was tuned is multiplied by the accumulation steps.",
    bug="TRL 0.12 and 0.13 with transformers 4.46: the gradient times the number of micro-batches.",
    fix="Divide by the number of micro-batches once, in one place.",
)  # fmt: skip
def even(case: Case) -> Comparison:
    return agree(case, "gradient")


def _tokens(theory: Theory) -> list:
    pairs = scenes.ragged()[:4]
    objective = Objective(beta=0.5, sft_weight=1.0)
    whole = Recipe(objective, learning_rate=scenes.ONE_STEP, batch=4)
    split = replace(whole, batch=1, accumulation=4)
    runs = (scenes.run(pairs, theory, whole), scenes.run(pairs, theory, split))
    return [scene("four pairs of unequal lengths, with an SFT term, as one batch and as four", *runs, family="sft")]


@check(
    "ACCUM-TOKENS", chapter="step", stage="step", level="should", needs={"train.gradient"}, scenes=_tokens,
    claim="With an SFT term too, the gradient does not depend on how the batch is cut into micro-batches of one size.",
    source="the gradient of a mean over pairs is the mean of their gradients", covers=("ACCUM-EVEN",),
    why="The same recipe trains differently on a machine with less memory.",
    bug="TRL 0.20 to 1.16: the sft term is a mean over the tokens of each micro-batch; gradients differ by 16 to 27 %.",
    fix="Normalise by the tokens, or the pairs, of the whole step.",
)  # fmt: skip
def tokens(case: Case) -> Comparison:
    return worst([equal(case, "gradient")])
