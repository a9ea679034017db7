"""Which versions were installed beside those that a subject names?  A file in pip's own form for each subject.

`conformance/locks/NAME.txt` is written with a subject's first result.  Its first line says for which Python, machine
and requirements it holds: for these it constrains what pip installs, and an environment that differs is made anew.
For another Python or machine it says nothing, and stays; where the requirements are others, the next result replaces
it.  Torch's builds ("2.13.0+cpu") are not told apart.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from conformance.field.subjects import ROOT, Trainer

LOCKS = ROOT / "conformance" / "locks"
TOOLS = ("pip", "setuptools", "wheel")  # what `python -m venv` brings, whichever it is


def path_of(trainer: Trainer) -> Path:
    return LOCKS / f"{trainer.name}.txt"


def asked(trainer: Trainer) -> str:
    """What the subject itself names."""
    torch = [f"torch=={trainer.torch}"] if trainer.torch else []
    return " ".join(item.replace(" ", "") for item in (*trainer.requirements, *torch, *trainer.bare))


def head(trainer: Trainer) -> str:
    """For what a lock written here holds."""
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}, {sys.platform} {platform.machine()}"
    return f"# {python}: {asked(trainer)}"


def valid(trainer: Trainer) -> Path | None:
    """The lock, where there is one that holds here."""
    path = path_of(trainer)
    if not path.is_file() or path.read_text(encoding="utf-8").partition("\n")[0] != head(trainer):
        return None
    return path


def read(path: Path) -> dict[str, str]:
    """package -> version."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def differs(path: Path, packages: Mapping[str, str]) -> list[str]:
    """What is installed otherwise than the lock says, in words."""
    public = {name: version.partition("+")[0] for name, version in packages.items()}
    return [f"{name} {public.get(name, 'missing')}, not {version}" for name, version in read(path).items()
            if public.get(name) != version]  # fmt: skip


def digest(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else ""


def keep(trainer: Trainer, packages: Mapping[str, str]) -> Path | None:
    """Write what is installed, unless a lock for the same requirements is there; None for a subject without any.

    A lock that another Python or machine wrote for the same requirements stays.
    """
    path, told = path_of(trainer), asked(trainer)
    if not told:
        return None
    if path.is_file() and path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")[2] == told:
        return path
    lines = [f"{name}=={version.partition('+')[0]}" for name, version in sorted(packages.items()) if name not in TOOLS]
    LOCKS.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head(trainer), *lines]) + "\n", encoding="utf-8")
    return path
