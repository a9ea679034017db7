"""How a result gets onto the disk whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

__all__ = ["CannotWrite", "new_folder_beside", "replace_folder", "write_atomic"]

RESULT = "results.jsonl"  # a folder that holds it was written by this tool and may be replaced


class CannotWrite(OSError):
    """A file or folder cannot be written; the message says which, why, and what to do."""


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, also after a crash.

    Raises CannotWrite; the old file is then untouched and nothing new is left behind.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), _mode_of_new_files(path))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise _cannot_write(path, error) from error


def new_folder_beside(final: Path | str) -> Path:
    """An empty folder on the same disk as `final`, to be filled and handed to `replace_folder`.

    Raises CannotWrite where `final` could not be replaced: a file, a folder of somebody else's, no permission.
    """
    final = Path(os.path.realpath(final))
    _refuse_foreign(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        folder.chmod(0o777 & ~_umask())
    except OSError as error:
        raise _cannot_write(final, error) from error
    return folder


def replace_folder(new: Path | str, old: Path | str) -> None:
    """Put the folder `new` in the place of `old`, which is removed.  `new` must be on the same disk.

    Raises CannotWrite; `old` is then where it was, and `new` too.
    """
    new, old = Path(new), Path(os.path.realpath(old))
    _refuse_foreign(old)
    aside: Path | None = None
    if _exchanged(new, old):
        _sync_folder(old.parent)
        shutil.rmtree(new, ignore_errors=True)
        return
    try:
        if old.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.old.", dir=old.parent))
            os.rename(old, aside)  # onto an empty folder, which rename replaces
        os.rename(new, old)
        _sync_folder(old.parent)
    except OSError as error:
        if aside is not None and not old.exists():
            os.rename(aside, old)
        elif aside is not None:
            with contextlib.suppress(OSError):
                aside.rmdir()
        raise _cannot_write(old, error) from error
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _exchanged(new: Path, old: Path) -> bool:
    """Swap two folders in one step of the kernel, so that no moment is without a result; False where it cannot."""
    if not (sys.platform.startswith("linux") and new.is_dir() and old.is_dir()):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError, OSError):
        return ctypes.CDLL(None).renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0
    return False


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CannotWrite(f"{folder} is a file; the results need a folder: name another one")
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if names and RESULT not in names:
        few = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise CannotWrite(
            f"{folder} holds files ({few}) but no {RESULT}, so it is not a result of an earlier run and "
            "is not replaced; name a new or an empty folder"
        )


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    if isinstance(error, CannotWrite):
        return error
    why = error.strerror or str(error)
    return CannotWrite(f"cannot write {path}: {why}; name a place that can be written")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _mode_of_new_files(path: Path) -> int:
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o666 & ~_umask()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
