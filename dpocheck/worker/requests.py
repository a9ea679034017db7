"""What can be asked of the process that runs a subject?  `handle` answers every request of the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from dpocheck.adapter import Says, capabilities
from dpocheck.experiment import from_plain
from dpocheck.worker import standalone
from dpocheck.worker.answer import Reply, observe
from dpocheck.worker.failure import BadAnswer, kind_of
from dpocheck.worker.loading import load


def handle(op: str, payload: dict[str, Any], arrays: dict[str, np.ndarray], state: dict[str, Any]) -> Reply:
    """Answer one request: `open` loads the subject, `observe` puts an experiment to it, `standalone` asks what a
    script for a bug report needs."""
    if op not in ("open", "observe", "standalone"):
        raise ValueError(f"unknown request {op!r}; known: open, observe, standalone")
    if state.get("loaded") != payload["subject"]:  # the first request, the first after a death, or another subject
        state.update(loaded=payload["subject"], adapter=load(payload["subject"]))
    if op == "open":
        return describe(state["adapter"]), {}
    if op == "standalone":
        return standalone.answer(state["adapter"], payload), {}
    return observe(state["adapter"], from_plain(payload["experiment"]), payload)


def describe(adapter: Any) -> dict[str, Any]:
    """What the header of a report says about an adapter."""
    says = getattr(adapter, "says", None) or Says()
    if not isinstance(says, Says | Mapping):
        raise BadAnswer(f"the adapter's `says` is {kind_of(says)}; expected dpocheck.adapter.Says(...)")
    return {
        "capabilities": list(capabilities(adapter)),
        "says": asdict(says) if is_dataclass(says) else dict(says),
        "name": getattr(adapter, "name", type(adapter).__name__),
        "version": getattr(adapter, "version", None) or installed(getattr(adapter, "package", None)),
        "versions": versions(getattr(adapter, "package", None)),
        "forced": {str(key): repr(value) for key, value in dict(getattr(adapter, "forced", {})).items()},
        "only": dict(getattr(adapter, "only", {})),
        "ranks": bool(getattr(adapter, "ranks", False)),
        "keeps_group": bool(getattr(adapter, "keeps_group", False)),
        "form": getattr(adapter, "form", "adapter"),
        "lines": code_lines(type(adapter)) if getattr(adapter, "lines", None) is None else adapter.lines,
        "standalone": callable(getattr(adapter, "standalone", None)),
    }


def installed(package: str | None) -> str | None:
    """The version of an installed package."""
    if not package:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(package: str | None) -> dict[str, str]:
    """Of the trainer's package and of what a run may depend on, as installed beside it; nothing is imported."""
    names = (package, "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy")
    return {name: found for name in names if name and (found := installed(name))}


def code_lines(cls: type) -> int | None:
    """The lines of code of an adapter's class: no blank lines, comments or docstrings."""
    import ast
    import inspect
    import textwrap

    try:
        source = textwrap.dedent(inspect.getsource(cls))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return None
    quoted: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            quoted.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in quoted for n, line in lines)
