"""Do the logged numbers equal their definition?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, cannot_tell, check, logged, scene, worst
from dpocheck.checks import draws, scenes
from dpocheck.derive import STILL
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.reading import entries

REWARD = "Rafailov et al. 2023, section 4: r(x, y) = beta * log(pi_theta(y|x) / pi_ref(y|x)), up to a prompt's constant"


def _batches(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=3, steps=2)
    # Four times the logits, and a start in the list of numbers from which every rival logs another number: rewards
    # beyond 5, and accuracies that differ between micro-batches, between rewards and log-probs, and from 1/2.
    wide = {"policy": scenes.table(pairs, 1, scale=4.0), "reference": scenes.table(pairs, 5, scale=4.0)}
    split = scenes.run(pairs, theory, replace(recipe, batch=2, accumulation=3, steps=1), **wide)
    return [
        scene("six pairs in two batches", scenes.run(pairs, theory, recipe), family="metrics"),
        scene("six pairs as three micro-batches of one step, rewards beyond 5", split, family="metrics"),
        scene("six pairs in one batch", scenes.run(pairs, theory), family="metrics"),  # for trainers that shuffle
    ]


WINDOW = (PAPER.but(window_metrics="last"), PAPER.but(window_metrics="sum"))


def _metric(id: str, names: tuple[str, ...], claim: str, bug: str, rivals: tuple[Theory, ...]) -> None:
    @check(
        id, chapter="metrics", stage="metrics", level="must", needs={f"train.history.{names[0]}"}, scenes=_batches,
        draw=draws.runs("logged", still=True),
        claim=claim, source=REWARD, covers=("MET-VALUE", "MET-LINEAR"), bug=bug, rivals=rivals,
        why="People choose between runs, and stop them, by these numbers.",
        fix="Log the mean over the pairs of the quantity as it is defined, from the numbers that the loss was made of.",
    )  # fmt: skip
    def judge(case: Case) -> Comparison:
        return worst([logged(case, name) for name in names] + [_power(case, names)])


def _power(case: Case, names: tuple[str, ...]) -> Comparison:
    """On micro-batches every rival must log another number in one of the metrics, or a pass would prove nothing."""
    if case.experiments[0].recipe.accumulation > 1:
        for wrong in case.rivals:
            if not any(_apart(case, name, wrong) for name in names):
                return Comparison("unknown", reason=cannot_tell(wrong))
    return Comparison("not-applicable")


def _apart(case: Case, name: str, wrong: Theory) -> bool:
    paper = entries(case.predicted().history, "train", name)
    rival = entries(case.rival(**wrong.differs()).history, "train", name)
    limit = 4 * np.asarray(case.bound(f"history.train.{name}"))
    return bool(np.any(np.abs(np.subtract(rival, paper)) > limit))


_metric(
    "METRIC-LOSS", ("loss",), "The logged loss is the mean over the step's pairs.",
    "Transformers 4.46 made several trainers log the loss times the accumulation steps.",
    (PAPER.but(loss_logged="last"), PAPER.but(loss_logged="sum"), PAPER.but(loss_logged="divided-twice")),
)  # fmt: skip
_metric(
    "METRIC-REWARDS", ("rewards/chosen", "rewards/rejected"),
    "Logged rewards are beta times the log-ratio of policy and reference, averaged over the pairs.",
    "TRL 0.20 to 0.28 logged the reward once per loss: twice the reward with two losses.",
    (PAPER.but(rewards="swapped"), PAPER.but(rewards="clipped"), *WINDOW),
)  # fmt: skip
_metric(
    "METRIC-MARGIN", ("rewards/margins",), "The logged margin is the chosen reward minus the rejected one.",
    "A margin taken from the policy's log-probs alone ignores the reference.",
    (PAPER.but(margin="policy"), PAPER.but(margin="absolute"), *WINDOW),
)  # fmt: skip
_metric(
    "METRIC-ACCURACY", ("rewards/accuracies",), "The logged accuracy is the share of pairs with a positive margin.",
    "Accuracy from log-probs instead of rewards looks the same until the reference matters.",
    (PAPER.but(accuracy="logps"), PAPER.but(accuracy="less"), PAPER.but(accuracy="positive"), *WINDOW),
)  # fmt: skip
_metric(
    "METRIC-LOGPS", ("logps/chosen", "logps/rejected"),
    "Logged log-probs are the policy's sums over completion tokens, averaged over the pairs.",
    "LLaMA-Factory filled the chosen column with the rejected values for two weeks.",
    (PAPER.but(logps_logged="swapped"),),
)  # fmt: skip


def _norms(theory: Theory) -> list:
    plain = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=6)
    clipped = replace(plain, clip_norm=2.0**-5)
    pairs = scenes.rectangular(6)
    return [
        scene(name, scenes.run(pairs, theory, recipe), family=family)
        for name, recipe, family in (
            ("six pairs", plain, "metrics"), ("six pairs, clipped at a fraction of the norm", clipped, "clip"),
            ("the same over three micro-batches", replace(clipped, batch=2, accumulation=3), "clip"),
        )
    ]  # fmt: skip


@check(
    "METRIC-GRAD-NORM", chapter="metrics", stage="metrics", level="should", needs={"train.history.grad_norm"},
    scenes=_norms, rivals=(),
    claim="The logged gradient norm is the Euclidean norm of the step's whole gradient, before clipping or after it.",
    source="Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1: the norm of all parameters' gradients",
    covers=("STEP-GRADNORM",), why="A clipping threshold is chosen by this number, and a diverging run is seen in it.",
    bug="A norm of the last micro-batch, or of a gradient that is still multiplied by the loss scale.",
    fix="Log what the clipping function returns.",
)  # fmt: skip
def grad_norm(case: Case) -> Comparison:
    return logged(case, "grad_norm")


def _short(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=2, accumulation=3)
    return [scene("five pairs as micro-batches of 2, 2 and 1", scenes.run(scenes.rectangular(5), theory, recipe),
        family="short micro-batch")]


@check(
    "METRIC-WINDOW", chapter="metrics", stage="metrics", level="must", needs={"train.history.rewards/chosen"},
    scenes=_short, rivals=(),
    claim="What is logged of a step whose last micro-batch is short is a mean over all of its pairs, or of the "
    "micro-batches' means.",
    source=REWARD, covers=("MET-AGG",), why="The last point of each epoch's curves is of some of its pairs only.",
    bug="TRL 0.14 to 0.28 cut every micro-batch of an epoch's last window to as many pairs as the last one has.",
    fix="Gather with `gather`, or cut only the batch that holds fillers.",
)  # fmt: skip
def window(case: Case) -> Comparison:
    return worst([_by_either_rule(case, name) for name in NAMES])


def _by_either_rule(case: Case, name: str) -> Comparison:
    told = [logged(replace(case, theory=case.theory.but(uneven_metrics=rule)), name)
            for rule in ("micro-batches", "pairs")]  # fmt: skip
    return next((one for one in told if one.verdict == "pass"), told[0])


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
    return worst([logged(case, name, split="held") for name in NAMES])


NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def _held_out(theory: Theory) -> list:
    run, held = _evaluation(theory)[0].experiments[0], scenes.run(scenes.rectangular(8), theory).rows
    return [scene("eight held-out pairs in two batches of four", replace(
        run, evaluation=(("held", held),), recipe=replace(run.recipe, eval_batch=4)), family="held out")]  # fmt: skip


@check(
    "EVAL-VALUE", chapter="metrics", stage="metrics", level="must", needs={"train.history.rewards/margins"},
    scenes=_held_out, rivals=(PAPER.but(reference="policy-live"),),
    claim="Evaluation loss, rewards and log-probs are those of the policy against the reference of the training.",
    source=REWARD, covers=("MET-VALUE",), why="Checkpoints are chosen by these numbers.",
    bug="TRL evaluated with the policy as its own reference in one release: eval_loss stood at log 2.",
    fix="Evaluate with the function that trains, without the backward.",
)  # fmt: skip
def eval_value(case: Case) -> Comparison:
    return worst([logged(case, name, split="held") for name in NAMES])
