"""What is left when a run is killed at its n-th file operation?  A child process that kills itself there.

Used by test_trainer_crash.py. The parent has imported everything, so a child is a fork and costs no import; the audit
hook sees every open, rename, mkdir and removal that Python code makes, without a hook in the trainer.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer_tiny import llama, pairs

from reference_impl import TrainConfig, train

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")
SETTINGS = {"steps": 6, "batch": 2, "accumulation": 2, "save_every": 2, "keep_last": 2, "learning_rate": 1e-2}


def train_in(folder: Path, **settings: Any) -> Any:
    config = TrainConfig(**{**SETTINGS, "output_dir": str(folder), **settings})
    return train(config, model=llama(), train_rows=pairs(10), eval_rows={"held": pairs(3, 1)})


def in_child(action: Callable[[], Any]) -> int:
    """Runs `action` in a fork; returns its exit code, negative for a signal. 0: it ended by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(operation: int, folder: Path) -> None:
    """From now on this process dies at its `operation`-th file operation (from 1) below `folder`."""
    below, count = str(folder), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and below in os.fspath(arguments[0]):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def limit_file_size(bytes_allowed: int) -> None:
    """From now on no file of this process grows beyond this: what a full disk looks like to every writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, resource.RLIM_INFINITY))
