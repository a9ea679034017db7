"""How does a name become an adapter?  Worker side: the only place that imports a subject."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dpocheck.adapter import CAPABILITIES, capabilities

GROUP = "dpocheck.adapters"
CONTRACT = {"loss": {"objective"}, "sequence_logps": {"batch"}, "step": {"objective"}, "train": {"recipe"}}


class NotLoadable(Exception):
    """The subject cannot be loaded; the message says what was given, what is allowed and what to do."""


def load(subject: str) -> Any:
    """A ready adapter: `trl` (an entry point), `zoo:NAME`, `pkg.mod:Attribute` or `path/to/file.py:Attribute`.

    `Attribute` is an adapter, a function, `Class.method`, or several functions joined by commas; a file alone is
    searched for functions.  Raises NotLoadable, or `parameters.NotRecognised` where a function has no known form.
    """
    if subject.startswith("zoo:"):
        from dpocheck.zoo import build

        return build(subject.removeprefix("zoo:"))
    place, attribute = split(subject)
    if place.endswith(".py"):
        if not attribute:
            from dpocheck.functions.find import recognise

            attribute = ",".join(candidate.name for candidate in recognise(place))
        module = _file_or_part(Path(place), attribute)
    elif attribute:
        module = importlib.import_module(place)
    else:
        return _ready(*_entry_point(subject), subject)
    names = [name.strip() for name in attribute.split(",")]
    ready = [_ready(*_attribute(module, name, place), f"{place}:{name}") for name in names]
    if len(ready) == 1:
        return ready[0]
    from dpocheck.functions import combine

    return combine(*ready)


def split(subject: str) -> tuple[str, str]:
    """`path/to/file.py:name` in two; the colon of a drive letter is no separator."""
    place, colon, attribute = subject.rpartition(":")
    if not colon or attribute.endswith(".py"):
        return subject, ""
    return place, attribute


def is_adapter(thing: Any) -> bool:
    """Has it a method of the adapter's contract?  A module's own `train`, or a trainer's `step(batch)`, is none."""
    for name in capabilities(thing):
        try:
            found = inspect.signature(getattr(thing, name)).parameters
        except (TypeError, ValueError):
            continue
        if CONTRACT[name] <= set(found) or (any(p.kind == p.VAR_KEYWORD for p in found.values()) and len(found) < 3):
            return True
    return False


def _ready(found: Any, owner: type | None, subject: str) -> Any:
    if owner is None and is_adapter(found):
        return _made(found, subject) if isinstance(found, type) else found
    if owner is None and not callable(found):
        raise NotLoadable(f"{subject} is {_a(found)}; an adapter or a function is audited")
    if isinstance(found, type) and not _has_methods(found):
        raise NotLoadable(
            f"{subject} has none of the methods {', '.join(CAPABILITIES)}; an adapter has one or more of them "
            "(dpocheck/adapter.py; `dpocheck new-adapter NAME` writes one that runs)"
        )
    from dpocheck.functions import as_adapter

    return as_adapter(found, subject, owner=owner)


def _made(adapter: type, subject: str) -> Any:
    try:
        inspect.signature(adapter).bind()
    except TypeError as error:
        raise NotLoadable(
            f"{subject} cannot be made without arguments ({error}); give them defaults, or make one in the file, as "
            f"`adapter = {adapter.__name__}(...)`, and audit that name"
        ) from None
    except ValueError:  # a signature that cannot be read
        pass
    return adapter()


def _has_methods(found: type) -> bool:
    """Is there anything of its own that could be called, however it is named?"""
    own = [name for base in found.__mro__ if base is not object for name, held in vars(base).items() if callable(held)]
    return any(not name.startswith("__") or name == "__call__" for name in own)


def _a(thing: Any) -> str:
    name = "module" if inspect.ismodule(thing) else type(thing).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _file(path: Path) -> Any:
    """Import a file under a name of its own; its folder goes last on the path, so that it shadows nothing."""
    if not path.is_file():
        raise NotLoadable(f"{path} is not a file")
    path = path.resolve()
    if _is_relative(path):
        return _in_package(path)
    name = f"dpocheck_subject_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file_or_part(path: Path, attribute: str) -> Any:
    """The module of a file; where its top cannot be run here, the functions asked for and what they need of it.

    An import may be missing; or the top loads a data set, reads the command line, or asks for a device.  An adapter is
    never taken in part: its trainer has to be there.
    Raises NotLoadable where the functions cannot be had either.
    """
    from dpocheck.functions import alone

    try:
        return _file(path)
    except (Exception, SystemExit) as reason:
        names = [name.strip() for name in attribute.split(",")]
        part = alone.module(path.resolve(), names, reason) if path.is_file() else None
        adapters = part is not None and any(is_adapter(getattr(part, name.split(".")[0], None)) for name in names)
        if part is not None and not adapters:
            return part
        if isinstance(reason, ImportError | SyntaxError | NotLoadable):
            raise
        raise NotLoadable(_stopped(path, reason)) from reason


def _stopped(path: Path, reason: BaseException) -> str:
    """What the top of a file raised, where, and what to do about it."""
    at = [frame.lineno for frame in traceback.extract_tb(reason.__traceback__)
          if Path(frame.filename).resolve() == path.resolve()]  # fmt: skip
    told = f"{type(reason).__name__}: {reason}" if str(reason).strip() else type(reason).__name__
    where = f"line {at[0]} of {path}" if at else str(path)
    return (
        f"{where} raises when the file is imported ({told}); what is audited has to be importable: put what loads data "
        "or starts a run under `if __name__ == '__main__':`"
    )


def _is_relative(path: Path) -> bool:
    """Does it import from its own package, `from .utils import x`?"""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def _in_package(path: Path) -> Any:
    """A file with relative imports goes by its name in its package, whose folder goes last on the path."""
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) == 1:
        raise NotLoadable(f"{path} has relative imports, and its folder is no package: an __init__.py is missing there")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    module = importlib.import_module(".".join(parts))
    if Path(module.__file__ or "").resolve() != path:
        raise NotLoadable(
            f"{path}: another package called {parts[0]!r} is installed, at {module.__file__}; "
            "audit that one by its module's name, or run where it is not installed"
        )
    return module


def _attribute(module: Any, attribute: str, place: str) -> tuple[Any, type | None]:
    """The object of that name, and the class whose method it is."""
    found, owner = module, None
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = sorted(name for name in vars(found) if not name.startswith("_"))
            near = get_close_matches(part, names, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"defined are: {', '.join(names)[:300]}"
            raise NotLoadable(f"{place}:{attribute}: {part!r} is not there; {hint}")
        owner = found if isinstance(found, type) else None
        found = getattr(found, part)
    return found, None if isinstance(found, type) else owner


def _entry_point(name: str) -> tuple[Any, None]:
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(sorted(known)) or "none"
        raise NotLoadable(
            f"unknown subject {name!r}{hint or '.'} Installed adapters: {listed}; "
            "or give path/to/file.py:name or pkg.mod:Adapter"
        )
    return known[name].load(), None
