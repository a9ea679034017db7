"""Which globals can a subject change, and how is each read and put back?  Worker side; torch is given, not imported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ABSENT", "Watched", "functions", "moved", "short", "torch_globals"]

ABSENT = object()


@dataclass(frozen=True)
class Watched:
    """One global: how it is read, how the value read is put back, and how a difference is told."""

    category: str
    read: Callable[[], Any]
    restore: Callable[[Any], None]
    tell: Callable[[Any, Any], list[str]] = lambda before, after: [f"{short(before)} became {short(after)}"]


def short(value: Any) -> str:
    return repr(value)[:80]


def moved(before: Any, after: Any) -> list[str]:
    return ["moved on or seeded"]


# ---------------------------------------------------------------------------------------------------------- functions


def functions(label: str, owner: Any, home: str = "") -> Watched:
    """The functions and classes of a module or class, by identity: has one been replaced?

    A wrapper that code below the folder `home` puts around the old function is accepted: torch wraps
    `torch.manual_seed` and `torch.nn.Module.__init__` when its compiler is first imported and used.
    """
    # Of a class what it inherits too: a patch of that is a new name in the class itself, which is removed.
    named = dir(owner) if isinstance(owner, type) else list(vars(owner))
    known = [
        name
        for name in named
        if _is_function(vars(owner)[name] if name in vars(owner) else getattr(owner, name, None))
        and (not name.startswith("_") or name.endswith("__"))
    ]

    def read() -> _Functions:
        now = vars(owner)
        return _Functions({name: now.get(name, ABSENT) for name in known}, home)

    def restore(before: _Functions) -> None:
        for name in before.differing(read()):
            if before.by_name[name] is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before.by_name[name])

    def tell(before: _Functions, after: _Functions) -> list[str]:
        return [f"{label}.{name}" for name in before.differing(after)]

    return Watched("patched", read, restore, tell)


class _Functions:
    """Equal only if every name is bound to the very same object; never compares the objects themselves."""

    def __init__(self, by_name: dict[str, Any], home: str) -> None:
        self.by_name, self.home = by_name, home

    def differing(self, after: _Functions) -> list[str]:
        names = []
        for name, old in self.by_name.items():
            new = after.by_name[name]
            if new is old:
                continue
            if self.home and _wraps(new, old) and new.__code__.co_filename.startswith(self.home):
                self.by_name[name] = new
            else:
                names.append(name)
        return names

    def __eq__(self, after: object) -> bool:
        return isinstance(after, _Functions) and not self.differing(after)

    __hash__ = None  # type: ignore[assignment]


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, staticmethod | classmethod | property)


def _wraps(new: Any, old: Any) -> bool:
    """Is `new` a wrapper around `old`, by `functools.wraps` or by holding it as a closure?"""
    if not hasattr(new, "__code__"):
        return False
    held = [getattr(new, "__wrapped__", None)]
    for cell in new.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    return any(one is old for one in held)


# -------------------------------------------------------------------------------------------------------------- torch


def torch_globals(torch: Any) -> list[Watched]:
    """The globals of torch.  Every function is bound now: the subject may replace `torch.get_default_dtype` later."""
    generator = torch.default_generator
    get_state, set_state, from_numpy = generator.get_state, generator.set_state, torch.from_numpy
    set_grad, set_algorithms = torch.set_grad_enabled, torch.use_deterministic_algorithms
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled
    deterministic = torch.are_deterministic_algorithms_enabled

    def set_rng(state: bytes) -> None:
        set_state(from_numpy(np.frombuffer(state, dtype=np.uint8).copy()))

    def set_deterministic(old: tuple[bool, bool]) -> None:
        set_algorithms(old[0], warn_only=old[1])

    def autocast(device: str) -> Watched:
        on, set_on = torch.is_autocast_enabled, torch.set_autocast_enabled
        return Watched(f"autocast {device}", lambda: on(device), lambda old: set_on(device, old))

    backends, home = torch.backends, str(torch.__path__[0])
    watched = [
        Watched("default device", lambda get=torch.get_default_device: str(get()), _device_setter(torch)),
        Watched("grad mode", torch.is_grad_enabled, lambda old: set_grad(old) and None),
        Watched("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Watched("rng torch", lambda: get_state().numpy().tobytes(), set_rng, moved),
        Watched("threads", torch.get_num_threads, torch.set_num_threads),
        Watched("deterministic", lambda: (deterministic(), warn_only()), set_deterministic),
        Watched("inference mode", torch.is_inference_mode_enabled, lambda old: None),
        Watched("anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Watched("matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        Watched(
            "cudnn",
            lambda: (backends.cudnn.deterministic, backends.cudnn.benchmark),
            lambda old: backends.cudnn.set_flags(_deterministic=old[0], _benchmark=old[1]),
        ),
        functions("torch", torch, home),
        functions("torch.Tensor", torch.Tensor, home),
        functions("torch.nn.functional", torch.nn.functional, home),
        functions("torch.nn.Module", torch.nn.Module, home),
        functions("torch.autograd", torch.autograd, home),
        functions("torch.optim.Optimizer", torch.optim.Optimizer, home),
    ]
    with contextlib.suppress(AttributeError):
        watched += [autocast("cpu"), autocast("cuda")]
    return watched


def _device_setter(torch: Any) -> Callable[[str], None]:
    setter = torch.set_default_device
    return lambda old: setter(None if old == "cpu" else old)
