"""Which trainers and releases are there?  Reads `conformance/subjects.toml`, whose head says what a field means."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "conformance" / "subjects.toml"
TORCH = "2.13.0"


class FieldError(Exception):
    """What was asked of the field cannot be done; the message says what was given and what is allowed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """One release of one trainer, by one route."""

    name: str
    family: str
    adapter: str = ""
    command: str = ""
    package: str = ""
    release: str = ""
    requirements: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    torch: str = TORCH
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    checkout: str = ""
    newest: bool = False
    note: str = ""

    @property
    def route(self) -> str:
        return "adapter" if self.adapter else "command line"

    @property
    def subject(self) -> str:
        """What `dpocheck audit` is given."""
        given = self.adapter or self.command
        return given if given.startswith("zoo:") else str(ROOT / given)

    @property
    def driver(self) -> Path:
        """The file that says how it is driven."""
        return Path(self.subject.partition(".py:")[0] + (".py" if ".py:" in self.subject else ""))

    @property
    def expected(self) -> Path:
        """The known failures of this subject, where there are any."""
        return ROOT / "conformance" / "expected" / f"{self.name}.toml"


TEXTS = ("name", "family", "adapter", "command", "package", "release", "torch", "checkout", "note")
LISTS = ("with", "bare", "options")
ALLOWED = (*TEXTS, *LISTS, "environment", "newest")


def load(path: Path = FILE) -> dict[str, Trainer]:
    """The subjects by name, in the order of the file.  Raises FieldError on anything it does not understand."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FieldError(f"{path}: {error}") from None
    _allowed(data, ("pins", "family", "subject"), str(path))
    pins, families = data.get("pins", {}), data.get("family", {})
    found: dict[str, Trainer] = {}
    for number, given in enumerate(data.get("subject", []), 1):
        at = f"{path.name}, subject {given.get('name', number)}"
        if given.get("family") not in families:
            raise FieldError(f"{at}: family {given.get('family')!r} is none of {', '.join(families) or 'none'}")
        trainer = _trainer(families[given["family"]] | given, pins, at)
        if trainer.name in found:
            raise FieldError(f"{at}: the name is taken already")
        found[trainer.name] = trainer
    return found


def chosen(names: list[str], known: Mapping[str, Trainer]) -> list[Trainer]:
    """The subjects of these names or families; of none, all.  Raises FieldError."""
    picked: dict[str, Trainer] = {}
    for name in names:
        of_family = {t.name: t for t in known.values() if t.family == name}
        if not of_family and name not in known:
            near = difflib.get_close_matches(name, [*known, *{t.family for t in known.values()}], 3, 0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `ci/field --list` shows all"
            raise FieldError(f"no subject or family is called {name!r}{hint}")
        picked |= {name: known[name]} if name in known else of_family
    return list((picked if names else known).values())


def _trainer(given: dict[str, Any], pins: Mapping[str, Any], at: str) -> Trainer:
    _allowed(given, ALLOWED, at)
    for name in given:
        kind = str if name in TEXTS else list if name in LISTS else bool if name == "newest" else dict
        if not isinstance(given[name], kind):
            raise FieldError(f"{at}: {name} is {given[name]!r}; it must be a {kind.__name__}")
    if not given.get("name"):
        raise FieldError(f"{at}: it has no name")
    if bool(given.get("adapter")) == bool(given.get("command")):
        raise FieldError(f"{at}: name either an adapter or a command")
    if given.get("release") and not given.get("package"):
        raise FieldError(f"{at}: a release is given, but no package")
    wanted = [f"{given['package']}=={given['release']}"] if given.get("release") else []
    for item in given.get("with", []):
        if item.startswith("@") and item[1:] not in pins:
            raise FieldError(f"{at}: {item} is no list under [pins]; there are: {', '.join(pins)}")
        wanted += pins[item[1:]] if item.startswith("@") else [item]
    own = {f.name for f in fields(Trainer)} - {"requirements"}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in own}
    return Trainer(requirements=tuple(_without_bare(wanted, kept.get("bare", ()))), **kept)


def _without_bare(wanted: list[str], bare: tuple[str, ...]) -> list[str]:
    """A package that `bare` names is not installed with its dependencies too."""
    alone = {item.partition("==")[0] for item in bare}
    return [item for item in wanted if item.partition("==")[0] not in alone]


def _allowed(given: Mapping[str, Any], allowed: tuple[str, ...], at: str) -> None:
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise FieldError(f"{at}: unknown field {name!r}{hint} Allowed: {', '.join(allowed)}")
