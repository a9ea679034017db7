"""Does a run end at the optimum that the paper gives in closed form?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, close, scene
from dpocheck.checks import scenes
from dpocheck.checks.gradient import STRENGTHS, bradley_terry
from dpocheck.experiment import Recipe
from dpocheck.oracle.theory import PAPER, Theory

BETA = 0.5
RATE = 4 / BETA**2  # the largest rate at which gradient descent on this table never ascends
STEPS = 60


def _converged(theory: Theory) -> list:
    step, _ = bradley_terry(BETA, False)
    recipe = Recipe(step.objective, learning_rate=RATE, batch=len(step.pairs), steps=STEPS)
    run = scenes.run(step.pairs, theory, recipe, policy=step.policy, reference=step.reference)
    return [scene("36 comparisons of four completions, 60 full-batch steps from the reference", run, family="optimum")]


@check(
    "OPTIMUM-RECOVERED", chapter="optimum", stage="run", level="must", needs={"train.logits"}, scenes=_converged,
    rivals=(PAPER.but(beta_power=2.0), PAPER.but(reference="none")),
    claim="Trained on comparisons of integer strengths w, the policy becomes pi_ref * w^(1/beta), normalised.",
    source="Rafailov et al. 2023, Eq. 4 with r = log w; the hard-label minimiser of Eq. 7 on these counts is exact",
    covers=("RUN-OPTIMUM", "RUN-GAP-KL", "RUN-FLOOR", "RUN-OPT-BETA", "RUN-OPT-REF"),
    why="It is what DPO promises: the optimum of the KL-constrained reward, with no reward model.",
    bug="beta squared, a reference left out, or an extra term each end somewhere else.",
    fix="Follow the earlier checks.",
)  # fmt: skip
def recovered(case: Case) -> Comparison:
    nodes = slice(1, 1 + len(STRENGTHS))
    start = tuple(float(x) for x in case.experiments[0].reference.logits()[0, nodes])
    step, best = bradley_terry(BETA, True, start)
    replay = _log_softmax(case.predicted().logits[0, nodes])
    seen = _log_softmax(case.observed[0].logits[0, nodes])
    # On this table SGD never moves two starting points apart (rate <= 4 / beta^2), so errors add up and do not grow:
    # each step adds its rate times the error of a gradient, and two roundings of the logits.
    step = replace(step, policy=step.reference)
    size = np.abs(case.predicted().logits[0, nodes]).max()
    single = np.max(case.limit(step, "gradient", case.theory, case.precision))
    noise = 2 * STEPS * float(RATE * single + 2 * case.precision * size)
    limit = noise + float(np.max(np.abs(replay - best)))  # what sixty exact steps leave, and the rounding of them
    for wrong in case.rivals:
        other = _log_softmax(case.rival(**wrong.differs()).logits[0, nodes])
        if np.max(np.abs(other - best)) < 4 * limit:
            return Comparison("unknown", reason=f"{wrong.differs()} would end within the bound of {limit:.2g}")
    return close(seen, best, limit, label=lambda at: f"log pi of the completion of strength {STRENGTHS[at[0]]}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    high = logits.max()
    return logits - high - np.log(np.exp(logits - high).sum())
