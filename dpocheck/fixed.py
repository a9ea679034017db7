"""What is asked of a subject that has its beta, or its kind of loss, hard-coded?  The same, at its own beta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpocheck.experiment import Experiment, LossExperiment, Objective, StepExperiment

ORDINARY = 0.5  # the beta of experiments that are not about beta


def own(experiment: Experiment, only: Mapping[str, Any]) -> Experiment:
    """The experiment at the one beta a subject has.  `only`: option -> the value it is fixed at.

    Experiments about other betas stay as they are: the subject refuses them, and their checks become not-applicable.
    """
    if "beta" not in only or not isinstance(experiment, LossExperiment | StepExperiment):
        return experiment
    if experiment.objective.beta != ORDINARY:
        return experiment
    return replace(experiment, objective=replace(experiment.objective, beta=only["beta"]))


def plain(only: Mapping[str, Any]) -> Objective:
    """The plainest objective that a subject can be asked for: that of the smoke stage."""
    return Objective(kind=only.get("kind", "sigmoid"), beta=only.get("beta", ORDINARY))
