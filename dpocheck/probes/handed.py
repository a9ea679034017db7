"""What of an experiment is handed to a subject?  Checkpoint folders, and the request that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpocheck.experiment import (
    Experiment,
    LogpExperiment,
    LossExperiment,
    StepExperiment,
    Table,
    TrainExperiment,
    to_plain,
)
from dpocheck.probes import tables
from dpocheck.probes.tokenizers import plain_words


def checkpoints(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write the checkpoint folders that an experiment needs."""
    if isinstance(experiment, LossExperiment):
        return {}
    paths = {"policy": folder / "policy"}
    if isinstance(experiment, TrainExperiment):
        disk: Table | None = experiment.edited if experiment.edited is not None else experiment.policy
        tokenizer, dtype, body = experiment.tokenizer, experiment.recipe.dtype, experiment.body
        tables.write_checkpoint(paths["policy"], disk, tokenizer, body, dtype)
        if experiment.reference is not None:
            paths["reference"] = folder / "reference"
            tables.write_checkpoint(paths["reference"], experiment.reference, tokenizer, body, dtype)
        return paths
    if isinstance(experiment, LogpExperiment):
        words = plain_words(experiment.table.size)
        tables.write_checkpoint(paths["policy"], experiment.table, words, experiment.body, experiment.dtype)
        return paths
    assert isinstance(experiment, StepExperiment)
    words = plain_words(experiment.policy.size)
    paths["reference"] = folder / "reference"
    tables.write_checkpoint(paths["policy"], experiment.policy, words, experiment.body, experiment.dtype)
    tables.write_checkpoint(paths["reference"], experiment.reference, words, experiment.body, experiment.dtype)
    return paths


def request(experiment: Experiment, paths: dict[str, Path], folder: Path) -> dict[str, Any]:
    """The payload of an `observe` request."""
    named = {name: str(path) for name, path in paths.items()}
    return {"experiment": to_plain(experiment), "folder": str(folder)} | named
