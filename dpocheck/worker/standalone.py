"""What does a stand-alone script need of a subject?  Asked after the audit, in the process that ran the trainer.

Of an adapter: `train` (one source text a recipe, from its hook `standalone(recipe)`); or `traces` (the calls it makes
of its library, one list a recipe), `source` (its file) and `attribute` (what to call in it).  Of a bare function:
`calls`, one record an experiment.
"""

from __future__ import annotations

import inspect
from typing import Any

from dpocheck.experiment import from_plain
from dpocheck.worker.recorded import recorded
from dpocheck.worker.trace import traced


def answer(adapter: Any, question: dict[str, Any]) -> dict[str, Any]:
    """What `adapter` offers for the recipes or experiments of a question; {} where it offers nothing.

    `question`: `subject`, and `experiments` of a bare function, or `recipes` with `asked`, what `trace.traced` wants
    to know of each recipe's run.
    """
    if question["experiments"]:
        return {"calls": [recorded(adapter, experiment) for experiment in from_plain(question["experiments"])]}
    package = getattr(adapter, "package", None)
    if callable(hook := getattr(adapter, "standalone", None)):
        return {"package": package, "train": [hook(from_plain(recipe)) for recipe in question["recipes"]]}
    module = inspect.getmodule(type(adapter))
    place, _, attribute = question["subject"].partition(":")
    if module is None or module.__name__.partition(".")[0] == "dpocheck":
        return {}
    found = attribute or type(adapter).__qualname__
    return {
        "traces": _traces(adapter, question), "package": package, "source": inspect.getsource(module),
        "attribute": found, "place": place,
    }  # fmt: skip


def _traces(adapter: Any, question: dict[str, Any]) -> list[Any]:
    """The calls of each recipe's run; none at all where one cannot be followed."""
    traces: list[Any] = []
    for recipe, run in zip(question["recipes"], question["asked"], strict=False):
        if (trace := traced(adapter, run, from_plain(recipe))) is None:
            return []
        traces.append(trace)
    return traces
