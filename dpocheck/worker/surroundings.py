"""What may a subject have changed in its own process, and how is it put back?  Worker side, standard library and numpy.

A `Surroundings` keeps the globals as they should be.  `changes()` compares, restores what can be restored and returns
one line per difference, `"category: what"`, so that one call's leftovers do not reach the next.  Torch is watched from
the moment its import ends, before the subject can touch it; it is never imported here.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dpocheck.worker.watched import ABSENT, Watched, functions, moved, short, torch_globals

# Bound before a subject can replace them.
_BUILTINS = dict(vars(builtins))
_LIVE_BUILTINS = vars(builtins)
_ENVIRON, _PATH = os.environ, sys.path

__all__ = ["Surroundings"]

SEED = 27182818  # unlike any that a trainer uses, so that a trainer that seeds is seen to
MANY = 12  # differences named per category
HARMLESS_THREADS = ("tqdm_monitor",)  # of a progress bar; sleeps until the process ends


class Surroundings:
    """The globals of this process.  `keep()` takes the present ones as right; `changes()` compares and restores."""

    def __init__(self) -> None:
        random.seed(SEED)  # else from the system's entropy: an audit could not be repeated
        np.random.seed(SEED)
        self._watched = _python()
        self._kept: list[tuple[Watched, Any]] = []
        self._torch_watched: list[Watched] = []
        self._torch: list[tuple[Watched, Any]] = []
        self._threads: set[int] = set()
        self._processes: set[int] = set()
        self.keep()
        if "torch" in sys.modules:
            self._watch_torch()
        else:
            sys.meta_path.insert(0, _AfterImport("torch", self._watch_torch))

    def _watch_torch(self) -> None:
        self._torch_watched = torch_globals(sys.modules["torch"])
        self._torch = _values(self._torch_watched)

    def keep(self) -> None:
        """Take the globals as they are for right: after the subject was imported, which may patch for good reason."""
        self._kept = _values(self._watched)
        self._torch = _values(self._torch_watched)
        self._threads, self._processes = _threads(), _processes()

    def seed(self, number: int) -> None:
        """Start the random generators from a number: for two runs that must agree by the trainer's own seed alone."""
        random.seed(number)
        np.random.seed(number % 2**32)
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(number)

    @staticmethod
    def restore_builtins() -> list[str]:
        """To be called first: everything here needs `len` and the like.  Uses no builtin itself but at the end."""
        replaced = [name for name in _BUILTINS if name != "_" and _LIVE_BUILTINS.get(name) is not _BUILTINS[name]]
        if replaced:
            _LIVE_BUILTINS.update(_BUILTINS)
        return [f"patched: builtins.{name}" for name in replaced]

    def compare(self) -> list[str]:
        """The differences, nothing restored."""
        return self._differences(restore=False)

    def changes(self) -> list[str]:
        """The differences, each restored where it can be."""
        return self._differences(restore=True)

    def _differences(self, restore: bool) -> list[str]:
        lines: list[str] = []
        for watched, before in self._torch + self._kept:
            try:
                after = watched.read()
                if _same(before, after):
                    continue
                told = watched.tell(before, after)
            except Exception as error:
                after, told = ABSENT, [f"cannot be read any more ({type(error).__name__})"]
            if restore:
                try:
                    watched.restore(before)
                except Exception as error:
                    told.append(f"could not be restored ({type(error).__name__})")
            lines += [f"{watched.category}: {line}" for line in _at_most(told)]
        return lines + self._left_running()

    def _left_running(self) -> list[str]:
        threads, processes = _threads(), _processes()
        new = [thread for thread in threading.enumerate() if thread.ident not in self._threads]
        names = [thread.name for thread in new if thread.name not in HARMLESS_THREADS]
        lines = [f"thread: {name!r} was left running" for name in names[:MANY]]
        if more := len(processes - self._processes):
            lines.append(f"process: {more} left running")
        self._threads, self._processes = threads, processes
        return lines


class _AfterImport:
    """A finder that calls back once, when the named module has just been executed, and then is gone."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                # Only now: libraries ask for the spec many times without importing.
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _values(watched: list[Watched]) -> list[tuple[Watched, Any]]:
    values = []
    for one in watched:
        try:
            values.append((one, one.read()))
        except Exception:
            continue  # an older torch without it
    return values


def _same(before: Any, after: Any) -> bool:
    return before is after or (type(before) is type(after) and before == after)


def _at_most(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MANY else [*lines[:MANY], f"and {len(lines) - MANY} more"]


def _by_key(before: dict, after: dict) -> list[str]:
    lines = []
    for key in sorted(before.keys() | after.keys(), key=str):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old is not new and old != new:
            how = "was added" if old is ABSENT else "was removed" if new is ABSENT else "was changed"
            lines.append(f"{key} {how}")
    return lines


# ------------------------------------------------------------------------------------------------------------- Python


def _python() -> list[Watched]:
    output = _Output()
    return [
        functions("os", os),
        functions("time", time),
        functions("random", random),
        functions("numpy", np),
        functions("numpy.random", np.random),
        Watched("rng python", random.getstate, random.setstate, moved),
        Watched("rng numpy", _numpy_rng, _set_numpy_rng, moved),
        Watched("environment", _environment, _set_environment, _by_key),
        Watched("cwd", os.getcwd, os.chdir),
        Watched("path", lambda: list(sys.path), _set_path, _by_entry),
        Watched("signals", _signals, _set_signals, _by_key),
        Watched("timer", lambda: signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0), _stop_timer),
        Watched("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Watched("trace", lambda: (sys.gettrace(), sys.getprofile()), _set_trace),
        Watched("gc", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        Watched("umask", _umask, lambda mask: os.umask(mask) and None),
        Watched("numpy errors", np.geterr, lambda old: np.seterr(**old) and None),
        Watched("output", output.read, output.restore, lambda a, b: ["stdout or stderr was closed or replaced"]),
    ]


def _numpy_rng() -> tuple:
    name, keys, *rest = np.random.get_state()
    return (name, keys.tobytes(), *rest)


def _set_numpy_rng(state: tuple) -> None:
    name, keys, *rest = state
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


def _environment() -> dict[str, str]:
    return dict(os.environ)


def _set_path(before: list[str]) -> None:
    sys.path = _PATH
    _PATH[:] = before


def _set_environment(before: dict[str, str]) -> None:
    os.environ = _ENVIRON  # noqa: B003
    for key in set(os.environ) - set(before):
        del os.environ[key]
    for key, value in before.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


def _by_entry(before: list[str], after: list[str]) -> list[str]:
    added, removed = [x for x in after if x not in before], [x for x in before if x not in after]
    lines = [f"{short(x)} was added" for x in added] + [f"{short(x)} was removed" for x in removed]
    return lines or ["the order was changed"]


SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def _signals() -> dict[str, Any]:
    handlers: dict[str, Any] = {signal.Signals(s).name: signal.getsignal(s) for s in SIGNALS if s in _NAMED}
    handlers["blocked"] = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    return handlers


_NAMED = {int(s) for s in signal.Signals}


def _set_signals(before: dict[str, Any]) -> None:
    before = dict(before)
    signal.pthread_sigmask(signal.SIG_SETMASK, before.pop("blocked"))
    for name, handler in before.items():
        number = signal.Signals[name]
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _stop_timer(_: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _set_trace(before: tuple) -> None:
    sys.settrace(before[0])
    sys.setprofile(before[1])


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class _Output:
    """Standard output and error: what they are, and copies of them to put back what a subject closed."""

    def __init__(self) -> None:
        self.streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self.copies = {fd: _copy_of(fd) for fd in (1, 2)}

    def read(self) -> tuple:
        right = [getattr(sys, name, None) is ours and not ours.closed for name, ours in self.streams.items() if ours]
        return right, _identity(1), _identity(2)

    def restore(self, _: tuple) -> None:
        for fd, copy in self.copies.items():
            if _identity(fd) != _identity(copy):
                os.dup2(copy, fd)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            if self.streams[name] is None or self.streams[name].closed:
                again = open(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
                self.streams[name] = again
            setattr(sys, name, self.streams[name])


def _copy_of(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 400)
    except OSError:  # the limit of open files is low
        return os.dup(fd)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        stat = os.fstat(fd)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _threads() -> set[int]:
    return {thread.ident for thread in threading.enumerate() if thread.ident is not None}


def _processes() -> set[int]:
    """Ids of the living children, where the system tells (Linux)."""
    children: set[int] = set()
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as file:
                children |= {int(pid) for pid in file.read().split()}
        for pid in list(children):
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    children.discard(pid)
    except OSError:
        pass
    return children
