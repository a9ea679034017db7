"""How are verdicts, stages and numbers written?  One place, so that every report says it alike."""

from __future__ import annotations

import math
from typing import Any

from dpocheck.result import Report, Result
from dpocheck.text import printable

MARKS = {
    "pass": "✔", "fail": "✘", "info": "i", "not-applicable": "–", "blocked": "▫", "expected-fail": "~",
    "unexpected-pass": "!", "error": "E", "unknown": "?",
}  # fmt: skip
STYLES = {"pass": "green", "fail": "bold red", "unexpected-pass": "bold red", "error": "yellow", "unknown": "yellow"}
COUNTED = {
    "pass": "passed", "fail": "failed", "unexpected-pass": "passed unexpectedly", "expected-fail": "failed as expected",
    "info": "convention", "blocked": "blocked", "error": "error", "unknown": "unknown",
    "not-applicable": "not applicable",
}  # fmt: skip
CHAPTERS = {"logps": "log-probs", "logz": "log Z", "lora": "LoRA"}
STAGES = {"logps": "policy log-probs", "reference": "reference log-probs"}
ASCII = str.maketrans(
    {
        "✔": "+", "✘": "x", "–": "-", "▫": ".", "−": "-", "·": "*", "σ": "sigma", "π": "pi", "θ": "theta", "β": "beta",
        "←": "<-", "→": "->", "…": "...", "²": "^2", "≠": "!=", "≤": "<=", "×": "x", "█": "#", "∞": "inf", "Σ": "sum",
        "’": "'", "—": "-",
    }
)  # fmt: skip
KNOWN_CHAPTER = "known failures"  # of the results that speak of a known-failures file, not of the subject


def plural(count: int, noun: str) -> str:
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def line(value: Any) -> str:
    """Any text as one printable line."""
    return " ".join(printable(str(value)).split())


def number(value: float, digits: int = 4) -> str:
    """A number to `digits` significant digits, as people write it."""
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(float(value))]
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 10 ** max(digits, 5):
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{places}f}".replace("-", "−")
    return f"{value:.{max(1, digits - 1)}e}".replace("-", "−", 1) if value < 0 else f"{value:.{max(1, digits - 1)}e}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """What was observed or expected, as one short line."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(shown(item) for item in value[:8])
        return f"{inside}, … ({len(value)} in all)" if len(value) > 8 else inside or "none"
    if isinstance(value, dict):
        return ", ".join(f"{line(name)} {shown(item)}" for name, item in value.items()) or "none"
    return line(value)


def shown_pair(observed: Any, expected: Any) -> tuple[str, str]:
    """Both, with as many digits as tell them apart."""
    if not (is_number(observed) and is_number(expected)):
        return shown(observed), shown(expected)
    for digits in range(4, 18):
        texts = number(observed, digits), number(expected, digits)
        if texts[0] != texts[1] or observed == expected:
            break
    return number(observed, min(digits + 1, 17)), number(expected, min(digits + 1, 17))


def deviation(result: Result) -> str:
    """`off by E = R times the bound (B)`, or nothing where no number was compared."""
    if result.error is None:
        return ""
    text = f"off by {number(result.error)}"
    ratio = result.error_over_bound
    if ratio is None or result.bound is None:
        return text
    return f"{text} = {ratio:.1e} times the bound ({result.bound:.1e})" if result.bound else f"{text}; no error allowed"


def cause(result: Result) -> str:
    """What a report says of a finding in one line: the probable bug, else the reason, else the numbers."""
    if result.verdict == "unexpected-pass":
        known = result.known or {}
        reason = f": {line(known['reason'])}" if known.get("reason") else ""
        return f"passes, though it is a known failure{reason}"
    if result.diagnosis:
        return line(result.diagnosis[0].name)
    if rows := [row for row in printable(result.reason).splitlines() if row.strip()]:
        # of a traceback: what happened stands in the first line, why in the last
        return line(rows[0]) if len(rows) == 1 else f"{line(rows[0])} … {line(rows[-1])}"
    if result.observed is not None:
        observed, expected = shown_pair(result.observed, result.expected)
        return f"{line(result.where) or 'observed'}: {observed}, expected {expected}"
    return f"not so: {line(result.claim)}"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def ordered(results: tuple[Result, ...]) -> list[Result]:
    """Findings in the order in which to fix them: must first, then by the stage they start at."""
    from dpocheck.check import LEVELS
    from dpocheck.check import STAGES as STAGE_ORDER

    def rank(result: Result) -> tuple[int, int]:
        stage = STAGE_ORDER.index(result.stage) if result.stage in STAGE_ORDER else len(STAGE_ORDER)
        return LEVELS.index(result.level) if result.level in LEVELS else len(LEVELS), stage

    return sorted(results, key=rank)  # stable: within a stage, the order of the catalogue


def stages(report: Report, result: Result) -> str:
    """The stages up to the first that diverges in the family of `result`: `tokens ✔  mask ✔  logps ✘`."""
    from dpocheck.check import STAGES as STAGE_ORDER

    marks = []
    for stage in STAGE_ORDER:
        verdicts = {r.verdict for r in report.results if r.stage == stage and r.family == result.family}
        if verdicts & {"fail", "expected-fail"}:
            return "  ".join([*marks, f"{STAGES.get(stage, stage)} ✘"])
        if "pass" in verdicts:
            marks.append(f"{STAGES.get(stage, stage)} ✔")
        if stage == result.stage:
            break
    return "  ".join(marks)
