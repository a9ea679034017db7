"""How does a function that knows nothing of dpocheck become an adapter?  Worker side, zero lines for its author."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from dpocheck.adapter import Says
from dpocheck.functions.alone import NOTE
from dpocheck.functions.forms import EXAMPLES
from dpocheck.functions.losses import TOKENS
from dpocheck.functions.options import own_kind
from dpocheck.functions.parameters import NotRecognised, spelled
from dpocheck.functions.target import Target, target

__all__ = ["FunctionAdapter", "NotRecognised", "as_adapter", "combine"]


class Said(str):
    """Text that a report shows without quotation marks."""

    __repr__ = str.__str__


class FunctionAdapter:
    """An adapter with the capabilities of the functions it is made of, one each."""

    form = "function"
    lines = 0
    version = None
    clears_gradients = False

    def __init__(self, targets: list[Target]) -> None:
        from dpocheck.functions.logps import SequenceLogps
        from dpocheck.functions.losses import Loss
        from dpocheck.functions.steps import Step

        made = {"loss": Loss, "sequence_logps": SequenceLogps, "step": Step}
        self.says = Says()
        self.targets = {one.match.form: one for one in reversed(targets)}
        self.name = ", ".join(self.targets[form].name for form in made if form in self.targets)
        for form, one in self.targets.items():
            setattr(self, form, made[form](one))
        step = getattr(self, "step", None)
        self.clears_gradients = bool(step and step.clears_gradients)

    @property
    def only(self) -> dict[str, Any]:
        """Options it has hard-coded, and at what: what `fixed.py` asks it for instead of the ordinary."""
        found: dict[str, Any] = {}
        for one in self.targets.values():
            found |= one.fixed
            kind = own_kind(one.name)
            if one.match.form == "loss" and kind and (kind == "simpo" or not one.settable() & {"kind", "ipo"}):
                found["kind"] = kind
            if one.match.shape in ("tokens", "sides"):  # it sums log-probs itself; their number has to be known
                found["lengths"] = TOKENS
        return found

    @property
    def forced(self) -> dict[str, Any]:
        """What was taken for granted, for the header of a report."""
        found: dict[str, Any] = {}
        for form, one in self.targets.items():
            found[one.name] = Said(f"{form}({spelled(one.parameters)}), by {one.match.by}")
            found |= {f"{one.name}: {key}": value for key, value in one.fixed.items()}
            if missing := getattr(inspect.unwrap(one.function), "__globals__", {}).get(NOTE):
                found[f"{one.name}: run without the rest of its file"] = Said(missing)
            if one.gamma_is_ratio:
                found[f"{one.name}: gamma"] = Said("a ratio to beta")
            if getattr(getattr(self, form), "one_pair", False):
                found[f"{one.name}: pairs"] = Said("one a call")
            if one.match.shape in ("tokens", "sides") or getattr(getattr(self, form), "wide", False):
                found[f"{one.name}: log-probs"] = Said("token by token, {} chosen and {} rejected".format(*TOKENS))
            found |= {f"{one.name}: {key}": value for key, value in one.overruled().items()}
            moved = getattr(getattr(self, form), "moved", None)
            if moved or (moved is not None and one.match.role("logits")):
                how = "moved by one" if moved else "not moved: as transformers takes them"
                found[f"{one.name}: labels"] = Said(how)
        return found


def as_adapter(thing: Any, subject: str = "", *, owner: type | None = None) -> FunctionAdapter:
    """The adapter of a function, a method (with its `owner`), a class or an object.

    Raises NotRecognised: what was given, which forms are known, what to do.
    """
    name = subject.rpartition(":")[2] or getattr(thing, "__name__", type(thing).__name__)
    if owner is not None or inspect.isroutine(thing) or isinstance(thing, functools.partial) or _function(thing):
        try:
            return FunctionAdapter([_single(thing, name, owner)])
        except NotRecognised as refusal:
            raise NotRecognised(explain(subject or name, [str(refusal)])) from None
    found, refused = members(thing, name)
    if not found:
        raise NotRecognised(explain(subject or name, refused))
    return FunctionAdapter(found)


def _function(thing: Any) -> bool:
    """A compiled or wrapped function: no class of its own to look into."""
    return callable(thing) and not isinstance(thing, type) and hasattr(thing, "__wrapped__")


def _single(thing: Any, name: str, owner: type | None) -> Target:
    if owner is not None and not isinstance(inspect.getattr_static(owner, name.rpartition(".")[2], None), staticmethod):
        return target(thing, name, asked=True, owner=owner)
    if inspect.ismethod(thing):
        return target(thing.__func__, name, asked=True, holder=thing.__self__)
    return target(thing, name, asked=True)


def members(thing: Any, name: str) -> tuple[list[Target], list[str]]:
    """The recognised methods of a class or object, its own call first, and why the others are none."""
    cls = thing if isinstance(thing, type) else type(thing)
    methods = [m for m in ("forward", "__call__") if m in _own_names(cls)]
    methods += sorted(m for m in _own_names(cls) if not m.startswith("__") and m != "forward")
    found, refused = [], []
    for method in methods:
        static = inspect.getattr_static(cls, method)
        if isinstance(static, property) or not callable(getattr(cls, method)):
            continue
        bound = {"owner": cls} if isinstance(thing, type) else {"holder": thing}
        if isinstance(static, staticmethod):
            bound = {}
        whole = name if method in ("forward", "__call__") else f"{name}.{method}"
        try:
            one = target(getattr(cls, method), whole, asked=method in ("forward", "__call__"), **bound)
            found.append(one)
        except NotRecognised as refusal:
            refused.append(str(refusal))
    return found, refused


def _own_names(cls: type) -> list[str]:
    """Attributes that the author's classes define, not those of the libraries they derive from."""
    libraries = ("torch", "transformers", "builtins", "accelerate", "lightning", "pytorch_lightning", "abc", "typing")
    return [n for c in cls.__mro__ if c.__module__.split(".")[0] not in libraries for n in vars(c)]


def combine(*adapters: FunctionAdapter) -> FunctionAdapter:
    """One subject of several functions; where two have one form, the first given is taken."""
    return FunctionAdapter([one for adapter in adapters for one in adapter.targets.values()])


def explain(subject: str, refused: list[str]) -> str:
    """What was given, what is allowed, what to do."""
    lines = [f"{subject} is none of the forms that are audited without an adapter."]
    lines += [f"  {reason}" for reason in refused[:6]]
    lines += ["Known forms, by parameter names:", *(f"  {form}: {example}" for form, example in EXAMPLES.items())]
    lines += ["Rename its parameters so, or write an adapter (dpocheck new-adapter)."]
    return "\n".join(lines)
