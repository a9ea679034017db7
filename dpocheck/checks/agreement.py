"""Does a whole run do what one step says, and does a trainer that can be asked in several ways answer alike?

A trainer with a `step` or a `loss` of its own answers the checks of these stages there; what its `train` adds or
leaves out shows only here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dpocheck import derive
from dpocheck.check import Case, Comparison, agree, check, close, scene, worst
from dpocheck.checks import scenes
from dpocheck.checks.logps import ROWS, batch
from dpocheck.checks.loss import ORDINARY
from dpocheck.experiment import Body, Experiment, LogpExperiment, LossExperiment
from dpocheck.oracle.numbers import ROUNDOFF
from dpocheck.oracle.theory import PAPER, Theory


def _runs(theory: Theory) -> list:
    return [
        scene("six pairs, one step of a run", scenes.run(scenes.rectangular(6), theory)),
        scene("five pairs of unequal lengths, one step of a run",
              scenes.run(scenes.ragged(), theory, body=Body("clock")), family="ragged"),
    ]  # fmt: skip


@check(
    "RUN-GRADIENT", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_runs,
    rivals=(PAPER.but(update=-1.0), PAPER.but(update=0.5), PAPER.but(reference="none")),
    claim="One full-batch step of a run moves every logit by the learning rate times its gradient.",
    source="Rafailov et al. 2023, section 4; theta' = theta - rate * gradient",
    covers=("STEP-SGD", "STEP-TAB-DIRECTION", "RUN-LR"),
    why="A right loss and a right gradient are of no use where the loop around them does something else.",
    bug="A gradient that is clipped to a norm of 1 where no clipping was asked for.",
    fix="Compare the loop with one step: batches, reference, clipping, the optimizer's arguments.",
)  # fmt: skip
def run_gradient(case: Case) -> Comparison:
    told = [agree(case, "gradient")]
    if case.observed[0].attended is not None:
        told.append(agree(replace(case, rivals=()), "attended"))
    return worst(told)


# ----------------------------------------------------------------------------------------------------- one trainer


def _asked_twice(theory: Theory) -> list:
    """One experiment as the subject answers it itself, and the runs that show the same."""
    step = scenes.step(scenes.rectangular(6))
    ways = (("loss", ORDINARY, ("train",)), ("log-probs", batch(ROWS), ("train",)), ("step", step, ("train",)),
            ("loss and step", ORDINARY, ("step",)))  # fmt: skip
    found = []
    for name, experiment, by in ways:
        plan = derive.plan(experiment, by, theory)
        if not isinstance(plan, str):
            found.append(scene(f"{name}, asked twice", experiment, *plan.experiments, family="asked twice"))
    return found


@check(
    "ONE-TRAINER", chapter="step", stage="step", level="must", needs=set(), scenes=_asked_twice,
    claim="What a trainer answers when its loss, its log-probs or its step is called is what its runs do.",
    source="one trainer has one loss", covers=("LOSS-FD", "STEP-SGD"),
    why="Tests of a loss function prove nothing about a loop that does not use it, or uses it differently.",
    bug="Liger-Kernel's fused loss beside a trainer that kept its own.",
    fix="Let the loop call the function that is tested.",
)  # fmt: skip
def one_trainer(case: Case) -> Comparison:
    if case.observed[0].via == "derived":
        return Comparison("not-applicable", reason="the subject answers this in one way only")
    runs = tuple(case.observed[1:])
    by = ("train",) if hasattr(runs[0], "logits") else ("step",)
    plan = derive.plan(case.experiments[0], by, case.theory)
    other, first = plan.read(runs), case.observed[0]
    told = []
    for name, label in _shown(case.experiments[0]):
        left, right = getattr(first, name), getattr(other, name)
        if left is None or right is None:
            continue
        limit = 2 * np.asarray(case.bound(name)) + other.floor.get(name, 0.0) + _kept(case)
        told.append(close(right, left, limit, label=label))
    return worst(told) if told else Comparison("not-applicable", reason="the two ways have no number in common")


def _kept(case: Case) -> np.ndarray | float:
    """What a reference that is declared to be kept in a coarser type adds to the losses that are read from runs.

    A log-prob lp is that of a table whose logits are at most |lp| + log V; their roundings move it by twice as much.
    """
    experiment, unit = case.experiments[0], ROUNDOFF.get(case.theory.reference_dtype, 0.0)
    if not unit or not isinstance(experiment, LossExperiment):
        return 0.0
    sizes = np.abs(experiment.arguments()[2:]) + np.log(scenes.SIZE)
    return experiment.objective.beta * 2.0 * unit * sizes.sum(axis=0)


def _shown(experiment: Experiment) -> tuple[tuple[str, Any], ...]:
    if isinstance(experiment, LossExperiment):
        return (("per_pair", lambda at: f"loss of pair {at[0] + 1}, in the runs"),)
    if isinstance(experiment, LogpExperiment):
        return (("logps", lambda at: f"log-prob of row {at[0] + 1}, in the run's log"),)
    return (
        ("gradient", lambda at: f"gradient of token {at[1]} after {at[0]}, in the run"),
        ("loss", lambda _: "loss of the batch, in the run's log"),
    )
