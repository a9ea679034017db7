"""What runs beside a trainer?  A loop that reads requests, has them answered, and tells what went wrong.

Started by `transport.Worker`, never by hand.  It imports the standard library and numpy; torch comes with the subject.
A request is `{"call": n, "op": ..., "payload": ...}` with arrays; the reply repeats `call` and holds `payload` and
arrays, or `error`, and in both cases `changes`: the globals the subject left different (`surroundings.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from dpocheck import wire
from dpocheck.worker import failure
from dpocheck.worker.surroundings import Surroundings

__all__ = ["main"]

LOST_CHANNEL = 70  # exit code: the pipes to the judge are gone
FIRST_FD = 500  # our pipes move up here, out of the way of a subject that closes what it did not open
NEW_MODULES = 20  # so many freshly imported modules make another gc.freeze worth its 0.3 s

# Bound before a subject can replace them.
_read, _write, _getpid, _exit = os.read, os.write, os.getpid, os._exit
_signal, _modules = signal.signal, sys.modules


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dpocheck.worker.main", description=__doc__)
    parser.add_argument("--channel", required=True, help="IN,OUT: file descriptors")
    parser.add_argument("--life", type=int, required=True, help="a pipe that ends when the judge does")
    parser.add_argument("--subject", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--handler", default="dpocheck.worker.requests:handle")
    parser.add_argument("--memory", type=int, default=0, help="bytes of address space; 0: no limit")
    parser.add_argument("--append-path", default="", help="a folder to search for modules last")
    options = parser.parse_args(argv)
    source, sink = (_move_up(int(fd)) for fd in options.channel.split(","))
    _bind_lives(_move_up(options.life))
    _limit(options.memory)
    if options.append_path and options.append_path not in sys.path:
        sys.path.append(options.append_path)
    _Loop(source, sink, options.subject, options.folder, options.handler).run()


def _move_up(fd: int) -> int:
    """The same pipe under a high number that the subject's own child programs do not inherit."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
    except OSError:  # the limit of open files is low
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


def _bind_lives(life: int) -> None:
    """Die with the judge, children included, even if the subject is busy and the judge was killed.

    On Linux the kernel sends SIGKILL to the process group when the pipe's other end is closed.  Elsewhere the loop
    ends at its next read.  A thread is not used: it would make every `fork` of the subject warn.
    """
    if not sys.platform.startswith("linux"):
        return
    set_signal = 10  # F_SETSIG, which the standard library does not name
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, set_signal, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    with contextlib.suppress(OSError, AttributeError):
        # What a double fork leaves behind stays below this process, where it is found.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses; the judge measures the memory too
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    faulthandler.enable()
    _answer_where()


def _answer_where() -> None:
    """Let the judge ask a hung subject where it is; again after a subject took the signal."""
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


class _Loop:
    def __init__(self, source: int, sink: int, subject: str, folder: str, handler: str) -> None:
        self.source, self.sink, self.subject, self.handler = source, sink, subject, handler
        self.pid = _getpid()
        self.state: dict[str, Any] = {"subject": subject, "folder": folder}
        self.handle: Callable[..., Any] | None = None
        self.frozen = len(sys.modules)
        self.replaced: list[str] = []
        self.surroundings = Surroundings()

    def run(self) -> None:
        _signal(signal.SIGINT, signal.SIG_IGN)
        self.surroundings.keep()
        self.send({"ready": True, "python": sys.version.split()[0], "numpy": np.__version__})
        while True:
            request, arrays = wire.read(self.take)
            self.send({"begun": request["call"]})
            reply, out = self.answer(request, arrays)
            self.flush()
            self.send({"call": request["call"], **reply}, out)

    def answer(self, request: dict, arrays: dict) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        op = request["op"]
        reply, out = self.guarded(op, request["payload"], arrays)
        self.only_here()
        if op == "open" and "error" not in reply:
            # What the subject changes while it is imported is told, and stays: it may need it.
            reply["changes"] = [f"on import, {line}" for line in self.surroundings.compare()]
            self.surroundings.keep()
        else:
            reply["changes"] = self.replaced + self.surroundings.changes()
            if any(line.startswith("signals: SIGUSR1") for line in reply["changes"]):
                _answer_where()
        if "error" not in reply:
            self.freeze()
        return reply, out

    def guarded(self, op: str, payload: dict, arrays: dict) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Call the handler; whatever is raised becomes an error reply."""
        try:
            try:
                _signal(signal.SIGINT, signal.default_int_handler)
                if "rng_seed" in payload:
                    self.surroundings.seed(int(payload["rng_seed"]))
                if self.handle is None:
                    module, _, name = self.handler.partition(":")
                    self.handle = getattr(importlib.import_module(module), name)
                answer, out = self.handle(op, payload, arrays, self.state)
            finally:
                self.replaced = self.surroundings.restore_builtins()
                _signal(signal.SIGINT, signal.SIG_IGN)
            wire.encode(answer, out)  # a reply that cannot be sent is an error of this call
            return {"payload": answer}, out
        except BaseException as raised:
            self.only_here()
            return {"error": failure.describe(raised, self.subject, self.state)}, {}

    def only_here(self) -> None:
        """A forked child that comes back into this loop has no business here."""
        if _getpid() != self.pid:
            _exit(0)

    def freeze(self) -> None:
        """Take what is imported out of the garbage collector's sight: accelerate collects at every training's start,
        0.2 to 0.35 s over the objects of imported libraries (85 to 90 % of a one-step run)."""
        if len(_modules) >= self.frozen + NEW_MODULES:
            gc.collect()
            gc.freeze()
            self.frozen = len(_modules)

    @staticmethod
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    def take(self, count: int) -> bytearray:
        buffer = bytearray()
        while len(buffer) < count:
            try:
                part = _read(self.source, min(count - len(buffer), 1 << 20))
            except OSError:
                _exit(LOST_CHANNEL)
            if not part:
                _exit(0)
            buffer += part
        return buffer

    def send(self, message: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
        self.only_here()
        view = memoryview(wire.encode(message, arrays))
        try:
            while view:
                view = view[_write(self.sink, view) :]
        except OSError:
            _exit(LOST_CHANNEL)


if __name__ == "__main__":
    main()
