"""What does a person ask of an audit, and what is refused before anything is started?"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpocheck.experiment import KINDS, Objective
from dpocheck.known import apply, load, near
from dpocheck.open import UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "slic": "hinge"}


def run(
    subject: Any, *, only: Iterable[str] | str = (), objective: Objective | str | None = None,
    tokenizer: str | Path | None = None, known: str | Path | None = None, **limits: Any,
) -> Any:  # fmt: skip
    """`dpocheck.audit`: the report of one audit.  Raises `UsageError` or `known.KnownError`."""
    from dpocheck import runner
    from dpocheck.check import CHECKS
    from dpocheck.piecewise import versions

    expected = load(Path(known), versions()) if known is not None else ()
    options = runner.Options(
        subject=subject,
        only=tuple(check_id(id, CHECKS) for id in ([only] if isinstance(only, str) else only)),
        objective=parse_objective(objective) if isinstance(objective, str) else objective,
        tokenizer=folder_of(tokenizer), known=tuple(entry.id for entry in expected), **limits,
    )  # fmt: skip
    if options.tier not in ("quick", "full"):
        raise UsageError(f"tier is {options.tier!r}; it must be 'quick' or 'full'")
    report = runner.run(options)
    if not expected:
        return report
    questions = [question.id for question in runner.conventions.QUESTIONS]
    return apply(report, expected, datetime.date.today(), left_out=left_out(options, CHECKS, questions))


def check_id(id: str, checks: Mapping[str, Any]) -> str:
    """The id as it is declared, whatever its case.  Refuses an unknown one with near matches."""
    if id.upper() in checks:
        return id.upper()
    raise UsageError(f"no check has the id {id!r}{near(id, checks)}; `dpocheck list` shows all {len(checks)}")


def left_out(options: Any, checks: Mapping[str, Any], questions: Collection[str]) -> set[str]:
    """Ids that were not asked for: their known failures are neither seen nor stale."""
    asked = set() if options.only else set(questions)
    for id, check in checks.items():
        if id in options.only or (not options.only and wanted(options, check)):
            asked.add(id)
    return {*questions, *checks} - asked


def wanted(options: Any, check: Any) -> bool:
    """Whether an audit without `only` runs a check."""
    return (options.tier == "full" or check.tier == "quick") and (
        bool(options.tokenizer) or check.chapter != "tokenizer"
    )


def folder_of(tokenizer: str | Path | None) -> str | None:
    """The tokenizer's folder, absolute: a worker may stand elsewhere."""
    if tokenizer is None:
        return None
    path = Path(tokenizer).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"tokenizer {tokenizer}: not a folder; give one that `save_pretrained` of a tokenizer wrote")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"tokenizer {tokenizer}: the folder holds none of {', '.join(TOKENIZER_FILES)}")
    return str(path)


def parse_objective(text: str) -> Objective:
    """`ipo`, `sigmoid,beta=0.2,label_smoothing=0.1` as an `Objective`."""
    kind, *settings = (part.strip() for part in text.split(","))
    allowed = {field.name: field.type for field in dataclasses.fields(Objective) if field.name != "kind"}
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise UsageError(f"objective {text}: no loss is called {kind!r}{near(kind, KINDS)}; known: {', '.join(KINDS)}")
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in allowed:
            hint = near(name, allowed)
            names = ", ".join(allowed)
            raise UsageError(f"objective {text}: cannot read {setting!r}{hint}; allowed: {names}, as name=value")
        if name in values:
            raise UsageError(f"objective {text}: {name} is given twice")
        values[name] = _setting(text, name, value, str(allowed[name]))
    if kind == "alpha_divergence" and not 0 < values.get("alpha", 0.5) < 1:
        raise UsageError(f"objective {text}: alpha is {values['alpha']:g}; it must be between 0 and 1")
    if "alpha" in values and kind != "alpha_divergence":
        raise UsageError(f"objective {text}: alpha with {kind}; only alpha_divergence has it")
    objective = Objective(kind=kind, **values)
    if objective.beta <= 0:
        raise UsageError(f"objective {text}: beta is {objective.beta:g}; it must be above 0")
    if not 0 <= objective.label_smoothing < 0.5:
        raise UsageError(f"objective {text}: label_smoothing is {objective.label_smoothing:g}; it must be in [0, 0.5)")
    return objective


def _setting(text: str, name: str, value: str, kind: str) -> float | bool:
    if kind == "bool":
        if value not in ("true", "false"):
            raise UsageError(f"objective {text}: {name} is {value!r}; it must be true or false")
        return value == "true"
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise UsageError(f"objective {text}: {name} is {value!r}; it must be a number, as {name}=0.1")
    return number
