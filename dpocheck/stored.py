"""How is a failing experiment kept, named and read back?  As plain data, with the subject and the versions beside it.

A *handle* is the check's id in lower case and the first four digits of the experiments' key:
`ref-is-policy-given-3f2a`.  The file holds all that a replay needs; nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dpocheck.experiment import from_plain, key, to_plain
from dpocheck.result import Report, Result

SCHEMA = 1
FIELDS = {
    "schema", "handle", "check", "scene", "family", "key", "subject", "name", "subject_version", "suite", "versions",
    "platform", "precision", "tier", "seed", "verdict", "observed", "expected", "error", "bound", "where",
    "experiments", "options",
}  # fmt: skip
NEEDED = ("check", "subject", "experiments", "key")


class StoredError(ValueError):
    """A stored experiment that cannot be found or read; the message says which, and what to do."""


def joint_key(experiments: Sequence[Any]) -> str:
    """The key of one experiment, or of several that are judged together (sha256 of their keys)."""
    keys = [key(experiment) for experiment in experiments]
    return keys[0] if len(keys) == 1 else hashlib.sha256("\n".join(keys).encode()).hexdigest()


def handle(result: Result) -> str | None:
    """`<check-id>-<first 4 of key>` in lower case; None where the result holds no experiment."""
    return f"{result.id.lower()}-{joint_key(result.experiments)[:4]}" if result.experiments else None


def json_value(value: Any) -> Any:
    """Any value as JSON data: arrays as lists, NaN and infinities as strings, what is unknown as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else {"nan": "NaN", "inf": "Infinity"}.get(str(value), "-Infinity")
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((json_value(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value)


def store(result: Result, report: Report, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `experiments/<handle>.json` holds."""
    header = report.header
    return {
        "schema": SCHEMA,
        "handle": handle(result),
        "check": {"id": result.id, "version": result.version},
        "scene": result.scene,
        "family": result.family,
        "key": joint_key(result.experiments),
        "subject": header.subject,
        "name": header.name,
        "subject_version": header.subject_version,
        "suite": header.suite,
        "versions": dict(header.versions),
        "platform": header.platform,
        "precision": json_value(header.precision),
        "tier": result.tier,
        "seed": header.seed,
        "options": json_value(options or {}),
        "verdict": result.verdict,
        "observed": json_value(result.observed),
        "expected": json_value(result.expected),
        "error": json_value(result.error),
        "bound": json_value(result.bound),
        "where": result.where,
        "experiments": [to_plain(experiment) for experiment in result.experiments],
    }


def read(path: Path) -> dict[str, Any]:
    """The stored data of `path`, its experiments checked.  Raises StoredError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoredError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise StoredError(f"{path} is not a stored experiment: {error}") from None
    if not isinstance(data, dict) or (missing := [name for name in NEEDED if name not in data]):
        what = f"it lacks {', '.join(missing)}" if isinstance(data, dict) else "it is not a JSON object"
        raise StoredError(f"{path} is not a stored experiment: {what}; give a file of an audit's folder experiments/")
    if data.get("schema") != SCHEMA:
        raise StoredError(f"{path} has schema {data.get('schema')!r}, this dpocheck reads {SCHEMA}; repeat the audit")
    if unknown := sorted(set(data) - FIELDS):
        raise StoredError(f"{path} has unknown fields: {', '.join(unknown)}")
    try:
        experiments = from_plain(data["experiments"])
        found = joint_key(experiments)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StoredError(f"{path}: the experiment cannot be read: {error}") from None
    if found != data["key"]:
        raise StoredError(
            f"{path}: the key {data['key']} is not that of its experiments (changed by hand, or of another version); "
            f'to replay them as they are, set "key" to "{found}"'
        )
    return data


def find(name: str, folders: Iterable[Path]) -> Path:
    """The file of a path, a handle or a check's id; of several the newest.  Raises StoredError.

    `folders` are output folders of audits, or folders that hold such.
    """
    given = Path(name)
    for path in (given, given.with_name(given.name + ".json"), given.parent / "experiments" / f"{given.name}.json"):
        if path.is_file():
            return path
    folders = list(folders)
    found: set[Path] = set()
    for folder in folders:
        for pattern in ("experiments/*.json", "*/experiments/*.json"):
            found.update(folder.glob(pattern))
    stem = name.lower()
    exact = [path for path in found if path.stem == stem or path.stem.rpartition("-")[0] == stem]
    if exact:
        return max(exact, key=lambda path: (path.stat().st_mtime, str(path)))
    import difflib

    near = difflib.get_close_matches(stem, [path.stem for path in found], n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    where = ", ".join(str(folder) for folder in folders) or "nowhere"
    raise StoredError(f"no stored experiment {name!r} (looked for a file of that name, then in {where}){hint}")
