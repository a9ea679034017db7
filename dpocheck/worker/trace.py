"""Which calls does an adapter make of its trainer's library?  They are recorded, not run.

`traced` runs `Adapter.train` on stand-ins of the library, of `datasets` and of `peft`: every call is noted with its
arguments and answers with another stand-in.  What an adapter computes itself, a library's version or a file, cannot be
followed; `traced` then returns None and the script holds the adapter's text.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dpocheck.literal import literal

MODULES = ("datasets", "peft")  # beside the trainer's own package
FOLDERS = {"policy": "policy_folder", "reference": "reference_folder", "tokenizer": "tokenizer_folder"}
LOADS = {
    "policy": "load(policy_folder)", "reference": "load(reference_folder)",
    "tokenizer": "PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))",
}  # fmt: skip


class CannotFollow(Exception):
    """The adapter did something that is no call with plain arguments."""


class Log:
    """The calls so far: (variable, callee, positional, named), arguments as text."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, list[str], dict[str, str]]] = []
        self.imports: dict[str, set[str]] = {}
        self.iterated: str | None = None
        self.texts: dict[str, str] = {}  # what a string or path stands for
        self.real: dict[str, Any] = {}  # the modules themselves, None where there is none

    def variable(self, callee: str) -> str:
        name = callee.rpartition(".")[2].lower()
        name = next((short for short in ("config", "trainer") if name.endswith(short)), name)
        taken = {call[0] for call in self.calls}
        return name if name not in taken else f"{name}_{len(taken)}"

    def text(self, value: Any) -> str:
        """An argument as Python text.  Raises CannotFollow."""
        if isinstance(value, Traced):
            return value._text
        if isinstance(value, str | Path) and (known := self._path(str(value))):
            return f"str({known})" if isinstance(value, str) else known
        if isinstance(value, Rows):
            return value.text
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(name)}: {self.text(item)}" for name, item in value.items()) + "}"
        if isinstance(value, list | tuple) and any(not isinstance(item, str | int | float) for item in value):
            return "[" + ", ".join(map(self.text, value)) + "]"
        if value is None or isinstance(value, str | bool | int | float | list | tuple):
            return literal(value)
        raise CannotFollow(f"an argument of type {type(value).__name__}")

    def _path(self, text: str) -> str | None:
        for path, name in self.texts.items():
            if text == path:
                return name
            if text.startswith(path + "/"):
                return f"{name} / {literal(text[len(path) + 1 :])}"
        return None


class Rows(list):
    """Rows in memory, and the name they have in the script."""

    text = "rows"


class Traced:
    """Stands for a module, a class, an object or a value of the trainer's."""

    def __init__(self, log: Log, text: str, real: Any = None) -> None:
        self.__dict__.update(_log=log, _text=text, _real=real)

    def __getattr__(self, name: str) -> Traced:
        if name.startswith("__"):
            raise AttributeError(name)
        return Traced(self._log, f"{self._text}.{name}", getattr(self._real, name, None))

    def __setattr__(self, name: str, value: Any) -> None:
        raise CannotFollow(f"{self._text}.{name} is set")

    def __call__(self, *positional: Any, **named: Any) -> Traced:
        log = self._log
        standard = _defaults(self._real)
        given = {
            name: log.text(value)
            for name, value in named.items()
            if not (name in standard and type(standard[name]) is type(value) and standard[name] == value)
        }
        made = log.variable(self._text)
        log.calls.append((made, self._text, [log.text(value) for value in positional], given))
        return Traced(log, made, self._real if inspect.isclass(self._real) else None)

    def __iter__(self) -> Any:
        self._log.iterated = self._text
        return iter(())

    def __bool__(self) -> bool:
        return True


def _defaults(real: Any) -> dict[str, Any]:
    """The arguments' defaults of the real class, which need not be spelled out."""
    try:
        parameters = inspect.signature(real).parameters.values() if real is not None else ()
    except (TypeError, ValueError):
        return {}
    return {one.name: one.default for one in parameters if one.default is not one.empty}


class Module(ModuleType):
    """A package whose every name is traced."""

    def __init__(self, name: str, log: Log) -> None:
        super().__init__(name)
        self.__dict__["_log"] = log
        try:
            log.real[name] = importlib.import_module(name)
        except Exception:  # any failure of an optional library: its defaults are then spelled out
            log.real[name] = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        log = self._log
        log.imports.setdefault(self.__name__, set()).add(name)
        with _instead(log.real):  # libraries import their parts when a name is asked for
            real = getattr(log.real[self.__name__], name, None)
        return Traced(log, name, real)


@contextmanager
def _instead(modules: dict[str, Any]) -> Any:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def traced(adapter: Any, asked: dict[str, Any], recipe: Any) -> dict[str, Any] | None:
    """The calls of one run, as JSON data, or None.

    `asked`: {"reference": handed over?, "sets": names of the evaluation sets, "on_disk": rows in files?}.
    """
    package = getattr(adapter, "package", None)
    if not package:
        return None
    log = Log()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place).resolve() / "out"
        out.mkdir()
        try:
            modules = {name: Module(name, log) for name in (package, *MODULES)}
            with _instead(modules):
                done = adapter.train(_probe(log, asked, out.parent), _rows(log, asked, out), recipe, out)
            policy = log.text(done.policy)
        except Exception:  # whatever an adapter does with a stand-in: its own text is then shown
            return None
    if not log.calls:
        return None
    return {
        "imports": {name: sorted(names) for name, names in log.imports.items()}, "calls": log.calls,
        "policy": policy, "history": log.iterated or "[]",
    }  # fmt: skip


def _probe(log: Log, asked: dict[str, Any], place: Path) -> Any:
    from dpocheck.adapter import Probe

    folders = {name: place / name for name in FOLDERS}
    if not asked["reference"]:
        del folders["reference"]
    log.texts |= {str(path): FOLDERS[name] for name, path in folders.items()}
    return Probe(
        folders["policy"], folders.get("reference"), folders["tokenizer"],
        load=lambda name: Traced(log, LOADS[name]),
    )  # fmt: skip


def _rows(log: Log, asked: dict[str, Any], out: Path) -> dict[str, Any]:
    log.texts[str(out)] = "out"
    found: dict[str, Any] = {}
    for name in ("train", *asked["sets"]):
        text = "rows" if name == "train" else f"eval_rows[{literal(name)}]"
        if asked["on_disk"]:
            found[name] = out / f"{name}.jsonl"
            log.texts = {str(found[name]): text} | log.texts
        else:
            found[name] = Rows()
            found[name].text = text
    return found
