"""What does a check claim, and why should one care?  The texts of `list`, `explain` and `audit --list`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dpocheck.check import CHAPTERS, Check
from dpocheck.report.words import CHAPTERS as TITLES
from dpocheck.report.words import line, plural

if TYPE_CHECKING:
    from dpocheck.conventions import Question
    from dpocheck.oracle.theory import Theory

WIDTH = 100
LABEL = 14


def explain(check: Check | Question) -> str:
    """Everything that the catalogue says of one check, or of a question that an audit asks before them."""
    if not isinstance(check, Check):
        return _question(check)
    title = TITLES.get(check.chapter, check.chapter)
    lines = [f"{check.id} · {check.level} · version {check.version} · tier {check.tier} · chapter {title}", ""]
    lines += textwrap.wrap(mathematics(line(check.claim)), WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
    lines.append("")
    caught = specimens(check.id)
    rows = [
        ("source", mathematics(check.source)), ("why", check.why), ("a real bug", check.bug), ("to fix", check.fix),
        ("needs", ", ".join(sorted(check.needs))), ("stage", check.stage),
        ("promise", f"what the adapter's `says.{check.says}` states" if check.says else ""),
        ("tells apart", "; ".join(_changes(rival) for rival in check.rivals)),
        ("properties", ", ".join(check.covers)), ("specimens", "; ".join(caught)),
    ]  # fmt: skip
    for label, text in rows:
        if text:
            lines += _labelled(label, text)
    lines += ["", f"  dpocheck audit SUBJECT --only {check.id}"]
    return "\n".join(lines) + "\n"


SYMBOLS = (
    (r"\bpi_theta\b", "π_θ"), (r"\bpi_ref\b", "π_ref"), (r"\bpi\*", "π*"), (r"\bpi\b(?=\(|\s+itself|\s)", "π"),
    (r"\blog ref\(", "log π_ref("), (r"(?<=log )ref(?=[()])", "π_ref"), (r"\btheta\b", "θ"),
    (r"\bsigma\b", "σ"), (r"\bbeta\b", "β"), (r"\bgamma\b", "γ"), (r"\btau\b", "τ"), (r"\beps\b", "ε"),
    (r"\bepsilon\b", "ε"),
    (r"\bgrad (?=log\b)", "∇ "),
    (r"\bm\^(?=\s)", "m̂"), (r"\bv\^(?=[\s)])", "v̂"), (r"\^\(1/β\)", "^(1/β)"), (r"\^2\b", "²"),
    (r"\bsqrt\(", "√("), (r">=", "≥"), (r"<=", "≤"), (r"!=", "≠"), (r" ~ ", " ∝ "), (r"(?<=\S) \* (?=\S)", " · "),
    (r"(?<![\w)])-(?=[\wβσ∇(])", "−"), (r"(?<=[\w)\]|]) - (?=[\w(\[∇])", " − "), (r" \+β", " +β"),
)  # fmt: skip


def mathematics(text: str) -> str:
    """The formulas of a claim as people write them: π, σ, β, −, ·."""
    for plain, symbol in SYMBOLS:
        text = re.sub(plain, symbol, text)
    return text


def _question(question: Question) -> str:
    title = TITLES.get(question.chapter, question.chapter)
    lines = [f"{question.id} · info · asked before the checks · chapter {title}"]
    lines += ["", "  The papers leave this open; what the trainer does is reported, and later predictions follow it:"]
    lines += [f"    {question.field} = {value}: {line(words)}" for value, words in question.words.items()]
    if question.says:
        lines.append(f"  Where the adapter's `says.{question.says}` promises one of them, another is a failure.")
    return "\n".join(lines) + "\n"


def _changes(theory: Theory) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in theory.differs().items())


def _labelled(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(line(text), WIDTH - LABEL - 2, break_long_words=False, break_on_hyphens=False)
    return [f"  {(label if place == 0 else ''):<{LABEL}}{part}" for place, part in enumerate(wrapped)]


def specimens(id: str) -> list[str]:
    """The known bugs that the check `id` is there to catch, by the name of the specimen."""
    try:
        from dpocheck.zoo import SPECIMENS
    except ImportError:  # the zoo's code needs torch, which the judge's machine may lack
        return []
    found = SPECIMENS.values() if isinstance(SPECIMENS, dict) else SPECIMENS
    caught = []
    for specimen in found:
        catchers = specimen.caught_by
        if id == catchers or (not isinstance(catchers, str) and id in catchers):
            imitates = getattr(specimen, "imitates", None)
            caught.append(f"{specimen.id}" + (f" ({imitates})" if imitates else ""))
    return sorted(caught)


def catalogue_text(checks: Iterable[Check]) -> str:
    """All checks by chapter: id, level, tier, claim."""
    checks = list(checks)
    if not checks:
        return "no check is declared\n"
    width = max(len(check.id) for check in checks)
    lines = []
    for chapter in CHAPTERS:
        inside = [check for check in checks if check.chapter == chapter]
        if not inside:
            continue
        lines += ["", f"{TITLES.get(chapter, chapter)} ({len(inside)})"]
        for check in inside:
            head = f"  {check.id:<{width}}  {check.level:<6}  {check.tier:<5}  "
            wrapped = textwrap.wrap(line(check.claim), max(120 - len(head), 40)) or [""]
            lines += [head + wrapped[0], *(" " * len(head) + part for part in wrapped[1:])]
    lines += ["", f"{plural(len(checks), 'check')}. dpocheck explain ID says more."]
    return "\n".join(lines[1:]) + "\n"


def planned_text(rows: Iterable[tuple[Check, str | None]]) -> str:
    """What an audit would run, and what not and why."""
    rows = list(rows)
    width = max((len(check.id) for check, _ in rows), default=0)
    lines = []
    for check, reason in rows:
        said = line(check.claim) if reason is None else f"not run: {line(reason)}"
        lines.append(f"  {'✔' if reason is None else '–'} {check.id:<{width}}  {check.level:<6}  {said}")
    runs = sum(reason is None for _, reason in rows)
    return "\n".join([*lines, f"{plural(runs, 'check')} would run, {len(rows) - runs} not"]) + "\n"
