"""How does a name become an adapter?  Worker side: the only place that imports a subject."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dpocheck.adapter import capabilities

GROUP = "dpocheck.adapters"


class NotLoadable(Exception):
    """The subject cannot be loaded; the message says what was given, what is allowed and what to do."""


def load(subject: str) -> Any:
    """`trl` (an entry point), `zoo:NAME`, `pkg.mod:Attribute` or `path/to/file.py:Attribute`, as a ready adapter."""
    if subject.startswith("zoo:"):
        from dpocheck.zoo import build

        return build(subject.removeprefix("zoo:"))
    place, _, attribute = subject.partition(":")
    if place.endswith(".py"):
        found = _attribute(_file(Path(place)), attribute, subject)
    elif attribute:
        found = _attribute(importlib.import_module(place), attribute, subject)
    else:
        found = _entry_point(subject)
    adapter = found() if isinstance(found, type) else found
    if capabilities(adapter):
        return adapter
    from dpocheck.functions import as_adapter

    return as_adapter(adapter, subject)


def _file(path: Path) -> Any:
    """Import a file under a name of its own; its folder goes last on the path, so that it shadows nothing."""
    if not path.is_file():
        raise NotLoadable(f"{path} is not a file")
    name = f"dpocheck_subject_{path.stem}"
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _attribute(module: Any, attribute: str, subject: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(sorted(name for name in vars(found) if not name.startswith("_")))[:300]
            raise NotLoadable(f"{subject}: {part!r} is not there; defined are: {names}")
        found = getattr(found() if isinstance(found, type) and part == attribute.split(".")[-1] else found, part)
    return found


def _entry_point(name: str) -> Any:
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise NotLoadable(f"unknown subject {name!r}; installed adapters: {', '.join(sorted(known)) or 'none'}")
    return known[name].load()
