"""Does the suite find a bug in the release that had it, and nothing in the release that had it not?

Each file of `conformance/history/` is one such pair:

    title = "the longest row of a padded batch loses its last token"
    broken = "trl-0.12.2"              # a subject that has the bug
    right = "trl-0.13.0"               # one that has it not: the release that fixed it, or the last before it came
    kind = "fixed"                     # or "introduced"
    check = "GRAD-RAGGED"              # must fail in the first and pass in the second
    objective = "sigmoid"              # as `dpocheck audit --objective`; absent: the ordinary one
    url = "https://github.com/huggingface/trl/pull/2332"
"""

from __future__ import annotations

import datetime
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from conformance.field import audits
from conformance.field.subjects import ROOT, FieldError, Trainer

FOLDER = ROOT / "conformance" / "history"
RESULT = FOLDER / "results.json"
KINDS = ("fixed", "introduced")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two releases on either side of a bug, and the check that tells them apart."""

    name: str
    title: str
    broken: str
    right: str
    check: str
    url: str
    kind: str = "fixed"
    objective: str = ""


def load(known: Mapping[str, Trainer], folder: Path = FOLDER) -> list[Pair]:
    """The pairs by name.  Raises FieldError on anything that is not understood."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
            pair = Pair(name=path.stem, **given)
        except (ValueError, TypeError) as error:
            allowed = ", ".join(field.name for field in fields(Pair) if field.name != "name")
            raise FieldError(f"{path.name}: {error}; the fields are: {allowed}") from None
        if pair.kind not in KINDS:
            raise FieldError(f"{path.name}: kind is {pair.kind!r}; it must be one of {', '.join(KINDS)}")
        for side in (pair.broken, pair.right):
            if side not in known:
                raise FieldError(f"{path.name}: no subject is called {side!r}")
        found.append(pair)
    return found


def run(pairs: list[Pair], known: Mapping[str, Trainer], *, again: bool = False) -> dict[str, Any]:
    """Ask each subject once for all that the pairs want of it; what was found by pair, with the date.

    A stored audit that asked the same is taken instead, unless `again`: `ci/field` renews it.
    """
    wanted: dict[tuple[str, str], set[str]] = {}
    for pair in pairs:
        for side in (pair.broken, pair.right):
            wanted.setdefault((side, pair.objective), set()).add(pair.check)
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (side, objective), checks in wanted.items():
        if not again and not objective and (known_checks := _of_a_whole_audit(known[side], checks)):
            seen |= {(side, "", check): told for check, told in known_checks.items()}
            continue
        more = ["--jobs", "1", *(("--objective", objective) if objective else ())]
        result = audits.audit(known[side], more, sorted(checks))
        for check in checks:
            found = next((each for each in result.get("results", []) if each["id"] == check), None)
            seen[side, objective, check] = found or {"verdict": "broken", "reason": result.get("broken", "not run")}
        print(f"{side}: " + ", ".join(f"{check} {seen[side, objective, check]['verdict']}" for check in sorted(checks)),
              flush=True)  # fmt: skip
    return {
        pair.name: {
            "date": datetime.date.today().isoformat(),
            **{what: _told(seen[side, pair.objective, pair.check])
               for what, side in (("broken", pair.broken), ("right", pair.right))},
        }
        for pair in pairs
    }  # fmt: skip


def _of_a_whole_audit(trainer: Trainer, checks: set[str]) -> dict[str, dict[str, Any]]:
    """The checks of the stored audit of a subject; none where it lacks one, or decided none for want of an adapter's
    word or of the full tier."""
    decided = audits.found(audits.stored(trainer) or {}, "pass", "fail")
    found = {each["id"]: each for each in decided if each["id"] in checks}
    return found if set(found) == checks else {}


def _told(check: dict[str, Any]) -> dict[str, Any]:
    kept = {name: check[name] for name in ("verdict", "reason", "where", "observed", "expected") if check.get(name)}
    named = [each["name"] for each in check.get("diagnosis", [])][:1]
    return kept | ({"named": named[0]} if named else {})


def stored() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}


def keep(found: dict[str, Any]) -> None:
    """Results of pairs that were not run stay as they are."""
    pairs = dict(sorted((stored() | found).items()))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(told)}" for name, told in pairs.items())
    RESULT.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def holds(told: Mapping[str, Any] | None) -> bool:
    """Did the check fail where the bug was, and pass where it was not?"""
    return bool(told) and told["broken"]["verdict"] == "fail" and told["right"]["verdict"] == "pass"


def table(pairs: list[Pair], found: Mapping[str, Any]) -> str:
    """The rows of the table in Markdown."""
    lines = ["| bug | had it | right | check | in the first | in the second | upstream |", "|---" * 7 + "|"]
    for pair in pairs:
        told = found.get(pair.name)
        first, second = (told[side]["verdict"] if told else "not run" for side in ("broken", "right"))
        check = f"`{pair.check}`" + (f" ({pair.objective})" if pair.objective else "")
        upstream = f"[{pair.url.partition('github.com/')[2] or pair.url}]({pair.url})"
        word = "" if pair.kind == "fixed" else " (before it came)"
        cells = [pair.title, pair.broken, pair.right + word, check, first, second, upstream]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
