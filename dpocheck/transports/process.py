"""How is a stranger's program run so that it can neither flood, outgrow nor outlive us?

A `Process` is a program in a session of its own, with nothing on its standard input, its output kept to the last
64 KB, its memory measured with all its descendants, and an end that leaves none of them.  Judge side.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from dpocheck.text import printable

__all__ = ["DEFAULTS", "Process", "environment_for", "widen"]

KEPT = 64 * 1024  # bytes of output
MARK = "DPOCHECK_PROCESS"  # every descendant inherits it, however often it forked and changed session

DEFAULTS = {
    # One thread: models this small gain nothing from more, and two workers must not fight over cores.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing leaves this machine, nothing is fetched.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "WANDB_DISABLED": "true",
    "COMET_MODE": "DISABLED",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    # The CPU, where every bound is known; the same bits each time; no output held back.
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
}
IN_FOLDER = {
    "HF_HOME": "hf",
    "HF_DATASETS_CACHE": "hf/datasets",
    "XDG_CACHE_HOME": "cache",
    "MPLCONFIGDIR": "cache/matplotlib",
}
# Of a launcher around us: a trainer would take itself for one rank of that.
DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
DROPPED_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PYTEST_")


def environment_for(folder: Path, told: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, then what isolates and calms a trainer (`DEFAULTS`, caches inside `folder`), then what we were told."""
    kept = {k: v for k, v in os.environ.items() if k not in DROPPED and not k.startswith(DROPPED_PREFIXES)}
    return kept | DEFAULTS | {k: str(folder / v) for k, v in IN_FOLDER.items()} | dict(told or {})


def widen(pipe: int) -> None:
    """Let a pipe hold 1 MB instead of 64 KB, where the system can: fewer turns for a flood or a large array."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, 1031, 1 << 20)  # F_SETPIPE_SZ


class _Output:
    """The last 64 KB of a pipe, read by a thread of its own so that a writer never waits; counts what went by."""

    def __init__(self, fd: int) -> None:
        self.fd, self.total, self._tail, self._closed = fd, 0, bytearray(), False
        os.set_blocking(fd, False)
        self._lock = threading.Lock()  # held while a part is taken from the pipe and added
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._follow, name="dpocheck-output", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        more = True
        while more:
            ready = dict(poll.poll())
            with self._lock:
                more = self._take() if self.fd in ready else self._stop_read not in ready
        with self._lock:
            self._closed = True
            os.close(self.fd)

    def _take(self) -> bool:
        """Take one part of what is waiting; False at the end of the pipe."""
        try:
            part = os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return True
        self.total += len(part)
        self._tail += part
        if len(self._tail) > 4 * KEPT:
            del self._tail[:-KEPT]
        return bool(part)

    def settle(self, seconds: float = 0.5) -> None:
        """Take what was written before now, so that it is told with the call that wrote it."""
        until = time.monotonic() + seconds
        with self._lock:
            while not self._closed and time.monotonic() < until:
                before = self.total
                self._take()
                if self.total == before:
                    return

    def since(self, mark: int) -> str:
        with self._lock:
            written = self.total - mark
            tail = bytes(self._tail[-min(written, KEPT) :]) if written > 0 else b""
        text = printable(tail.decode("utf-8", "replace"))
        lost = written - len(tail)
        return f"[... {lost} bytes of output before this are not kept ...]\n{text}" if lost > 0 else text

    def end(self) -> None:
        """Read what is left, then stop, also if a stray descendant still holds the pipe."""
        if self._stop_write < 0:
            return
        self.settle()
        os.write(self._stop_write, b"x")
        self._thread.join(2.0)
        os.close(self._stop_write)
        if not self._thread.is_alive():
            os.close(self._stop_read)
        self._stop_write = -1


class Process:
    """A program in a session of its own.  Raises OSError where it cannot be started."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.mark = uuid.uuid4().hex
        out_read, out_write = os.pipe()
        widen(out_write)
        try:
            self.popen = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out_write, stderr=out_write, cwd=cwd,
                env={**environment, MARK: self.mark}, pass_fds=tuple(pass_fds), start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(out_read)
            raise
        finally:
            os.close(out_write)
        self.output = _Output(out_read)
        self._root: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._root = psutil.Process(self.popen.pid)
        self._children: list[psutil.Process] = []
        self._listed = 0.0
        self.kill = weakref.finalize(self, _kill, self.popen, self.mark, self.output)

    def ended(self) -> bool:
        return self.popen.poll() is not None

    def memory(self) -> int:
        """Resident bytes of the program and all its descendants; what forked processes share is counted once where
        the sum grows large.  The list of descendants is at most half a second old."""
        if self._root is None:
            return 0
        with contextlib.suppress(psutil.Error):
            if time.monotonic() - self._listed > 0.5:
                self._listed, self._children = time.monotonic(), self._root.children(recursive=True)
            return sum(_resident(process) for process in [self._root, *self._children])
        return 0

    def proportional_memory(self) -> int:
        """The same with shared pages divided among those who share them; slow, Linux only, else `memory`."""
        total = 0
        for process in [self._root, *self._children]:
            with contextlib.suppress(psutil.Error):
                full = process.memory_full_info()
                total += getattr(full, "pss", full.rss)
        return total

    def ask_where(self) -> None:
        """Have a Python program that registered SIGUSR1 write its stacks to its output."""
        with contextlib.suppress(OSError):
            os.kill(self.popen.pid, signal.SIGUSR1)
        time.sleep(0.1)
        self.output.settle()

    def how_it_ended(self) -> str:
        """`exited with code 7` or `was killed by signal 11 (SIGSEGV)`."""
        code = self.popen.poll()
        if code is None:
            return "is still running"
        if code >= 0:
            return f"exited with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by signal {-code} ({name}){hint}"


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _kill(popen: subprocess.Popen, mark: str, output: _Output) -> None:
    """End the program and every descendant: listed first, because the dead have no children; then the group; then
    each by itself, for those that left the group; then whoever bears the mark, for those that lost their parent."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        if popen.poll() is None:
            family = psutil.Process(popen.pid).children(recursive=True)
    with contextlib.suppress(OSError):
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        popen.kill()
    until = time.monotonic() + 5.0
    while family := [*family, *_marked(mark)]:  # again, for those that forked meanwhile or take their time to die
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        family = []
        if time.monotonic() > until:
            break
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(5.0)
    output.end()


def _marked(mark: str) -> list[psutil.Process]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in psutil.pids():
        try:
            if sys.platform.startswith("linux"):
                with open(f"/proc/{pid}/environ", "rb") as file:
                    ours = wanted in file.read().split(b"\0")
            else:
                ours = psutil.Process(pid).environ().get(MARK) == mark
            if ours:
                found.append(psutil.Process(pid))
        except (OSError, psutil.Error):
            continue
    return found
