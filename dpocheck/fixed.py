"""At which objective is an experiment put to a subject?  The ordinary one, the one asked for, or its hard-coded one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpocheck.experiment import (
    DIVERGENCES,
    Experiment,
    LogpExperiment,
    LossExperiment,
    Objective,
    Sequence,
    StepExperiment,
    TrainExperiment,
)

FOUR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
ORDINARY = Objective(beta=0.5)  # of experiments that are not about the objective
LENGTH = 3  # completion tokens, where an objective per token is asked of bare numbers

# Checks whose claim holds for -log sigma(beta h) alone, and the part of it that another objective does not have.
SIGMOID_ONLY = {
    "LOSS-ZERO-MARGIN": "the loss is log 2 at zero margin",
    "LOSS-SWAP": "L(m) - L(-m) = -m",
    "LOSS-SHAPE": "the loss lies between max(0, -m) and max(0, -m) + log 2",
    "LORA-REFERENCE": "the first loss is log 2",
}
# Checks whose experiments belong together at one beta: they stay at the ordinary objective.
PLACED = ("LOSS-BETA-SCALE", "ONE-TRAINER", "GRAD-OPTIMUM", "OPTIMUM-RECOVERED")
# Claims that a further part of an objective breaks.
BROKEN_BY = {
    "LOGZ-NORMALISER": (
        lambda asked: asked.kind in ("simpo", *DIVERGENCES), "its rewards do not normalise the reference"
    ),
    "LOGZ-POLICY": (
        lambda asked: asked.sft_weight > 0 or asked.kind in DIVERGENCES, "it sees a constant on the policy's log-probs"
    ),
    "LOGZ-REFERENCE": (lambda asked: asked.kind in DIVERGENCES, "it sees a constant on the reference's log-probs"),
    "LOSS-EXTREME": (lambda asked: asked.kind in DIVERGENCES, "no float holds a ratio of e^20000"),
    "LOSS-VALUE-GRADIENT": (lambda asked: asked.kind in DIVERGENCES, "the remainder of its difference is another"),
} | dict.fromkeys(("REF-PRECOMPUTED", "RUN-COVERAGE"), (
    lambda asked: asked.kind in ("forward_kl", "alpha_divergence"), "no float holds the powers of the ratios it ends at"
))  # fmt: skip
# Checks that need a reference that is not the policy; a subject that has no way to take one cannot be asked them.
TWO_MODELS = ("GRAD-OPTIMUM", "REF-CACHE-FRESH")
# How a judge says that its input has no power.  At another objective that is the objective's doing.
NO_POWER = ("this input cannot tell", "would end within the bound", "would not show", "is not told apart")


def own(experiment: Experiment, only: Mapping[str, Any], asked: Objective | None = None) -> Experiment:
    """The experiment at the objective that is asked for, or at the one beta that a subject has.

    `only`: option -> the value it is fixed at in the subject; `lengths`: how many tokens its log-probs are sums of.
    `asked`: what takes the place of the ordinary objective.
    A loss experiment keeps its margins beta * h, its log-probs being scaled: a check that places margins finds them
    where it put them.  Experiments about other objectives stay as they are: a subject that has none of them refuses
    them, and their checks become not-applicable.
    """
    if isinstance(experiment, Sequence):
        return replace(experiment, runs=tuple(own(run, only, asked) for run in experiment.runs))
    if isinstance(experiment, LogpExperiment):
        return experiment
    if isinstance(experiment, TrainExperiment):
        recipe = experiment.recipe
        return replace(experiment, recipe=replace(recipe, objective=_own(recipe.objective, {}, asked)))
    if isinstance(experiment, LossExperiment) and experiment.lengths is None and "lengths" in only:
        experiment = replace(experiment, lengths=(tuple(only["lengths"]),) * len(experiment.policy_chosen))
    objective = _own(experiment.objective, only, asked)
    if objective == experiment.objective:
        return experiment
    return _scaled(experiment, objective) if isinstance(experiment, LossExperiment) else replace(
        experiment, objective=objective
    )  # fmt: skip


def objectives_of(experiment: Experiment) -> tuple[Objective, ...]:
    """The objectives at which an experiment is asked; none of log-probs alone."""
    if isinstance(experiment, Sequence):
        return tuple(run.recipe.objective for run in experiment.runs)
    if isinstance(experiment, TrainExperiment):
        return (experiment.recipe.objective,)
    return () if isinstance(experiment, LogpExperiment) else (experiment.objective,)


def at_start(experiment: Experiment) -> Experiment:
    """The same with the policy as its reference, for a subject whose reference is always the model it starts from.

    Log-probs alone, and bare numbers, have no model in them and stay as they are.
    """
    if isinstance(experiment, Sequence):
        return replace(experiment, runs=tuple(map(at_start, experiment.runs)))
    if not isinstance(experiment, TrainExperiment | StepExperiment) or experiment.reference is None:
        return experiment
    return replace(experiment, reference=experiment.policy)


def _own(objective: Objective, only: Mapping[str, Any], asked: Objective | None) -> Objective:
    if asked is not None and objective == ORDINARY:
        return asked
    if "beta" in only and objective.beta == ORDINARY.beta:
        return replace(objective, beta=only["beta"])
    return objective


def _scaled(experiment: LossExperiment, objective: Objective) -> LossExperiment:
    """The same margins under another objective; per token, completions of three tokens each."""
    scale, lengths = experiment.objective.beta / objective.beta, experiment.lengths
    if lengths is None and (objective.kind in ("ipo", "simpo") or objective.length_normalised or objective.sft_weight):
        lengths = ((LENGTH, LENGTH),) * len(experiment.policy_chosen)
    numbers = {name: tuple(scale * logp for logp in getattr(experiment, name)) for name in FOUR}
    return replace(experiment, objective=objective, lengths=lengths, **numbers)


def plain(only: Mapping[str, Any]) -> Objective:
    """The plainest objective that a subject can be asked for: that of the smoke stage."""
    return Objective(kind=only.get("kind", ORDINARY.kind), beta=only.get("beta", ORDINARY.beta))


def asked_of(check: str, asked: Objective | None) -> Objective | None:
    """What takes the place of the ordinary objective in the experiments of a check."""
    return None if check in PLACED else asked


def outside(check: str, asked: Objective | None) -> str | None:
    """Why a check says nothing about the objective asked for; None where it does."""
    if asked is None or replace(asked, beta=ORDINARY.beta) == ORDINARY:
        return None
    if check in SIGMOID_ONLY:
        return f"only of the sigmoid loss is it true that {SIGMOID_ONLY[check]}; asked for is {words(asked)}"
    if check in PLACED:
        return f"its numbers are placed for {words(ORDINARY)}; asked for is {words(asked)}"
    if check in BROKEN_BY and BROKEN_BY[check][0](asked):
        return f"{BROKEN_BY[check][1]}; asked for is {words(asked)}"
    return None


def powerless(reason: str, asked: Objective | None, only: Mapping[str, Any]) -> str | None:
    """Where a judge cannot tell at the objective asked for, or with the policy as the reference, what it can tell
    otherwise: that, in words."""
    if not any(phrase in reason for phrase in NO_POWER):
        return None
    if only.get("reference") == "policy":
        return f"the reference is always the policy it starts from: {reason}"
    if asked is None or asked == ORDINARY:
        return None
    return f"made for {words(ORDINARY)}; at {words(asked)}: {reason}"


def clash(only: Mapping[str, Any], asked: Objective | None) -> str | None:
    """Why a subject cannot be asked for the objective: it has another one hard-coded; None where it can."""
    for name, value in only.items():
        if asked is not None and hasattr(asked, name) and getattr(asked, name) != value:
            return f"{words(asked)} was asked for, and the subject has its {name} fixed at {value}"
    return None


def words(objective: Objective) -> str:
    """An objective in a line, as `--objective` reads it."""
    kind = "dpo" if objective.kind == "sigmoid" else objective.kind
    values = {name: getattr(objective, name) for name in ("beta", "label_smoothing", "gamma", "sft_weight")}
    settings = "".join(f",{name}={value:g}" for name, value in values.items() if value)
    settings += f",alpha={objective.alpha:g}" if kind == "alpha_divergence" else ""
    return kind + settings + (",length_normalised=true" if objective.length_normalised else "")
