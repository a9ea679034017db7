"""How does the judge ask a subject that runs in another process?  `Worker.call`, whatever the subject does.

A worker is started when first asked, serves many calls, and is started anew after a death.  Exceptions tell three
things apart: the subject raised (`SubjectError`), its process died (`WorkerDied`), it took too long
(`WorkerTimeout`).  Each carries what the subject wrote during that call.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpocheck import wire
from dpocheck.text import printable
from dpocheck.transports.process import Process, environment_for, widen
from dpocheck.worker.failure import headline

__all__ = ["Limits", "SubjectError", "Worker", "WorkerDied", "WorkerTimeout"]

TICK = 0.05  # seconds between two looks at a silent worker
GRACE = 2.0  # seconds for a process whose channel closed to end by itself
LOST_CHANNEL = 70  # the exit code of worker/main.py for that
HANDLER = "dpocheck.worker.requests:handle"
HERE = Path(__file__).resolve().parents[1]

# Loads this very package under its name, in an interpreter that may lack it, and leaves sys.path alone: the folder
# above it can hold another release of everything.
_START = (
    "import importlib.util as u, sys\n"
    "p = sys.argv.pop(1)\n"
    "s = u.spec_from_file_location('dpocheck', p + '/__init__.py', submodule_search_locations=[p])\n"
    "m = sys.modules['dpocheck'] = u.module_from_spec(s)\n"
    "s.loader.exec_module(m)\n"
    "from dpocheck.worker.main import main\n"
    "main()\n"
)


class WorkerDied(Exception):
    """The subject's process ended during a call.  `reason`: how, in words; `output`: what it wrote, the last 64 KB."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason, self.output = reason, output


class WorkerTimeout(WorkerDied):
    """The call took longer than its limit and the process was killed; `output` ends with where it was."""


class SubjectError(Exception):
    """The subject raised.  `kind`: "Unsupported" or "Exception"; `type`: the class's name; `traceback`: lines joined.

    `in_adapter`: raised in the adapter's own file.  `in_suite`: raised in this package, which is our fault.
    """

    def __init__(self, error: Mapping[str, Any], output: str) -> None:
        self.kind, self.type = str(error["kind"]), printable(str(error["type"]), 300)
        self.message = printable(str(error["message"]), 4000)
        self.traceback = printable("\n".join(map(str, error["traceback_lines"])), 20_000)
        self.in_adapter, self.in_suite = bool(error["in_adapter"]), bool(error.get("in_suite", False))
        self.output = output
        super().__init__(self.message if self.kind == "Unsupported" else headline(self.type, self.message))


@dataclass(frozen=True)
class Limits:
    """Of one call in wall-clock seconds, of the process and its descendants in GB (2**30), of starting and importing.

    `address_space_gb` None: as much as `memory_gb` while the subject sees no CUDA device, else none, because CUDA
    reserves addresses it never uses.  0: none.
    """

    seconds: float = 120.0
    memory_gb: float = 8.0
    start_seconds: float = 120.0
    address_space_gb: float | None = None


class Worker:
    """One subject in a process of its own.  Calls from several threads are answered one after the other.

    `folder` holds the subject's caches.  `environment` overrides what `process.DEFAULTS` sets.  The first request of
    every process is `open`, sent by the worker itself where the caller did not.
    """

    def __init__(
        self, subject: str, *, python: str = sys.executable, limits: Limits = Limits(), folder: Path,
        environment: Mapping[str, str] | None = None, handler: str = HANDLER, cwd: Path | None = None,
    ) -> None:  # fmt: skip
        self.subject, self.python, self.limits, self.handler = subject, python, limits, handler
        self.folder = Path(folder).resolve()
        self.environment = dict(environment or {})
        self.cwd = Path.cwd() if cwd is None else Path(cwd)
        self.last_changes: tuple[str, ...] = ()
        self.starts = 0
        self.output = ""  # of the last call
        self._process: Process | None = None
        self._fds: dict[str, int] = {}
        self._opening: tuple[dict, dict | None] = ({"subject": subject}, None)
        self._opened = False
        self._tainted = False
        self._stopped = False
        self._calls = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the living process, or None."""
        return None if self._process is None or self._process.ended() else self._process.popen.pid

    def call(
        self, op: str, payload: dict, arrays: dict[str, np.ndarray] | None = None, *, seconds: float | None = None
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Ask, and wait for the answer at most `seconds` (default: the limit).  A process's first request may take
        `start_seconds` more, for imports.  Raises SubjectError, WorkerDied, WorkerTimeout."""
        seconds = self.limits.seconds if seconds is None else seconds
        with self._lock:
            self.last_changes, self.output = (), ""
            while True:
                fresh = self.pid is None
                try:
                    return self._call(op, payload, arrays, seconds, fresh)
                except WorkerTimeout:
                    self._end()
                    raise
                except WorkerDied:
                    suspect = self._tainted and not fresh
                    self._end()
                    if not suspect or self._stopped:
                        raise
                    # A thread or process that an earlier call left behind may have done it: ask again, in a new one.
                except SubjectError:
                    raise
                except BaseException:
                    self._end()  # interrupted in the middle of an exchange
                    raise

    def close(self) -> None:
        """End the process and everything it started.  A later call starts a new one."""
        with self._lock:
            self._end()

    def stop(self) -> None:
        """End the process from another thread, though a call is waiting for it: that call raises WorkerDied, and its
        output ends with where the process was."""
        self._stopped = True
        if self._process is not None:
            self._process.ask_where()
            self._process.kill()

    # ------------------------------------------------------------------------------------------------------- a call

    def _call(self, op: str, payload: dict, arrays: dict | None, seconds: float, fresh: bool) -> tuple[dict, dict]:
        if fresh:
            self._end()
            self._start()
        if op == "open":
            self._opening = (payload, arrays)
        if not self._opened:
            answer = self._exchange("open", *self._opening, seconds + self.limits.start_seconds)
            self._opened = True
            if op == "open":
                return answer
            seconds += self.limits.start_seconds  # many adapters import their trainer at the first call
        return self._exchange(op, payload, arrays, seconds)

    def _exchange(self, op: str, payload: dict, arrays: dict | None, seconds: float) -> tuple[dict, dict]:
        assert self._process is not None
        self._calls += 1
        number, mark = self._calls, self._process.output.total
        frame = wire.encode({"call": number, "op": op, "payload": payload}, arrays)
        wait = _Wait(self._process, self.limits.memory_gb, seconds, mark, f"the call {op!r}")
        try:
            self._send(frame, wait)
            reply, out = self._receive(wait)
            while reply.get("begun") == number:
                reply, out = self._receive(wait)
        except wire.MalformedFrame as error:
            raise wait.died(f"sent something that is no answer: {error}") from None
        if reply.get("call") != number:
            raise wait.died(f"answered call {reply.get('call')!r} where call {number} was asked")
        self.last_changes += tuple(printable(str(line), 300) for line in reply.get("changes", ()))
        self._tainted |= any(line.startswith(("thread:", "process:")) for line in self.last_changes)
        self._process.output.settle()
        self.output = self._process.output.since(mark)
        if "error" in reply:
            raise SubjectError(reply["error"], self.output)
        return reply["payload"], out

    def _send(self, frame: bytes, wait: _Wait) -> None:
        view, fd = memoryview(frame), self._fds["requests"]
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                wait.until(fd, select.POLLOUT)
            except OSError:
                wait.gone()

    def _receive(self, wait: _Wait) -> tuple[dict, dict]:
        fd = self._fds["replies"]

        def take(count: int) -> bytearray:
            buffer = bytearray()
            while len(buffer) < count:
                try:
                    part = os.read(fd, min(count - len(buffer), 1 << 20))
                except BlockingIOError:
                    wait.until(fd, select.POLLIN)
                    continue
                if not part:
                    wait.gone()
                buffer += part
            return buffer

        return wire.read(take)

    # ------------------------------------------------------------------------------------------------ start and end

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = environment_for(self.folder, self.environment)
        space = self.limits.address_space_gb
        if space is None:
            space = 0.0 if environment.get("CUDA_VISIBLE_DEVICES") else self.limits.memory_gb
        request_read, requests = os.pipe()
        replies, reply_write = os.pipe()
        life_read, life = os.pipe()
        theirs = (request_read, reply_write, life_read)
        self._fds = {"requests": requests, "replies": replies, "life": life}
        command = [
            self.python, "-P", "-c", _START, str(HERE), "--channel", f"{request_read},{reply_write}",
            "--life", str(life_read), "--subject", self.subject, "--folder", str(self.folder),
            "--handler", self.handler, "--memory", str(int(space * 2**30)), "--append-path", str(self.cwd),
        ]  # fmt: skip
        try:
            self._process = Process(command, environment=environment, cwd=self.cwd, pass_fds=theirs)
        except OSError as error:
            raise WorkerDied(f"{self.python} cannot be started: {error.strerror or error}") from None
        finally:
            for fd in theirs:
                os.close(fd)
        for fd in (requests, replies):
            os.set_blocking(fd, False)
            widen(fd)
        self.starts += 1
        wait = _Wait(self._process, self.limits.memory_gb, self.limits.start_seconds, 0, "starting")
        try:
            ready, _ = self._receive(wait)
        except wire.MalformedFrame as error:
            raise wait.died(f"sent something else than a greeting: {error}") from None
        if not ready.get("ready"):
            raise wait.died("sent something else than a greeting")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._process, self._opened, self._tainted = None, False, False
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = {}


class _Wait:
    """Waiting for one answer: until it comes, the process ends, its memory or the time is used up."""

    def __init__(self, process: Process, memory_gb: float, seconds: float, mark: int, what: str) -> None:
        self.process, self.memory_gb, self.seconds, self.mark, self.what = process, memory_gb, seconds, mark, what
        self.until_time = time.monotonic() + seconds

    def until(self, fd: int, event: int) -> None:
        """Return once `fd` is ready or its other end closed."""
        poll = select.poll()
        poll.register(fd, event)
        while not poll.poll(TICK * 1000):
            if self.process.ended():
                if poll.poll(0):  # it answered, and then ended
                    return
                self.gone()
            if time.monotonic() > self.until_time:
                self.process.ask_where()
                output = self.process.output.since(self.mark)
                raise WorkerTimeout(f"{self.what} took more than {self.seconds:g} s and was stopped", output)
            self._weigh()

    def _weigh(self) -> None:
        limit = self.memory_gb * 2**30
        if limit and self.process.memory() > limit and (used := self.process.proportional_memory()) > limit:
            raise self.died(f"used {used / 2**30:.2f} GB of memory; the limit is {self.memory_gb:g} GB")

    def gone(self) -> None:
        """The channel is closed: say why."""
        until = time.monotonic() + GRACE
        while not self.process.ended() and time.monotonic() < until:
            time.sleep(0.005)
        if not self.process.ended() or self.process.popen.returncode == LOST_CHANNEL:
            raise self.died("closed the channel to the judge (it closed files that it had not opened)")
        raise self.died(self.process.how_it_ended())

    def died(self, what: str) -> WorkerDied:
        self.process.output.settle()
        return WorkerDied(f"during {self.what} the subject's process {what}", self.process.output.since(self.mark))
