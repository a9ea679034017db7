"""How is one recognised function called?  Its parameters filled, its options set, its object made where it is a method.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpocheck.adapter import Objective
from dpocheck.functions import options, source_facts
from dpocheck.functions.forms import Match, Refusal, doubt, recognise, uncallable
from dpocheck.functions.parameters import NotRecognised, Parameter, admits_none, concept, option
from dpocheck.functions.source_facts import NOTHING, Facts

MISSING = object()
STANDINS = {"accelerator", "scheduler", "scaler", "counter"}  # given only to those who cannot do without


@dataclass
class Target:
    """A function with its form.  `owner`: the class it is a method of; `holder`: an object that already exists."""

    function: Callable[..., Any]
    name: str
    match: Match
    parameters: tuple[Parameter, ...]
    facts: Facts
    owner: type | None = None
    holder: Any = None
    made: dict[Any, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    gamma_is_ratio: bool = False  # SimPO: its `gamma` is divided by beta already

    def settable(self) -> set[str]:
        """The options it can be told, by any way."""
        found = {key for key, _ in self.match.options}
        found |= {option(name) for name in self.facts.attributes} | {option(p.name) for p in constructor(self.owner)}
        found |= {option(name) for name in self._globals()}
        if "config" in found:
            found |= {option(name) for name in self.facts.fields | self.facts.strings}
        return {key for key in found if key}

    def overruled(self) -> dict[str, Any]:
        """Parameters whose default is another than what is passed, where that changes what is computed."""
        defaults = {p.name: p.default for p in self.parameters}
        found: dict[str, Any] = {}
        for key, name in self.match.options:
            if key == "average" and self.match.form != "loss" and defaults[name] is True:
                found[name] = False
            if key == "reduction" and self.match.form == "sequence_logps" and defaults[name] not in (None, "sum"):
                found |= {name: "sum"} if self._sums() else {}
        return found

    def _sums(self) -> bool:
        """Does it know a reduction called sum?  A function whose default is another is asked for the sum."""
        return "sum" in self.facts.strings

    def _globals(self) -> dict[str, Any]:
        """Numbers of its module that it reads, by names of options: `BETA = 0.1`."""
        function = inspect.unwrap(self.function)
        code, space = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        names = code.co_names if code else ()
        return {n: space[n] for n in names if option(n) and isinstance(space.get(n), int | float | str)}

    def call(self, given: dict[str, Any], objective: Objective, models: dict[str, Any] | None = None) -> Any:
        """Call it with `given`, role -> value.  Raises Unsupported where the objective cannot be had."""
        known = options.values(objective) | given.get("settings", {})
        if self.gamma_is_ratio:
            known["gamma"] = known["gamma_beta_ratio"]
        arguments: dict[str, Any] = {}
        defaults = {p.name: p for p in self.parameters}
        for name, role in self.match.roles:
            if role in given:
                arguments[name] = given[role]
            elif role == "key":
                arguments[name] = given["keys"](name)
        for key, name in self.match.options:
            value = self._option(key, known, defaults[name])
            if value is not MISSING:
                arguments[name] = value
        arguments |= {p.name: None for p in self.parameters if p.required and p.nullable and p.name not in arguments}
        with self._told(known):
            return self._bound(known, models or {})(*self._positional(arguments), **arguments)

    def _positional(self, arguments: dict[str, Any]) -> Iterator[Any]:
        """Positional-only parameters cannot be given by name."""
        names = [p.name for p in self.parameters if p.kind == "positional-only" and p.name in arguments]
        return iter([arguments.pop(name) for name in names])

    def _option(self, key: str, known: dict[str, Any], parameter: Parameter) -> Any:
        if key == "config":
            return self._config(known, parameter.default)
        if key == "kind":
            return options.spelled_kind(known["kind"], parameter.default, self.facts.strings, self.name)
        if key == "reduction":  # of a loss it may be set for more than pairs; where it has a default, that is its own
            if self.match.form == "sequence_logps" and self._sums():
                return "sum"
            return ("mean" if self.match.form == "loss" else "sum") if parameter.required else MISSING
        if key == "average" and parameter.name == "mean" and not isinstance(parameter.default, bool | None):
            return MISSING
        if key == "average" and self.match.form == "loss" and not parameter.required:
            return MISSING  # of a loss, `normalize` may be anything
        if key in STANDINS and not parameter.required:
            return MISSING
        return known.get(key, MISSING)

    def _config(self, known: dict[str, Any], rest: Any) -> options.Config:
        """A configuration that says what `known` does, and for the rest what the function's own one says."""
        kind = options.spelled_kind(known["kind"], None, self.facts.strings, self.name)
        return options.Config(known | {"kind": kind}, rest)

    @contextmanager
    def _told(self, known: dict[str, Any]) -> Iterator[None]:
        """Set the module's own constants for the time of a call."""
        space, kept = getattr(inspect.unwrap(self.function), "__globals__", {}), self._globals()
        for name in kept:
            if (key := option(name)) in known:
                space[name] = (
                    options.spelled_kind(known[key], kept[name], self.facts.strings, self.name)
                    if key == "kind"
                    else known[key]
                )
        try:
            yield
        finally:
            space.update(kept)

    # ------------------------------------------------------------------------------------------------- the object

    def _bound(self, known: dict[str, Any], models: dict[str, Any]) -> Callable[..., Any]:
        if self.owner is None and self.holder is None:
            return self.function
        holder = self.holder if self.holder is not None else self._make(known, models)
        self._dress(holder, known, models)
        if self.function is type(holder).__call__ or getattr(self.function, "__name__", "") == "forward":
            return holder if callable(holder) else functools.partial(self.function, holder)
        return functools.partial(self.function, holder)

    def _make(self, known: dict[str, Any], models: dict[str, Any]) -> Any:
        """An object of the owner: constructed if all its constructor wants is known, else without a constructor."""
        arguments = {}
        for parameter in constructor(self.owner):
            key, said = option(parameter.name), concept(parameter.name)
            what = "optimizer" if said.what == "optimizer" else said.who if said.what == "model" else None
            if key == "config":
                if parameter.required:  # where it may be left out, the class has its own defaults
                    arguments[parameter.name] = self._config(known, None)
            elif key == "kind":
                arguments[parameter.name] = options.spelled_kind(
                    known[key], parameter.default, self.facts.strings, self.name
                )
            elif key in known:
                arguments[parameter.name] = known[key]
            elif what in models:
                arguments[parameter.name] = models[what]
            elif parameter.required and parameter.kind in ("positional", "keyword"):
                arguments[parameter.name] = None
        mark = tuple((name, id(value) if option(name) is None else repr(value)) for name, value in arguments.items()
                     if option(name) != "config")  # fmt: skip
        mark = (mark, tuple(id(model) for model in models.values()))
        if mark not in self.made:
            self.made.clear()
            try:
                built = self.owner(**arguments)  # type: ignore[misc]
            except Exception:
                built = _bare(self.owner)
                for parameter in constructor(self.owner):  # as `self.x = x` would have it
                    if not parameter.required and parameter.name in self.facts.attributes:
                        setattr(built, parameter.name, parameter.default)
            self.made[mark] = (built, list(models.values()))  # the models are kept: their ids are in the mark
        return self.made[mark][0]

    def _dress(self, holder: Any, known: dict[str, Any], models: dict[str, Any]) -> None:
        """Set the attributes that the method reads: options, models, device."""
        for name in sorted(self.facts.attributes):
            key, said = option(name), concept(name)
            what = "optimizer" if said.what == "optimizer" else said.who if said.what == "model" else None
            old = getattr(holder, name, None)
            if key == "config":
                value = self._config(known, old)
            elif key == "kind":
                value = options.spelled_kind(known[key], old, self.facts.strings, self.name)
            elif key in known:
                value = known[key]
            elif what in models and not callable(getattr(type(holder), name, None)):
                value = models[what]
            else:
                continue
            try:
                setattr(holder, name, value)
            except AttributeError:
                continue


def _bare(owner: type | None) -> Any:
    """An object whose constructor did not run: enough for a method that reads a few attributes."""
    built = object.__new__(owner)  # type: ignore[arg-type]
    for base in owner.__mro__:  # type: ignore[union-attr]
        if base.__module__.startswith("torch.nn.modules") and base.__name__ == "Module":
            base.__init__(built)
    return built


def constructor(owner: type | None) -> tuple[Parameter, ...]:
    if owner is None or owner.__init__ is object.__init__:  # type: ignore[misc]
        return ()
    return tuple(p for p in live_parameters(owner.__init__)[1:] if p.kind in ("positional", "keyword"))  # type: ignore[misc]


def live_parameters(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a live callable."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise NotRecognised(f"{function!r} has no readable signature") from None
    kinds = {"VAR_POSITIONAL": "star", "VAR_KEYWORD": "stars", "KEYWORD_ONLY": "keyword"}
    return tuple(
        Parameter(
            p.name,
            kinds.get(p.kind.name, "positional"),
            p.default is inspect.Parameter.empty and p.kind.name not in ("VAR_POSITIONAL", "VAR_KEYWORD"),
            None if p.default is inspect.Parameter.empty else p.default,
            admits_none(p.annotation if isinstance(p.annotation, str) else str(p.annotation)),
        )
        for p in signature.parameters.values()
    )


def target(
    function: Callable[..., Any], name: str, *, asked: bool, owner: type | None = None, holder: Any = None
) -> Target:
    """The target of a live function.  Raises NotRecognised with the reason."""
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    for test, what in (
        (inspect.iscoroutinefunction, "an async function"),
        (inspect.isasyncgenfunction, "an async generator"),
        (inspect.isgeneratorfunction, "a generator"),
    ):
        if test(plain):
            raise NotRecognised(f"{name} is {what}; a function that returns its result is audited")
    parameters = live_parameters(function)
    method = owner is not None or holder is not None
    if method and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    elif _idle_self(plain, parameters):
        function, parameters = functools.partial(function, None), parameters[1:]
    cls = owner or (type(holder) if holder is not None else None)
    short, title = getattr(plain, "__name__", name.rsplit(".")[-1]), cls.__name__ if cls else ""
    match = recognise(short, parameters, title)
    if isinstance(match, Refusal):
        raise NotRecognised(f"{name}: {match.reason}")
    facts = read_facts(plain)
    if reason := uncallable(match, facts):
        raise NotRecognised(f"{name}: {reason}")
    if not asked and (reason := doubt(match, short, title, facts)):
        raise NotRecognised(f"{name}: {reason}")
    found = Target(function, name, match, parameters, facts, owner, holder)
    if match.form == "loss" and "beta" not in found.settable() and len(found.facts.numbers) == 1:
        found.fixed["beta"] = found.facts.numbers[0]
    return found


def _idle_self(function: Callable[..., Any], parameters: tuple[Parameter, ...]) -> bool:
    """Is it a method that stands outside of its class, and does not use its `self`?"""
    code = getattr(function, "__code__", None)
    if code is None or not parameters or parameters[0].name != "self":
        return False
    return all(instruction.argval != "self" for instruction in dis.get_instructions(code))


def read_facts(function: Callable[..., Any]) -> Facts:
    """The facts of a live function, from the file that defines it; nothing where there is none."""
    code = getattr(function, "__code__", None)
    try:
        tree = ast.parse(Path(inspect.getsourcefile(function)).read_text(encoding="utf-8"))  # type: ignore[arg-type]
    except (TypeError, OSError, SyntaxError, ValueError):
        return NOTHING
    if code is None:
        return NOTHING
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            lines = {node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))}
            if code.co_firstlineno in lines and getattr(node, "name", "<lambda>") == code.co_name:
                parent = next((n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and node in n.body), None)
                return source_facts.facts(tree, node, parent)
    return NOTHING
