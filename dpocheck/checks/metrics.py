"""Do the logged numbers equal their definition?"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.check import Case, Comparison, check, logged, scene, worst
from dpocheck.checks import draws, scenes
from dpocheck.derive import STILL
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle.theory import PAPER, Theory

REWARD = "Rafailov et al. 2023, section 4: r(x, y) = beta * log(pi_theta(y|x) / pi_ref(y|x)), up to a prompt's constant"


def _batches(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=3, steps=2)
    return [scene("six pairs in two batches", scenes.run(pairs, theory, recipe), family="metrics")]


def _metric(id: str, names: tuple[str, ...], claim: str, bug: str, rivals: tuple[Theory, ...]) -> None:
    @check(
        id, chapter="metrics", stage="metrics", level="must", needs={f"train.history.{names[0]}"}, scenes=_batches,
        draw=draws.runs("logged", still=True),
        claim=claim, source=REWARD, covers=("MET-VALUE", "MET-LINEAR"), bug=bug, rivals=rivals,
        why="People choose between runs, and stop them, by these numbers.",
        fix="Log the mean over the pairs of the quantity as it is defined, from the numbers that the loss was made of.",
    )  # fmt: skip
    def judge(case: Case) -> Comparison:
        return worst([logged(case, name) for name in names])


_metric(
    "METRIC-LOSS", ("loss",), "The logged loss is the mean over the step's pairs.",
    "Transformers 4.46 made several trainers log the loss times the accumulation steps.", (),
)  # fmt: skip
_metric(
    "METRIC-REWARDS", ("rewards/chosen", "rewards/rejected"),
    "Logged rewards are beta times the log-ratio of policy and reference, averaged over the pairs.",
    "TRL 0.20 to 0.28 logged the reward once per loss: twice the reward with two losses.",
    (PAPER.but(rewards="swapped"), PAPER.but(reward_scale="squared")),
)  # fmt: skip
_metric(
    "METRIC-MARGIN", ("rewards/margins",), "The logged margin is the chosen reward minus the rejected one.",
    "A margin taken from the policy's log-probs alone ignores the reference.", (PAPER.but(margin="policy"),),
)  # fmt: skip
_metric(
    "METRIC-ACCURACY", ("rewards/accuracies",), "The logged accuracy is the share of pairs with a positive margin.",
    "Accuracy from log-probs instead of rewards looks the same until the reference matters.",
    (PAPER.but(accuracy="logps"), PAPER.but(accuracy="less")),
)  # fmt: skip
_metric(
    "METRIC-LOGPS", ("logps/chosen", "logps/rejected"),
    "Logged log-probs are the policy's sums over completion tokens, averaged over the pairs.",
    "LLaMA-Factory filled the chosen column with the rejected values for two weeks.",
    (PAPER.but(logps_logged="swapped"),),
)  # fmt: skip


def _evaluation(theory: Theory) -> list:
    pairs = scenes.rectangular(8)
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=8, eval_batch=8)
    run = scenes.run(pairs, theory, recipe)
    held = (("held", run.rows),)
    whole = replace(run, evaluation=held)
    return [
        scene(f"eight held-out pairs in batches of {size}", replace(whole, recipe=replace(recipe, eval_batch=size)),
              family="evaluation")
        for size in (3, 5)
    ]  # fmt: skip


@check(
    "EVAL-BATCH", chapter="metrics", stage="metrics", level="must", needs={"train.history.rewards/margins"},
    draw=draws.runs("logged", still=True, held_out=True),
    scenes=_evaluation, rivals=(),
    claim="Evaluation metrics are means over the pairs, whatever the evaluation batch size.",
    source="the definition of a mean over an evaluation set", covers=("MET-AGG",),
    why="Two runs that were evaluated with different batch sizes cannot be compared.",
    bug="TRL, all versions to 1.16: eval rewards, margins and accuracies are unweighted means of batch means; "
    "a short last batch counts too much.",
    fix="Sum over pairs and divide by their number, once.",
)  # fmt: skip
def eval_batch(case: Case) -> Comparison:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return worst([logged(case, name, split="held") for name in names])
