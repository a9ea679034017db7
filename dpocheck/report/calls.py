"""How is a recorded run written as a Python function?  The calls of `worker.trace`, as text for a script."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from dpocheck.worker.trace import MODULES


def merged(traces: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, str]]] | None:
    """One `train` for all runs, and each run's own named arguments of the one call that differs; None: they differ
    otherwise."""
    first = traces[0]
    shape = [(call[0], call[1], call[2]) for call in first["calls"]]
    alike = all(
        [(call[0], call[1], call[2]) for call in trace["calls"]] == shape
        and (trace["policy"], trace["history"]) == (first["policy"], first["history"])
        for trace in traces
    )
    if not alike:
        return None
    own: list[dict[str, str]] = [{} for _ in traces]
    at = None
    for place in range(len(shape)):
        named = [trace["calls"][place][3] for trace in traces]
        if any(one != named[0] for one in named):
            if at is not None:
                return None
            at = place
            for run, one in enumerate(named):
                own[run] = {k: v for k, v in one.items() if any(other.get(k) != v for other in named)}
    if any(_uses_names(text) for options in own for text in options.values()):
        return None
    return function(first, own[0] if at is not None else {}, at), own


def _uses_names(text: str) -> bool:
    return any(isinstance(node, ast.Name) for node in ast.walk(ast.parse(text, mode="eval")))


def function(trace: dict[str, Any], own: dict[str, str] | None = None, at: int | None = None) -> str:
    """The text of `train`; the call number `at` takes `**options` in place of the arguments `own`."""
    last = ", **options" if at is not None else ""
    taker = trace["calls"][at][0] if at is not None else None
    lines = [f"def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out{last}):"]
    lines += [
        f"    from {package} import {', '.join(names)}"
        for package, names in trace["imports"].items()
        if any(name == call[1].partition(".")[0] for name in names for call in trace["calls"])
    ]
    lines.append("")
    trace = _inlined(trace)
    shown = [trace["policy"], trace["history"], *(" ".join([*call[2], *call[3].values()]) for call in trace["calls"])]
    shown += [call[1] for call in trace["calls"]]
    for made, callee, positional, named in trace["calls"]:
        kept = {name: text for name, text in named.items() if made != taker or name not in (own or {})}
        arguments = [*positional, *(f"{name}={text}" for name, text in kept.items())]
        arguments += ["**options"] if made == taker else []
        used = any(_word(made, text) for text in shown)
        lines += _call(f"    {made} = {callee}" if used else f"    {callee}", arguments)
    lines.append(f"    return {trace['policy']}, {trace['history']}")
    return "\n".join(lines) + "\n"


def _inlined(trace: dict[str, Any]) -> dict[str, Any]:
    """Data sets and settings that are made for one argument stand in its place."""
    small = {name for package in MODULES for name in trace["imports"].get(package, ())}
    calls = [[made, callee, list(positional), dict(named)] for made, callee, positional, named in trace["calls"]]
    kept = []
    for made, callee, positional, named in calls:
        text = f"{callee}({', '.join([*positional, *(f'{name}={value}' for name, value in named.items())])})"
        uses = [(call, name) for call in calls for name, value in call[3].items() if _word(made, value)]
        parts = [part for call in calls for part in [call[1], *call[2]]]
        others = " ".join([trace["policy"], trace["history"], *parts])
        if callee.partition(".")[0] not in small or len(uses) != 1 or len(text) > 60 or _word(made, others):
            kept.append((made, callee, positional, named))
            continue
        call, name = uses[0]
        call[3][name] = re.sub(rf"(?<![\w.]){re.escape(made)}(?!\w)", text.replace("\\", r"\\"), call[3][name])
    return trace | {"calls": kept}


def _word(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) is not None


def _call(head: str, arguments: list[str]) -> list[str]:
    whole = f"{head}({', '.join(arguments)})"
    if len(whole) <= 112:
        return [whole]
    rows, current = [], "       "
    for argument in arguments:
        if len(current) + len(argument) + 2 > 112:
            rows.append(current)
            current = "       "
        current += f" {argument},"
    return [f"{head}(", *rows, current, "    )"]
