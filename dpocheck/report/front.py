"""What stands at the head of a script, and under which conventions are its numbers due?"""

from __future__ import annotations

import textwrap
from typing import Any

from dpocheck.report.driver import Trainer
from dpocheck.report.words import deviation, line, shown_pair
from dpocheck.result import Report, Result

WIDTH = 118


def front(result: Result, report: Report, trainer: Trainer | None, needs: str = "") -> dict[str, Any]:
    """The comment at the head of a script."""
    header = report.header
    story = []
    if result.observed is not None:
        observed, expected = shown_pair(result.observed, result.expected)
        where = f"{line(result.where)}: " if result.where else ""
        story.append(f"{where}observed {observed[:300]}, expected {expected[:300]}" + _off(result))
    elif result.reason:
        story.append(line(result.reason)[:600])
    if result.diagnosis:
        story.append(f"Probably: {line(result.diagnosis[0].name)}.")
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    seen = f"Seen with {header.name} {header.subject_version or ''}"
    story.append(line(f"{seen} ({versions})" if versions else seen))
    if trainer is not None:
        package = line(trainer.package or header.name)
        alone = "nothing else" if trainer.alone else "what the adapter imports"
        needs = f"Needs torch, transformers and {package}; {alone}."
    return {
        "id": line(result.id), "claim": _comment(line(result.claim)), "name": line(header.name), "needs": needs,
        "story": [_comment(text) for text in story], "file": result.id.lower().replace("-", "_") + ".py",
    }  # fmt: skip


def _off(result: Result) -> str:
    return f" ({deviation(result)})" if result.error is not None else ""


def _comment(text: str) -> str:
    return "\n# ".join(textwrap.wrap(text, WIDTH, break_long_words=True) or [""])


def conventions(report: Report) -> Any:
    """The paper, with the conventions that this audit found."""
    from dpocheck.oracle.theory import CONVENTIONS, PAPER

    found = dict(result.convention for result in report.results if result.convention and result.verdict == "info")
    return PAPER.but(**{name: value for name, value in found.items() if name in CONVENTIONS})
