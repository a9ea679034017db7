"""Puts experiments to functions as the worker does, and the numbers they should give, by plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.experiment import LogpExperiment, LossExperiment, StepExperiment, to_plain
from dpocheck.probes import tables
from dpocheck.probes.tokenizers import plain_words
from dpocheck.worker import requests

SUBJECTS = Path(__file__).parent / "subjects"


def ask(subject: str, experiment: Any, folder: Path | None = None) -> dict[str, Any]:
    """Fields and arrays of the answer to one experiment.  `subject`: `file:name`, the file one of SUBJECTS."""
    place, _, name = subject.partition(":")
    path = place if place.endswith(".py") else str(SUBJECTS / f"{place}.py")
    state: dict[str, Any] = {}
    known = {"subject": f"{path}:{name}" if name else path}
    opened, _ = requests.handle("open", known, {}, state)
    payload = known | {"experiment": to_plain(experiment)}
    if not isinstance(experiment, LossExperiment):
        payload |= checkpoints(experiment, folder)
    reply, arrays = requests.handle("observe", payload, {}, state)
    return opened | reply | reply.get("fields", {}) | arrays


def checkpoints(experiment: LogpExperiment | StepExperiment, folder: Path) -> dict[str, str]:
    """The policy and the reference of an experiment as checkpoint folders."""
    written = {}
    models = {"policy": getattr(experiment, "policy", None) or experiment.table}
    if isinstance(experiment, StepExperiment):
        models["reference"] = experiment.reference
    for name, table in models.items():
        tables.write_checkpoint(folder / name, table, plain_words(table.size), experiment.body, experiment.dtype)
        written[name] = str(folder / name)
    return written


def log_probs(table: Any) -> np.ndarray:
    """(context, target): log softmax of each row of a table."""
    logits = table.logits()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def sequence_logp(table: Any, ids: tuple[int, ...], counted: tuple[int, ...]) -> float:
    """The sum of log pi(token given the one before) over counted tokens: a table knows one token of context."""
    each = log_probs(table)
    return sum(each[ids[i - 1], ids[i]] for i in range(1, len(ids)) if counted[i])


def logp_gradient(table: Any, ids: tuple[int, ...], counted: tuple[int, ...]) -> np.ndarray:
    """d logp / d logit: one at the token, minus the softmax of the row, for each counted token."""
    gradient, soft = np.zeros((table.size, table.size)), np.exp(log_probs(table))
    for i in range(1, len(ids)):
        if counted[i]:
            gradient[ids[i - 1]] -= soft[ids[i - 1]]
            gradient[ids[i - 1], ids[i]] += 1
    return gradient


def dpo_step(experiment: StepExperiment) -> tuple[float, np.ndarray]:
    """Loss and gradient of every logit: mean over pairs of -log sigma(m), and of -beta sigma(-m) (grad w - grad l)."""
    losses, gradient = [], np.zeros((experiment.policy.size, experiment.policy.size))
    beta = experiment.objective.beta
    for pair in experiment.pairs:
        rows = [(*pair.prompt, *pair.chosen), (*pair.prompt, *pair.rejected)]
        masks = [(0,) * len(pair.prompt) + (1,) * (len(row) - len(pair.prompt)) for row in rows]
        ratio = [
            sequence_logp(experiment.policy, row, mask) - sequence_logp(experiment.reference, row, mask)
            for row, mask in zip(rows, masks, strict=True)
        ]
        margin = beta * (ratio[0] - ratio[1])
        losses.append(np.log1p(np.exp(-margin)))
        weight = beta / (1 + np.exp(margin)) / len(experiment.pairs)
        gradient -= weight * logp_gradient(experiment.policy, rows[0], masks[0])
        gradient += weight * logp_gradient(experiment.policy, rows[1], masks[1])
    return float(np.mean(losses)), gradient
