"""Does the partition function cancel?  What is added per prompt must leave the loss alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, close, equal, scene
from dpocheck.checks import draws, scenes
from dpocheck.checks.loss import ORDINARY
from dpocheck.derive import NEVER, STILL, rows
from dpocheck.experiment import LossExperiment, Objective, Pair, Recipe, Table, TrainExperiment
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.reading import entries

CANCELS = "Rafailov et al. 2023, Eq. 6: beta * log Z(x) appears twice with opposite signs"
SHIFTS = (-2.0, -0.25, -8.0, -1.0, -4.0)


def _shifted(first: str, second: str) -> LossExperiment:
    moved = {
        name: tuple(x + c for x, c in zip(getattr(ORDINARY, name), SHIFTS, strict=True)) for name in (first, second)
    }
    return replace(ORDINARY, **moved)


def _unchanged(case: Case) -> Comparison:
    visible = all(seen.per_pair is not None for seen in case.observed)
    return equal(case, "per_pair" if visible else "reduced")


@check(
    "LOGZ-REFERENCE", chapter="logz", stage="loss", level="must", needs=set(), source=CANCELS,
    draw=draws.shifted("reference"),
    scenes=[scene("five pairs, a constant per prompt on both reference log-probs", ORDINARY,
                  _shifted("reference_chosen", "reference_rejected"))],
    claim="A constant per prompt on both reference log-probs changes nothing.",
    covers=("LOSS-GAUGE-REF", "LOSS-GAUGE-RESP"), why="It is the reason why DPO needs no partition function.",
    bug="A plus for a minus in the reference's log-ratio.", fix="The reference enters as rf_w - rf_l.",
)  # fmt: skip
def reference(case: Case) -> Comparison:
    return _unchanged(case)


@check(
    "LOGZ-POLICY", chapter="logz", stage="loss", level="must", needs=set(), source=CANCELS,
    draw=draws.shifted("policy"),
    scenes=[scene("five pairs, a constant per prompt on both policy log-probs", ORDINARY,
                  _shifted("policy_chosen", "policy_rejected"))],
    claim="A constant per prompt on both policy log-probs changes nothing.", covers=("LOSS-GAUGE-POL",),
    why="The policy's unnormalised scores would be trained instead of its distribution.",
    bug="A plus for a minus in the policy's log-ratio.", fix="The policy enters as lp_w - lp_l.",
)  # fmt: skip
def policy(case: Case) -> Comparison:
    return _unchanged(case)


def _complete(theory: Theory) -> list:
    """One prompt and all of its four completions, as two pairs: no other completion has any probability."""
    eos = scenes.WORDS.eos
    pairs = (Pair((0,), (1, eos), (2, eos)), Pair((0,), (3, eos), (4, eos)))

    def four(*logits: float) -> Table:
        certain = tuple((token, eos, 0.0) for token in (1, 2, 3, 4))
        return Table(64, NEVER, tuple((0, token, logit) for token, logit in enumerate(logits, start=1)) + certain)

    run = TrainExperiment(
        four(0.75, -1.25, 0.5, -0.375), four(-0.5, 0.25, 1.125, -0.875), scenes.WORDS, rows(pairs, 64, theory),
        Recipe(Objective(beta=0.5), learning_rate=STILL, batch=1, steps=2),
    )  # fmt: skip
    return [scene("one prompt with all of its four completions", run)]


@check(
    "LOGZ-NORMALISER", chapter="logz", stage="rewards", level="must", needs={"train.history.rewards/chosen"},
    scenes=_complete, source="Rafailov et al. 2023, Eq. 9: sum over y of pi_ref(y|x) exp(r(x, y) / beta) = 1",
    rivals=(PAPER.but(reward_scale="squared"),),
    claim="Over all completions of a prompt, pi_ref * exp(reward / beta) adds up to one.",
    covers=("REW-NORMALISER", "REW-KL-SIGN"),
    why="It ties the rewards, beta, the policy's and the reference's log-probs together without any loss.",
    bug="A reference that leaves out EOS, or a mean where the policy has a sum.",
    fix="Score the same tokens, in the same way, under both models.",
)  # fmt: skip
def normaliser(case: Case) -> Comparison:
    experiment, theory = case.experiments[0], case.theory
    seen = [
        entries(case.observed[0].history, "train", f"rewards/{side}") for side in ("chosen", "rejected")
    ]
    if any(len(values) != 2 for values in seen):
        return Comparison("not-applicable", reason="the rewards of single pairs are not logged")
    logits = experiment.reference.logits()[0, 1:5]
    weights = np.exp(logits) / np.exp(logits).sum()
    beta = 1.0 if theory.reward_scale == "one" else experiment.recipe.objective.beta
    total = sum(
        weight * np.exp(reward / beta)
        for weight, reward in zip(weights, (seen[0][0], seen[1][0], seen[0][1], seen[1][1]), strict=True)
    )
    noise = np.max(case.bound("history.train.rewards/chosen")) / beta
    return close(total, 1.0, 2 * noise, label=lambda _: "sum of pi_ref * exp(reward / beta)")
