"""How does a release get an environment of its own?  A virtual environment, made once by pip and kept.

Torch, most of the weight, lies in an environment of its own; the others see it through a `.pth` file, behind what they
install themselves.  So a release may have an older numpy or fsspec than torch brings.  Where the subject has a lock,
all versions are those of the lock (`locks`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.field import locks
from conformance.field.subjects import Trainer

STAMP = "dpocheck.json"  # written last: an environment without it was interrupted and is made anew
SHARED = "zz_shared_torch.pth"


class BrokenEnvironment(Exception):
    """pip could not make the environment; the message is what it said, `log` holds all of it."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Environment:
    """Where an environment is, what is in it, and what it took."""

    folder: Path
    packages: dict[str, str]
    megabytes: int  # its own: what it shares is not counted again
    seconds: float
    lock: str = ""  # the digest of the lock that it was made with

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def cache() -> Path:
    """The folder of all environments and of what audits leave beside their result."""
    return Path(os.environ.get("DPOCHECK_FIELD") or "~/.cache/dpocheck/field").expanduser().absolute()


def folder_of(trainer: Trainer) -> Path:
    """Subjects that install the same things share an environment."""
    told = json.dumps([trainer.requirements, trainer.bare, trainer.torch, sys.version_info[:2]])
    name = f"{trainer.package}-{trainer.release}".strip("-") or trainer.family
    return cache() / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def ready(trainer: Trainer) -> Environment | None:
    """The environment of a subject, if it is there already."""
    return _stamped(folder_of(trainer))


def made(trainer: Trainer) -> Environment:
    """The environment of a subject; made now where it is not there.  Raises BrokenEnvironment."""
    folder, lock = folder_of(trainer), locks.valid(trainer)
    with _alone(folder):
        found = _stamped(folder)
        if found is not None and (lock is None or found.lock == locks.digest(lock)
                                  or not locks.differs(lock, found.packages)):  # fmt: skip
            return found
        started = time.monotonic()
        shared = _shared(trainer.torch) if trainer.torch else None
        _make(folder)
        fixed = []
        if shared is not None:
            (_packages_of(folder) / SHARED).write_text(f"{_packages_of(shared)}\n", encoding="utf-8")
            fixed = [f"torch=={trainer.torch}"]
        pinned = ["--constraint", str(lock)] if lock else []
        _install(folder, [*trainer.requirements, *fixed], pinned)
        _install(folder, trainer.bare, ["--no-deps"])
        return _stamp(folder, time.monotonic() - started, locks.digest(lock))


def _shared(torch: str) -> Path:
    folder = cache() / f"torch-{torch}-py{sys.version_info[0]}{sys.version_info[1]}"
    with _alone(folder):
        if _stamped(folder) is None:
            started = time.monotonic()
            _make(folder)
            _install(folder, [f"torch=={torch}"])
            _stamp(folder, time.monotonic() - started)
    return folder


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)


def _install(folder: Path, requirements: Sequence[str], options: Sequence[str] = ()) -> None:
    if not requirements:
        return
    log = folder.with_suffix(folder.suffix + ".log")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ pip install {' '.join([*options, *requirements])}\n")
        out.flush()
        done = subprocess.run([*map(str, command), *options, *requirements], stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise BrokenEnvironment("pip: " + " ".join(errors[-2:])[:400], log)


def _packages_of(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*")) / "site-packages"


def _stamp(folder: Path, seconds: float, lock: str = "") -> Environment:
    """Note what is in an environment, which declares it finished."""
    listed = subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    packages = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    told = {"packages": packages, "megabytes": round(size / 2**20), "seconds": round(seconds, 1), "lock": lock}
    (folder / STAMP).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return Environment(folder, packages, told["megabytes"], told["seconds"], lock)


def _stamped(folder: Path) -> Environment | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return Environment(folder, told["packages"], told["megabytes"], told["seconds"], told.get("lock", ""))
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
