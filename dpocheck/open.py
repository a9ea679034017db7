"""How is a subject found by name, or taken as it is?"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dpocheck.functions.find import recognise
from dpocheck.functions.parameters import NotRecognised
from dpocheck.subject import Subject
from dpocheck.transports import Broken, InFiles, InProcess, InWorker, Refused
from dpocheck.worker.loading import split

LEAST_MEMORY = 0.75  # GB; below it torch is not imported, and the process ends without a word


class UsageError(Exception):
    """What was asked for cannot be run; the message says what was given, what is allowed and what to do."""


def open_subject(
    subject: Any, folder: Path, *, timeout: float = 120.0, memory: float = 8.0, jobs: int = 1, python: str | None = None
) -> Subject:
    """A live object, an entry point's name, `pkg.mod:Attribute`, `file.py:name`, `file.toml` or `zoo:NAME`.

    `jobs`: how many runs are made side by side, each in a worker of its own; a live object has but one process.
    `python`: the interpreter of the environment that holds the trainer; None: the one this runs under.
    """
    _limits(timeout, memory)
    interpreter = _interpreter(python, subject)
    if not isinstance(subject, str | Path):
        return Subject(type(subject).__name__, InProcess(_adapted(subject)), folder)
    name = str(subject)
    if name.endswith(".toml"):
        first = InFiles(_command(Path(name), folder, timeout, memory, python and interpreter))
        return Subject(name, first, folder, [lambda: first] * (jobs - 1))
    _exists(name, python is None)

    def start(folder: Path) -> InWorker:
        return InWorker.start(name, folder, seconds=timeout, memory_gb=memory, python=interpreter)

    try:
        transport = start(folder / "worker")
        trains = "train" in transport.about["capabilities"]
    except (Broken, Refused) as fault:
        kind, _, message = str(fault).partition(": ")
        if kind in ("NotLoadable", "NotRecognised", "BadAnswer"):  # said to a person already: no traceback adds to it
            raise UsageError(message) from fault
        tail = f"\n{fault.output}" if getattr(fault, "output", "") else ""
        missing = kind == "ModuleNotFoundError"
        hint = "; install it here, or name the Python that has it with --python" if missing else ""
        raise UsageError(f"{name} cannot be loaded: {fault}{hint}{tail}") from fault

    def another(number: int) -> Callable[[], InWorker]:
        return lambda: start(folder / f"worker{number}")

    return Subject(name, transport, folder, [another(number) for number in range(1, jobs)] if trains else ())


def _limits(timeout: float, memory: float) -> None:
    for name, value, unit in (("timeout", timeout, "seconds"), ("memory", memory, "GB")):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value:g}; it must be a number of {unit} above 0")
    if memory < LEAST_MEMORY:
        raise UsageError(f"memory is {memory:g} GB; torch alone takes more to import: allow {LEAST_MEMORY:g} or more")


def _interpreter(python: str | None, subject: Any) -> str:
    """The absolute path of the interpreter.  A link stays one: what it points to knows nothing of its environment."""
    if python is None:
        return sys.executable
    if not isinstance(subject, str | Path):
        raise UsageError("an interpreter is given for a live object; only a subject given by name has its own process")
    found = shutil.which(Path(python).expanduser())
    if found is None:
        raise UsageError(f"python is {str(python)!r}, which is no program; name the interpreter that has the trainer")
    return str(Path(found).absolute())


def _adapted(subject: Any) -> Any:
    from dpocheck.worker.loading import is_adapter

    if is_adapter(subject):
        return subject() if isinstance(subject, type) else subject
    from dpocheck.functions import as_adapter

    return as_adapter(subject, getattr(subject, "__name__", "a live object"))


def _command(path: Path, folder: Path, timeout: float, memory: float, python: str | None) -> Any:
    from dpocheck.command import CommandSubject
    from dpocheck.command.file import CommandError, read

    try:
        return CommandSubject(read(path), limits_seconds=timeout, memory_gb=memory, folder=folder, python=python)
    except CommandError as fault:
        raise UsageError(str(fault)) from fault


def _exists(name: str, here: bool) -> None:
    """Refuse, before a worker starts, what can be seen to be wrong without importing anything.

    `here`: the subject lives in this environment, so its entry point is known.
    """
    place, attribute = split(name)
    if place == "zoo" or place.startswith("zoo:"):
        return
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UsageError(f"{place} is not a file; give the path of a Python file, such as train.py:dpo_loss")
        if not attribute:
            try:
                recognise(place)
            except NotRecognised as refusal:
                raise UsageError(str(refusal)) from refusal
        return
    if attribute or "." in place or not here:
        return
    known = sorted(point.name for point in entry_points(group="dpocheck.adapters"))
    if name not in known:
        raise UsageError(
            f"unknown subject {name!r}; installed adapters: {', '.join(known) or 'none'}; "
            "or give a file (train.py:dpo_loss), a module (pkg.mod:Adapter) or a command (trainer.toml)"
        )
