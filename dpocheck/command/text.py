"""How are the texts of a command line's description filled in?  Placeholders in braces, as in `--beta {beta}`."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

# Every placeholder, with a value of its type: texts are tried on them before anything runs.
PLACEHOLDERS = {
    # folders and programs
    "policy": "/p", "reference": "/r", "base": "/p", "resume": "/s", "rows": "/d", "out": "/o", "work": "/w",
    "python": "python", "bin": "/bin", "environment": "/env", "here": "/h",
    # the recipe
    "beta": 0.1, "learning_rate": 1.0, "steps": 1, "microsteps": 1, "batch": 1, "accumulation": 1, "window": 1,
    "examples": 1, "passes": 1, "seed": 0,
    "epochs": 1, "max_length": 8, "clip_norm": 1.0, "weight_decay": 0.0, "momentum": 0.0, "warmup_steps": 0,
    "beta1": 0.0, "beta2": 0.0, "epsilon": 1e-8, "save_every": 1, "resume_from": 1, "eval_batch": 1, "eval_every": 1,
    "rank": 64, "alpha": 64.0, "ranks": 1,
    # the objective
    "smoothing": 0.0, "gamma": 0.0, "sft_weight": 0.0,
}  # fmt: skip

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}")


class CommandError(Exception):
    """The description of a command line is wrong; the message says what was given, what is allowed, what to do."""


def near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def expand(text: str, values: Mapping[str, Any]) -> str:
    """`text` with its placeholders filled in.  A brace that is no known placeholder stays, as JSON and YAML need."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            return match[0]
        value = values[match[1]]
        return format(value, match[2]) if match[2] else number(value) if isinstance(value, float) else str(value)

    return _PLACE.sub(fill, text)


def number(value: float) -> str:
    """All digits, in a form that YAML also reads as a number: 1.0e-05, not 1e-05."""
    text = repr(float(value))
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def words(text: str, values: Mapping[str, Any]) -> list[str]:
    """The arguments of a command line: split as a shell splits, then filled in, so that a path may hold a space."""
    return [expand(word, values) for word in shlex.split(text)]


def check(text: str, where: str, known: Mapping[str, Any], *, split: bool) -> None:
    """Raise CommandError unless every placeholder is known and the text can be filled in and, if asked, split."""
    for match in _PLACE.finditer(text):
        if match[1] not in known:
            names = ", ".join(sorted(known))
            raise CommandError(f"unknown placeholder {match[0]} in {where}{near(match[1], known)}; known: {names}")
    try:
        expand(text, known)
        if split:
            shlex.split(text)
    except ValueError as error:
        raise CommandError(f"{where} cannot be read: {error}: {text!r}") from None
