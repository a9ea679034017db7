"""How is somebody else's program run so that it can spoil nothing but its own run?

Without a shell, in a session of its own, offline, with a limit on time and on the memory of the whole process tree.
Its output is read as it comes and only the last 64 KB are kept, however much there is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

KEPT = 64 * 1024  # bytes of output
PIECE = 1 << 16
POLL = 0.25  # seconds between two looks at the tree

# What a launcher, a test runner or a debugger leaves in the environment and a trainer would act on.
_FOREIGN = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|ROLE_.*|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*"
    r"|ACCELERATE_.*|FSDP_.*|PYTEST_.*|COV_.*|PYTHONHASHSEED|PYTHONINSPECT|WANDB_.*|HF_.*|TRANSFORMERS_.*)$"
)


class CommandFailed(Exception):
    """The command failed, hung, or wrote nothing.  `reason` in one line, and the last of its own `output`."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


@dataclass(frozen=True)
class Finished:
    """A command that ended with exit status 0."""

    output: str
    seconds: float


def offline(folder: Path, shared: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a run: this one's, without launchers' variables, offline, caches inside `folder`.

    What is only compiled code goes to `shared`, so that it is built once.  `extra` has the last word.
    """
    cache = folder / "cache"
    kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    kept |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1",
             "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}  # fmt: skip
    kept |= {"HF_HOME": str(cache / "huggingface"), "XDG_CACHE_HOME": str(cache), "TMPDIR": str(folder / "tmp")}
    kept |= {"MPLCONFIGDIR": str(shared / "matplotlib"), "TORCH_EXTENSIONS_DIR": str(shared / "extensions"),
             "TRITON_CACHE_DIR": str(shared / "triton")}  # fmt: skip
    return kept | dict(extra)


class _Reader(threading.Thread):
    """Reads a pipe to its end: keeps the tail, and hands whole lines on."""

    def __init__(self, pipe: int, lines: Callable[[str], None] | None) -> None:
        super().__init__(daemon=True)
        self.pipe, self.lines = pipe, lines
        self.tail, self.rest = b"", b""

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self.pipe, PIECE):
                self.tail = (self.tail + piece)[-KEPT:]
                self._hand_on(piece)
        self._hand_on(b"\n")

    def _hand_on(self, piece: bytes) -> None:
        if self.lines is None:
            return
        text, _, self.rest = (self.rest + piece).rpartition(b"\n")
        self.rest = self.rest[-KEPT:]  # a line that never ends
        if text:
            self.lines(text.decode("utf-8", "replace"))


def run(
    arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, seconds: float, memory_gb: float,
    lines: Callable[[str], None] | None = None,
) -> Finished:  # fmt: skip
    """Run a program to its end; `lines` is given its output, whole lines at a time.

    Raises CommandFailed if it cannot start, exits with another status than 0, or passes a limit.
    """
    began = time.monotonic()
    source, sink = os.pipe()
    try:
        child = subprocess.Popen(
            list(arguments), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=folder, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.close(source)
        raise CommandFailed(f"could not be started: {error.strerror or error}: {arguments[0]}") from None
    finally:
        os.close(sink)
    reader = _Reader(source, lines)
    reader.start()
    tree: dict[int, psutil.Process] = {}
    try:
        passed = _wait(child, tree, began + seconds, memory_gb * 2**30)
    finally:
        _end(child, tree)
        reader.join(5)
        if not reader.is_alive():
            os.close(source)
    output = reader.tail.decode("utf-8", "replace")
    if passed is not None:
        _unlock(environment)
    if passed == "time":
        raise CommandFailed(f"was still running after {seconds:g} s, the time limit", output)
    if passed is not None:
        raise CommandFailed(f"used {passed} of memory; the limit is {memory_gb:g} GB", output)
    if child.returncode:
        raise CommandFailed(_ended(child.returncode), output)
    return Finished(output, time.monotonic() - began)


def _unlock(environment: Mapping[str, str]) -> None:
    """A run that is ended while it compiles leaves torch's lock, and every later run would wait for it for ever."""
    for lock in Path(environment.get("TORCH_EXTENSIONS_DIR", "/nowhere")).glob("*/lock"):
        lock.unlink(missing_ok=True)


def _ended(code: int) -> str:
    if code > 0:
        return f"exited with status {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
    return f"was ended by signal {name}"


def _wait(child: subprocess.Popen, tree: dict[int, psutil.Process], until: float, bytes_: float) -> str | None:
    """Until the child has ended: None; or until a limit is passed: "time", or the memory used."""
    pause = 0.01
    while True:
        try:
            child.wait(pause)
            return None
        except subprocess.TimeoutExpired:
            pause = min(POLL, pause * 2)
        if time.monotonic() > until:
            return "time"
        used = _look(child, tree)
        if used > bytes_:
            return f"{used / 2**30:.1f} GB"


def _look(child: subprocess.Popen, tree: dict[int, psutil.Process]) -> int:
    """Note every process of the tree, also those that left the session; the resident bytes of all."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(child.pid)
        for process in [root, *root.children(recursive=True)]:
            tree.setdefault(process.pid, process)
    used = 0
    for process in tree.values():
        with contextlib.suppress(psutil.Error):
            used += process.memory_info().rss
    return used


def _end(child: subprocess.Popen, tree: dict[int, psutil.Process]) -> None:
    """Nothing of the run outlives it."""
    if child.poll() is None:
        _look(child, tree)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in tree.values():  # psutil compares start times: a reused pid is not touched
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait()
