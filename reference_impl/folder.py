"""Who may write into the folder of a run?  One run at a time, which holds a lock until it is done."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from reference_impl.config import ConfigError
from reference_impl.files import remove_leftovers

_LOCKS: dict[str, int] = {}


def open_folder(output_dir: str | Path) -> Path:
    """The folder of a run, made, tried and locked: one run at a time, until this process ends or closes it.

    Raises:
        ConfigError: it cannot be written, or another process is running in it.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if str(folder.resolve()) in _LOCKS:
            return folder  # a run of this process that has not been closed
        raise ConfigError(f"output_dir {folder} is in use by another run: wait, or give another") from error
    _LOCKS[str(folder.resolve())] = lock
    remove_leftovers(folder)
    return folder


def close_folder(folder: Path) -> None:
    lock = _LOCKS.pop(str(folder.resolve()), None)
    if lock is not None:
        os.close(lock)
