"""What is asked of a subject that has its beta, or its kind of loss, hard-coded?  The same, at its own beta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpocheck.experiment import Experiment, LossExperiment, Objective, StepExperiment

FOUR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
ORDINARY = 0.5  # the beta of experiments that are not about beta


def own(experiment: Experiment, only: Mapping[str, Any]) -> Experiment:
    """The experiment at the one beta a subject has.  `only`: option -> the value it is fixed at.

    A loss experiment keeps its margins beta * h, its log-probs being scaled: a check that places margins finds them
    where it put them.  Experiments about other betas stay as they are: the subject refuses them, and their checks
    become not-applicable.
    """
    if "beta" not in only or not isinstance(experiment, LossExperiment | StepExperiment):
        return experiment
    if experiment.objective.beta != ORDINARY:
        return experiment
    changes: dict[str, Any] = {"objective": replace(experiment.objective, beta=only["beta"])}
    if isinstance(experiment, LossExperiment):
        scale = ORDINARY / only["beta"]
        changes |= {name: tuple(scale * logp for logp in getattr(experiment, name)) for name in FOUR}
    return replace(experiment, **changes)


def plain(only: Mapping[str, Any]) -> Objective:
    """The plainest objective that a subject can be asked for: that of the smoke stage."""
    return Objective(kind=only.get("kind", "sigmoid"), beta=only.get("beta", ORDINARY))
