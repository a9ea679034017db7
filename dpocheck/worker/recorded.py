"""With which arguments was a bare function called?  Recorded where it runs, so that a script can say the same.

The function is asked as in the audit, with a recorder in its place; what it is handed is written down as plain data.
Nothing of how arguments are chosen is repeated here.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpocheck.experiment import Experiment, LogpExperiment, LossExperiment, StepExperiment
from dpocheck.functions.batches import Batch
from dpocheck.probes.handed import checkpoints, request
from dpocheck.worker import answer

FORMS = {LossExperiment: "loss", LogpExperiment: "sequence_logps", StepExperiment: "step"}
NUMBERS = 600  # of a tensor that is still written out
CALLS = 8


class Unwritable(Exception):
    """An argument that cannot be written as Python text."""


def recorded(adapter: Any, experiment: Experiment) -> dict[str, Any] | None:
    """The function, and the arguments of the calls that `experiment` leads to; None where they cannot be written."""
    target = getattr(adapter, "targets", {}).get(FORMS.get(type(experiment)))
    if target is None or target.owner is not None or target.holder is not None or "." in target.name:
        return None
    calls: list[dict[str, Any]] = []
    original = target.function
    space = getattr(original, "__globals__", None)
    if space is None:
        return None

    @functools.wraps(original)
    def recorder(*positional: Any, **named: Any) -> Any:
        write = functools.partial(plain, experiment=experiment)
        watched = [watch(value) for value in (*positional, *named.values())]
        values = [value if isinstance(value, Batch) else write(value) for value in watched]
        constants = {name: write(space[name]) for name in target._globals()}
        place = len(positional)
        try:
            return original(*watched[:place], **dict(zip(named, watched[place:], strict=True)))
        finally:
            values = [write(value) if isinstance(value, Batch) else value for value in values]
            named_values = dict(zip(named, values[place:], strict=True))
            calls.append({"positional": values[:place], "named": named_values, "constants": constants})

    target.function = recorder
    try:
        _ask(adapter, experiment)
    except Unwritable:
        return None
    except Exception:  # what the function raises, the script shows too: the call before it is what is wanted
        if not calls:
            return None
    finally:
        target.function = original
    if not calls or len(calls) > CALLS:
        return None
    from dpocheck.functions.models import expected

    return {
        "function": target.name, "form": target.match.form, "roles": dict(target.match.roles), "calls": calls,
        "answers": expected(target.facts),
    }  # fmt: skip


def watch(value: Any) -> Any:
    """A batch that answers to any usual key, as one that also remembers which keys were read."""
    if not isinstance(value, Batch):
        return value

    class Watched(Batch):
        def __getitem__(self, name: str) -> Any:
            found = super().__getitem__(name)
            return self.__dict__["read"].setdefault(name, found)

    copy = Watched(value.__dict__["by_name"], [])
    dict.update(copy, value)
    copy.__dict__["read"] = {}
    return copy


def _ask(adapter: Any, experiment: Experiment) -> None:
    with tempfile.TemporaryDirectory(prefix="dpocheck-") as folder:
        place = Path(folder)
        answer.observe(adapter, experiment, request(experiment, checkpoints(experiment, place), place / "run"))


def plain(value: Any, experiment: Experiment) -> dict[str, Any]:
    """An argument as data.  Raises Unwritable."""
    again: Callable[[Any], dict[str, Any]] = functools.partial(plain, experiment=experiment)
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if hasattr(value, "named_parameters"):
        return {"model": Path(value.config._name_or_path).name}
    if hasattr(value, "detach"):
        return _tensor(value, experiment)
    if hasattr(value, "param_groups"):
        return {"optimizer": "policy"}
    if isinstance(value, Batch):
        value = value.__dict__["read"] or dict(value)
    if isinstance(value, dict):
        return {"dict": {str(name): again(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [again(item) for item in value]}
    if isinstance(value, SimpleNamespace):
        return {"namespace": {name: again(item) for name, item in vars(value).items()}}
    raise Unwritable(type(value).__name__)


def _tensor(value: Any, experiment: Experiment) -> dict[str, Any]:
    """A small tensor by its numbers; logits as rows of the experiment's table."""
    import torch

    kind = {"dtype": str(value.dtype).removeprefix("torch."), "grad": bool(value.requires_grad)}
    if value.ndim == 3 and isinstance(experiment, LogpExperiment):
        ids = torch.tensor([row.ids for row in experiment.rows])
        logits = torch.tensor(experiment.table.logits())[ids]
        for moved, rows in ((False, logits), (True, logits[:, :-1])):
            if rows.shape == value.shape and torch.equal(rows.to(value.dtype), value.detach()):
                return {"lookup": ids.tolist(), "moved": moved, **kind}
    if value.numel() > NUMBERS:
        raise Unwritable(f"{value.numel()} numbers")
    return {"tensor": value.detach().cpu().tolist(), **kind}
