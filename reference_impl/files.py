"""How is a folder written so that it is there whole or not at all, and how is that checked later?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WRITING, REMOVING = ".writing-", ".removing-"


class DamagedError(ValueError):
    """A folder that is not what its manifest says."""


class DiskError(RuntimeError):
    """A file of a run that cannot be written; says what to do."""

    def __init__(self, file: Path, error: OSError) -> None:
        super().__init__(f"{file} could not be written ({error.strerror or error}): make room, run the same command")


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        DiskError: the disk is full or gone; an older file is as it was.
    """
    part = file.with_name(f"{WRITING}{file.name}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DiskError(file, error) from error


def append_text(file: Path, text: str) -> None:
    """Adds to a file all of a text or nothing.

    Raises:
        DiskError: the disk is full or gone.
    """
    whole = file.stat().st_size
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        os.truncate(file, whole)
        raise DiskError(file, error) from error


@contextlib.contextmanager
def whole_folder(target: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Yields an empty folder beside `target`; what is in it at the end becomes `target` in one rename, with a manifest.

    The manifest holds `facts` and the size and SHA-256 of every file.  Every file is on the disk before the rename.
    After an error nothing is left.  An older `target` is replaced.
    """
    folder = begin(target)
    try:
        yield folder
        seal(folder, target, facts, {name: digest(folder / name) for name in names(folder)})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def writing_folder(target: Path) -> Path:
    """Where the files of `target` are written until they are all there."""
    return target.parent / f"{WRITING}{target.name}"


def begin(target: Path) -> Path:
    """An empty folder beside `target`, to be sealed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = writing_folder(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def seal(folder: Path, target: Path, facts: dict[str, Any], digests: dict[str, dict[str, Any]]) -> None:
    """Makes a written folder `target`, with a manifest of its files."""
    manifest = {"facts": facts, "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    for name in [*names(folder), MANIFEST]:
        sync(folder / name)
    for sub in sorted({path.parent for path in folder.rglob("*")} | {folder}):
        sync(sub)
    if target.exists():
        remove_folder(target)
    folder.rename(target)
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that no half of it can be taken for the whole: renamed first."""
    doomed = folder.parent / f"{REMOVING}{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Removes what a killed process was writing or removing."""
    for path in parent.iterdir():
        if path.name.startswith((WRITING, REMOVING)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def check_folder(folder: Path) -> dict[str, Any]:
    """The facts of a whole folder.

    Raises:
        DamagedError: no manifest, or a file that is missing or not the one that was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, facts = manifest["files"], manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder} has no readable {MANIFEST}: {error}") from error
    def check(name: str) -> None:
        try:
            found = digest(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != files[name]:
            raise DamagedError(f"{folder / name} is not the file that was written ({found['bytes']} bytes)")

    # A checkpoint of many processes has many large files; hashing leaves the interpreter free for other threads.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, files))
    return facts


def names(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
