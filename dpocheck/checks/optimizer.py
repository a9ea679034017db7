"""Do the schedule and Adam move the logits as their papers say?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, labels, scene, worst
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Pair, Recipe, StepExperiment, Table, TrainExperiment
from dpocheck.oracle.theory import CONVENTIONS, PAPER, Theory
from dpocheck.probes.tables import scales
from dpocheck.reading import entries


def _scheduled(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    found = []
    for shape in ("linear", "cosine"):
        recipe = Recipe(
            Objective(beta=0.5), learning_rate=8.0, batch=2, accumulation=2, steps=5, schedule=shape, warmup_steps=2
        )
        run = scenes.run(pairs[:4], theory, recipe)
        found.append(scene(f"{shape}, two steps of warm-up, five steps of two micro-batches", run, family="schedule"))
    return found


@check(
    "STEP-SCHEDULE", chapter="step", stage="run", level="must", needs={"train.logits"}, scenes=_scheduled,
    rivals=(PAPER.but(schedule="constant"), PAPER.but(first_rate="skipped"), PAPER.but(schedule="micro-step")),
    claim="The rate rises over the warm-up, then falls along the schedule that was asked for and reaches its end with "
    "the run.",
    source="linear decay; Loshchilov & Hutter 2017 (arXiv:1608.03983), Eq. 5 without restarts",
    covers=("RUN-LR", "RUN-REPLAY"),
    why="A schedule that is off by the accumulation steps ends long before the run, or never.",
    bug="OpenRLHF multiplied the horizon by the epochs twice: the rate never decayed.",
    fix="Advance the schedule once per optimizer step; its length is the number of optimizer steps.",
)  # fmt: skip
def schedule(case: Case) -> Comparison:
    """How a warm-up starts is a convention, asked with a constant rate after it.  A trainer without that is not asked,
    so that the theory says what it says of all; then each of the convention's answers is allowed."""
    starts = ("full", "zero", "shifted") if case.theory.first_rate == PAPER.first_rate else (case.theory.first_rate,)
    told = []
    for start in starts:
        one = replace(case, theory=case.theory.but(first_rate=start))
        told.append(worst([agree(one, "logits"), _logged_rate(one)]))
    return next((one for one in told if one.verdict == "pass"), told[0])


def _logged_rate(case: Case) -> Comparison:
    """The rate that is logged at a step is that step's, or the next one's: trainers log before or after it advances."""
    seen = np.array(entries(case.observed[0].history, "train", "learning_rate"))
    paper = np.array(entries(case.predicted().history, "train", "learning_rate"))
    if len(seen) != len(paper):
        return Comparison("not-applicable", reason="the learning rate of single steps is not logged")
    noise = 1e-6 * paper.max()  # rates are printed as they are: to float64, or to the six digits of a log line
    own = close(seen, paper, noise, label=lambda at: f"learning rate logged at step {at[0] + 1}")
    return own if own.verdict == "pass" or close(seen[:-1], paper[1:], noise).verdict == "fail" else replace(own,
        verdict="pass")


RATE, EPSILON = 2.0**10, 2.0**8  # in units of a parameter; a logit's gradient, about 1/8, is 2^7 of them

# ------------------------------------------------------------------------------------------------ momentum and decay


def _momentum(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, momentum=0.5, batch=2, steps=3)
    run = scenes.run(scenes.rectangular(4), theory, recipe)
    return [scene("three steps on two pairs each, momentum 1/2", run, family="momentum")]


@check(
    "STEP-MOMENTUM", chapter="step", stage="run", level="must", needs={"train.logits"}, scenes=_momentum,
    rivals=(PAPER.but(momentum_extra=-0.5),),
    claim="With momentum m the buffer is m times itself plus the gradient, and a step is the rate times the buffer.",
    source="Polyak 1964; Sutskever et al. 2013, Eqs. 1 and 2; torch.optim.SGD without dampening",
    covers=("RUN-REPLAY",),
    why="Dampened momentum, or Nesterov's, is another optimizer under the same name and the same rate.",
    bug="Momentum handed over as dampening too: steps are (1 - m) times too small.",
    fix="Pass momentum on, and neither dampening nor nesterov unless they are asked for.",
)  # fmt: skip
def momentum(case: Case) -> Comparison:
    return agree(case, "logits")


def _decay(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, weight_decay=2.0**-6, batch=4)
    adamw = Recipe(
        Objective(beta=0.5), optimizer="adamw", learning_rate=RATE, betas=(0.5, 0.9375), epsilon=EPSILON, batch=4,
        weight_decay=2.0**-3 / RATE,
    )  # fmt: skip
    return [
        scene(f"{name}, rate times decay 1/8", scenes.run(scenes.rectangular(4), theory, asked), family=family)
        for name, asked, family in (
            ("one step on four pairs", recipe, "decay"), ("one step of AdamW on four pairs", adamw, "adam decay"),
        )
    ]  # fmt: skip


@check(
    "STEP-DECAY", chapter="step", stage="run", level="should", needs={"train.logits"}, scenes=_decay,
    rivals=(PAPER.but(weight_decay_extra=-(2.0**-6)),),
    claim="Weight decay w takes the share rate * w of each weight away, once a step; with AdamW it does not go through "
    "the moments.",
    source="Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithms 1 and 2; torch.optim.SGD", covers=("RUN-REPLAY",),
    why="Where its sign or its factor is wrong, weights grow or vanish, far too slowly for the loss to show it.",
    bug="A decay given to the optimizer and to the loss as well: it acts twice.",
    fix="Hand the decay to the optimizer alone, as it was asked for.",
)  # fmt: skip
def decay(case: Case) -> Comparison:
    """Whether it enters the momentum of SGD, and whether the norms decay too, is open."""
    if case.experiments[0].recipe.optimizer == "adamw":
        return _decoupled(case)
    told = [agree(replace(case, theory=case.theory.but(decay=rule)), "logits") for rule in CONVENTIONS["decay"]]
    return next((one for one in told if one.verdict == "pass"), told[0])


def _decoupled(case: Case) -> Comparison:
    """The decay is what AdamW is named for: added to the gradient, Adam divides it by the gradient's own size."""
    run, seen = case.experiments[0], case.observed[0]

    def against(rule: str) -> Comparison:
        expected, noise = adam_replay(run, case, rule)
        return close(seen.logits, expected, noise + seen.floor.get("logits", 0.0), label=labels(run, "logits"))

    told = against("decoupled")
    if told.verdict == "fail" and against("coupled").verdict == "pass":
        return replace(told, where=f"{told.where}: the decay is added to the gradient, as an L2 penalty on the loss is")
    return told


# --------------------------------------------------------------------------------------------------------------- Adam


def _adam(theory: Theory) -> list:
    pairs = scenes.rectangular(4)
    base = Recipe(
        Objective(beta=0.5), optimizer="adamw", learning_rate=RATE, betas=(0.5, 0.9375), epsilon=EPSILON, batch=2
    )
    return [
        scene("one step on two pairs", scenes.run(pairs, theory, base), family="adam"),
        scene("three steps on two pairs each", scenes.run(pairs, theory, replace(base, steps=3)), family="adam"),
    ]


@check(
    "STEP-ADAM", chapter="step", stage="run", level="must", needs={"train.logits"}, scenes=_adam,
    claim="AdamW's steps are rate * m^ / (sqrt(v^) + epsilon), with betas and epsilon as asked for and both averages "
    "corrected for their start at zero.",
    source="Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1; Loshchilov & Hutter 2019 (arXiv:1711.05101)",
    covers=("RUN-REPLAY",), why="It is the optimizer that people use, and no check with SGD sees it.",
    bug="Betas that a configuration accepts and the optimizer never gets.",
    fix="Pass betas and epsilon on; correct both averages; put epsilon outside the root.",
)  # fmt: skip
def adam(case: Case) -> Comparison:
    expected, noise = adam_replay(case.experiments[0], case)
    for wrong in ({"betas": (0.9, 0.999)}, {"epsilon": 1e-8}):
        run = case.experiments[0]
        if run.recipe.steps > 1:
            other, _ = adam_replay(replace(run, recipe=replace(run.recipe, **wrong)), case)
            if not np.any(np.abs(other - expected) > 4 * noise):
                return Comparison("unknown", reason=f"this run would not show {wrong}")
    limit = noise + case.observed[0].floor.get("logits", 0.0)
    return close(case.observed[0].logits, expected, limit, label=labels(case.experiments[0], "logits"))


def adam_replay(run: TrainExperiment, case: Case, decay: str = "decoupled") -> tuple[np.ndarray, np.ndarray]:
    """Logits after AdamW, and the largest deviation of a correct run.  `decay`: as in a `Theory`.

    A parameter is a logit over k and its gradient k times the logit's: with rate r / k^2, a step moves a logit by
    (r / k) m^ / (sqrt(v^) + epsilon / k), averages taken over the logits' gradients.  With G the greatest gradient,
    the step changes by at most (1 + G / e) / e per unit of error in the gradients, e = epsilon / k.  Pairs own their
    tokens, so that the gradient of B pairs changes by at most (beta^2 / 4 * |d|^2 + beta / 2) / B per unit of error
    in the logits, with |d|^2 <= 2 for each of a pair's six tokens.  Averages with powers, root and quotient are 16
    roundings; the sum is stored with one more.  The decay's share is rounded twice, its product with a weight once.
    """
    recipe, u = run.recipe, case.precision
    k = scales(recipe.dtype).k
    rate, e = recipe.learning_rate / k, recipe.epsilon / k
    logits, pairs = run.policy.logits(), scenes.rectangular(len(run.rows))
    first = second = np.zeros_like(logits)
    carried, beta = 0.0, recipe.objective.beta
    for step in range(recipe.steps):
        start = step * recipe.batch % len(pairs)
        gradient, open_ = _gradient(run, case, logits, pairs[start : start + recipe.batch])
        if decay == "coupled":
            gradient = gradient + recipe.weight_decay * logits
        first = recipe.betas[0] * first + (1 - recipe.betas[0]) * gradient
        second = recipe.betas[1] * second + (1 - recipe.betas[1]) * gradient**2
        m, v = first / (1 - recipe.betas[0] ** (step + 1)), second / (1 - recipe.betas[1] ** (step + 1))
        move = rate * m / (np.sqrt(v) + e)
        steep = rate / e * (1 + float(np.abs(m).max()) / e)
        bend = (3 * beta**2 + beta / 2) / recipe.batch
        carried = carried * (1 + steep * bend) + steep * open_ + 16 * u * float(np.abs(move).max())
        roundings = 5 if recipe.weight_decay else 2
        carried += roundings * u * float(np.abs(logits).max(where=logits > scenes.NEVER, initial=1.0))
        share = recipe.learning_rate * recipe.weight_decay if decay == "decoupled" else 0.0
        logits = (1.0 - share) * logits - move
    return logits, np.full_like(logits, carried)


def _gradient(run: TrainExperiment, case: Case, logits: np.ndarray, pairs: tuple[Pair, ...]) -> tuple[np.ndarray,
    float]:
    words = run.tokenizer
    step = StepExperiment(Table.of(logits), run.reference, pairs, run.recipe.objective, pad=words.pad, eos=words.eos)
    gradient = case.predict(replace(step, dtype="float64"), case.theory).gradient
    return gradient, float(np.max(case.limit(step, "gradient", case.theory, case.precision)))
