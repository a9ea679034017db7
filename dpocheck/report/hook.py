"""What does a stand-alone script need of a subject?  Asked in a process of its own, beside the trainer.

    python -m dpocheck.report.hook < {"subject": ..., "recipes": [...], "asked": [...], "experiments": [...]}

answers with JSON.  Of an adapter: `train` (one source text a recipe, from its hook `standalone(recipe)`); or `traces`
(the calls it makes of its library, one list a recipe, `trace.py`), `source` (its file) and `attribute` (what to call
in it).  Of a bare function: `calls`, one record an experiment (`recorded.py`).
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 60.0


def ask(
    subject: str, recipes: Sequence[Any] = (), experiments: Sequence[Any] = (), python: str | None = None,
    asked: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `subject` offers for scripts of these recipes or experiments; {} where it cannot be asked.

    `asked`: of each recipe's run what `trace.traced` wants to know.
    """
    from dpocheck.experiment import to_plain

    question = json.dumps({
        "subject": subject, "recipes": to_plain(list(recipes)), "experiments": to_plain(list(experiments)),
        "asked": list(asked),
    })  # fmt: skip
    try:
        done = subprocess.run(
            [python or sys.executable, "-m", "dpocheck.report.hook"], input=question, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        answer = json.loads(done.stdout.rsplit("\n", 2)[-2])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return {}
    return answer if isinstance(answer, dict) else {}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    from dpocheck.experiment import from_plain
    from dpocheck.worker.loading import load

    adapter = load(question["subject"])
    if question["experiments"]:
        from dpocheck.report.recorded import recorded

        return {"calls": [recorded(adapter, experiment) for experiment in from_plain(question["experiments"])]}
    package = getattr(adapter, "package", None)
    if callable(hook := getattr(adapter, "standalone", None)):
        return {"package": package, "train": [hook(from_plain(recipe)) for recipe in question["recipes"]]}
    module = inspect.getmodule(type(adapter))
    place, _, attribute = question["subject"].partition(":")
    if module is None or module.__name__.partition(".")[0] == "dpocheck":
        return {}
    found = attribute or type(adapter).__qualname__
    traces: list[Any] = []
    for recipe, run in zip(question["recipes"], question["asked"], strict=False):
        from dpocheck.report.trace import traced

        if (trace := traced(adapter, run, from_plain(recipe))) is None:
            traces = []
            break
        traces.append(trace)
    source = inspect.getsource(module)
    return {"traces": traces, "package": package, "source": source, "attribute": found, "place": place}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))))
