"""How is the failure of a bare function shown without dpocheck?  By calling it with the numbers it was called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.experiment import LogpExperiment, LossExperiment, StepExperiment
from dpocheck.functions.parameters import FOUR
from dpocheck.literal import literal
from dpocheck.probes import tables
from dpocheck.report.front import conventions, front
from dpocheck.report.render import render
from dpocheck.report.words import line
from dpocheck.result import Report, Result

WIDTH = 112
CELLS = 12  # of a gradient


def function_script(result: Result, report: Report, subject: str, calls: list[dict[str, Any] | None]) -> str | None:
    """The script of a result whose experiments a function answered itself; `calls` are those of `recorded.recorded`."""
    if not calls or not all(calls):
        return None
    experiments = result.experiments
    first, call = experiments[0], calls[0]
    models = not isinstance(first, LossExperiment) and any("model" in str(one["calls"]) for one in calls)
    if models and any(experiment.body.kind != "silent" for experiment in experiments):
        return None
    place, _, _ = subject.partition(":")
    path = Path(place).resolve() if place.endswith(".py") else None
    scale = tables.scales(first.dtype)
    size = 0 if isinstance(first, LossExperiment) else _tables(first)["policy"].size
    needs = f"Needs torch{' and transformers' if models else ''}, and the file of the function; nothing else."
    values = {
        **front(result, report, None, needs), "path": literal(str(path)) if path else "",
        "folder": literal(str(path.parent)) if path else "", "module": literal(place), "models": models,
        "lookup": "lookup" in str(calls), "step": isinstance(first, StepExperiment), "size": size, "c": scale.c,
        "k": scale.k, "dtype": first.dtype, "answers": call["answers"], "optimizer": "optimizer" in str(calls),
        "expected_words": literal(f"Expected: {line(result.claim)}"),
        "tolerance": 1e-2 if "16" in first.dtype else 1e-5,
        "calls": [_call(experiment, one, report, number, len(experiments))
                  for number, (experiment, one) in enumerate(zip(experiments, calls, strict=True), 1)],
    }  # fmt: skip
    return render("function.py.j2", values)


def _tables(experiment: Any) -> dict[str, Any]:
    if isinstance(experiment, StepExperiment):
        return {"policy": experiment.policy, "reference": experiment.reference}
    return {"policy": experiment.table}


def _call(experiment: Any, record: dict[str, Any], report: Report, number: int, of: int) -> dict[str, str]:
    """The text of one experiment: models and tensors, the call, and observed beside expected."""
    lines: list[str] = []
    if not isinstance(experiment, LossExperiment):
        made = "model" if "model" in str(record["calls"]) else "table"
        for name, table in _tables(experiment).items():
            entries = literal([tuple(entry) for entry in table.entries], WIDTH - 20)
            lines.append(f"{name} = {made}({table.base!r}, {entries})")
    for place, call in enumerate(record["calls"]):
        lines += _one(experiment, record, call, report, place)
    title = f"experiment {number} of {of}" if of > 1 else f"{record['function']}, {record['form']}"
    return {"title": title, "text": "\n".join(lines)}


def _one(experiment: Any, record: dict[str, Any], call: dict[str, Any], report: Report, place: int) -> list[str]:
    lines = [f"subject.{name} = {_text(value)}" for name, value in call["constants"].items()]
    arguments = [_text(value) for value in call["positional"]]
    for name, value in call["named"].items():
        if "tensor" in value or "lookup" in value:
            lines.append(f"{name} = {_text(value)}")
            arguments.append(f"{name}={name}")
        else:
            arguments.append(f"{name}={_text(value)}")
    text = f"out = subject.{record['function']}({', '.join(arguments)})"
    if len(text) > WIDTH:
        inside = ",\n".join("    " + argument.replace("\n", "\n    ") for argument in arguments)
        text = f"out = subject.{record['function']}(\n{inside},\n)"
    lines += [text, "out = out[0] if isinstance(out, tuple) else out"]
    return lines + _expected(experiment, record, call, report, place)


def _text(value: dict[str, Any]) -> str:
    """An argument as Python text."""
    if "tensor" in value or "lookup" in value:
        dtype = f"dtype=torch.{value['dtype']}"
        if "lookup" in value:
            moved = "[:, :-1]" if value["moved"] else ""
            text = f"policy[torch.tensor({literal(value['lookup'], WIDTH)})]{moved}.to({dtype})"
            return f"{text}.requires_grad_()" if value["grad"] else text
        grad = ", requires_grad=True" if value["grad"] else ""
        return f"torch.tensor({literal(value['tensor'], WIDTH)}, {dtype}{grad})"
    if "model" in value:
        return value["model"]
    if "dict" in value:
        return "{" + ", ".join(f"{literal(name)}: {_text(item)}" for name, item in value["dict"].items()) + "}"
    if "list" in value:
        return "[" + ", ".join(_text(item) for item in value["list"]) + "]"
    if "namespace" in value:
        inside = ", ".join(f"{name}={_text(item)}" for name, item in value["namespace"].items())
        return f"__import__('types').SimpleNamespace({inside})"
    if "optimizer" in value:
        return "Recording(policy.parameters(), lr=0.0)"
    return literal(value["value"])


def _expected(experiment: Any, record: dict[str, Any], call: dict[str, Any], report: Report, place: int) -> list[str]:
    """Lines that print what the papers say beside what came out."""
    from dpocheck.oracle import predict

    seen = predict(experiment, conventions(report))
    if isinstance(experiment, LogpExperiment):
        return [_show("log-prob of row", "out", seen.logps)]
    if isinstance(experiment, StepExperiment):
        return _step(experiment, seen)
    if len(record["calls"]) > 1:  # once a pair
        return [_show(f"loss of pair {place + 1}", "out", seen.per_pair[place : place + 1])]
    lines = [_show("loss of pair", "out", seen.per_pair)]
    leaves = [(name, role) for name, role in record["roles"].items() if call["named"].get(name, {}).get("grad")]
    if leaves and seen.slopes is not None and all(role in FOUR for _, role in leaves):
        lines.append("(out.mean() if out.ndim else out).backward()")
        for name, role in leaves:
            lines.append(_show(f"slope in {name}", f"{name}.grad", seen.slopes[FOUR.index(role)]))
    return lines


def _step(experiment: StepExperiment, seen: Any) -> list[str]:
    """The loss, and the cells of the gradient that should be largest."""
    lines = [] if seen.loss is None else [_show("loss", "out", [seen.loss])]
    if seen.gradient is None:
        return lines
    lines += [
        'if getattr(out, "requires_grad", False) and policy.lm_head.weight.grad is None:', "    out.mean().backward()",
        f"gradient = taken.get(policy, policy.lm_head.weight.grad) / {tables.scales(experiment.dtype).k!r}",
    ]  # fmt: skip
    size = abs(seen.gradient)
    worst = sorted(zip(*size.nonzero(), strict=True), key=lambda cell: (-size[cell], cell))[:CELLS]
    for u, v in sorted(worst):
        what = f"d loss / d logit of token {v} after {u}:"
        lines.append(_show(what, f"gradient[{v}, {u}]", [seen.gradient[u, v]]))
    return lines


def _show(what: str, seen: str, due: Any) -> str:
    numbers = [float(value) for value in np.asarray(due, float).reshape(-1)]
    return f'show("{what}", {seen}, {literal(numbers, WIDTH - len(what) - len(seen) - 10)})'
