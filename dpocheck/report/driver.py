"""How is the trainer driven in a script?  By its adapter's own text, its calls one by one, or the adapter's file."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

from dpocheck.report import calls
from dpocheck.report.render import render

OURS = ("dpocheck.adapter", "dpocheck.huggingface")  # what adapters import of dpocheck
STAND_INS = {  # of what adapters import from dpocheck.adapter
    "Unsupported": 'Unsupported = type("Unsupported", (Exception,), {})',
    "TrainOut": 'TrainOut = namedtuple("TrainOut", "policy history checkpoints", defaults=((), {}))',
    "StepOut": 'StepOut = namedtuple("StepOut", "loss metrics", defaults=({},))',
    "LossOut": 'LossOut = namedtuple("LossOut", "loss rewards_chosen rewards_rejected", defaults=(None, None))',
    "Says": "Says = dict",
    **{name: f"{name} = object" for name in ("Adapter", "Objective", "PairBatch", "Probe", "Recipe", "TokenBatch")},
}

GLUE = (
    "def run_trainer(run, policy, reference, rows, out):\n"
    '    held_out = {name: held for name, held in rows.items() if name != "train"}\n'
)


@dataclass(frozen=True)
class Trainer:
    """The text that drives a trainer in a script: `run_trainer(run, policy, reference, rows, out)`."""

    text: str
    pasted: str = ""
    package: str | None = None
    alone: bool = True
    options: list[dict[str, str]] | None = None  # what is each run's own, as text


def hooked(answer: dict[str, Any]) -> Trainer:
    """The adapter's own text for each recipe; equal texts once."""
    texts = list(dict.fromkeys(answer["train"]))
    if len(texts) == 1:
        body, choose = texts[0].strip(), "train"
    else:
        named = [text.strip().replace("def train(", f"def train_{place}(") for place, text in enumerate(texts, 1)]
        body = "\n\n\n".join(named)
        order = [f"train_{texts.index(text) + 1}" for text in answer["train"]]
        choose = f"[{', '.join(order)}][RUNS.index(run)]"
    glue = GLUE + f'    return {choose}(policy, reference, policy, rows["train"], held_out, out)'
    return Trainer(f"{body}\n\n\n{glue}", package=answer.get("package"))


def followed(answer: dict[str, Any]) -> Trainer | None:
    """The calls that the adapter makes of its library, one `train` for all runs where they differ in settings only."""
    if not (traces := answer.get("traces")):
        return None
    if (one := calls.merged(traces)) is None:
        return hooked(answer | {"train": [calls.function(each) for each in traces]})
    text, own = one
    last = ", **run[\"options\"]" if any(own) else ""
    glue = GLUE + f'    return train(policy, reference, policy, rows["train"], held_out, out{last})'
    return Trainer(f"{text.strip()}\n\n\n{glue}", package=answer.get("package"), options=own if any(own) else None)


def pasted(answer: dict[str, Any]) -> Trainer | None:
    """The adapter's file, with what it imports of dpocheck put before it; None where that is not known."""
    if not answer.get("source"):
        return None
    text, names = _without(answer["source"])
    helpers = ""
    if "dpocheck.huggingface" in names:
        names.remove("dpocheck.huggingface")
        helpers, own = _without(inspect.getsource(importlib.import_module("dpocheck.huggingface")))
        names += own
    if not set(names) <= set(STAND_INS):
        return None
    alone = re.search(r"^\s*(from|import)\s+dpocheck", text, re.M) is None
    stand_ins = "\n".join(STAND_INS[name] for name in dict.fromkeys(names))
    glue = render("pasted.py.j2", {"attribute": answer["attribute"]}).strip()
    whole = "\n\n\n".join(part for part in (stand_ins, helpers, text) if part)
    return Trainer(glue, whole, answer.get("package"), alone)


def _without(source: str) -> tuple[str, list[str]]:
    """A file without its imports of dpocheck and of the future, and the names that it wants of dpocheck."""
    names: list[str] = []
    cut: list[tuple[int, int]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module in (*OURS, "__future__"):
            cut.append((node.lineno, node.end_lineno or node.lineno))
            if node.module == "dpocheck.adapter":
                names += [alias.name if alias.asname is None else "" for alias in node.names]
            elif node.module == "dpocheck.huggingface":
                names.append(node.module)
    rows = source.splitlines()
    kept = [row for place, row in enumerate(rows, 1) if not any(low <= place <= high for low, high in cut)]
    return "\n".join(kept).strip(), names
