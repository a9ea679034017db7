"""What does a person see at the end of an audit?  One screen: chapters, the equation, the findings, the counts.

`render` makes the text, `failure` the long form of one finding.  Colour repeats what a mark already says.  Text that
comes from a subject is set as it is, never as markup, and stripped of control characters.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpocheck.report.failure import long_form
from dpocheck.report.words import (
    ASCII,
    CHAPTERS,
    COUNTED,
    KNOWN_CHAPTER,
    MARKS,
    STYLES,
    cause,
    duration,
    line,
    number,
    ordered,
    plural,
)
from dpocheck.result import Report, Result
from dpocheck.text import printable

FINDINGS = 12  # listed on the screen; the files hold all
PER_LINE = 40  # marks of a chapter


def render(
    report: Report, *, width: int = 120, color: bool = False, unicode: bool = True, folder: Path | str | None = None,
    detail: Iterable[Result] = (),
) -> str:  # fmt: skip
    """The report as text.  `detail` are results whose long form follows the screen."""
    width = max(72, min(width, 120))
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=color, color_system="standard" if color else None, no_color=not color,
        highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for part in _screen(report, folder):
        console.print(part)
    for result in detail:
        console.print()
        console.print(_paint(long_form(result, report, folder)))
    text = "\n".join(row.rstrip() for row in buffer.getvalue().splitlines()) + "\n"
    return text if unicode else text.translate(ASCII).encode("ascii", "replace").decode()


def failure(result: Result, report: Report, *, color: bool = False, unicode: bool = True, folder=None) -> str:
    """The long form of one result as text for a terminal."""
    text = long_form(result, report, folder)
    if color:
        buffer = io.StringIO()
        console = Console(file=buffer, width=200, force_terminal=True, color_system="standard", highlight=False)
        console.print(_paint(text))
        text = buffer.getvalue()
    return text if unicode else text.translate(ASCII).encode("ascii", "replace").decode()


def _paint(text: str) -> Text:
    """Long form with its first line in the verdict's colour."""
    painted = Text(text.rstrip("\n"))
    first = text.partition("\n")[0]
    verdict = next((name for name, mark in MARKS.items() if first.startswith(mark)), "")
    painted.stylize(STYLES.get(verdict, "bold"), 0, len(first))
    return painted


def _screen(report: Report, folder: Path | str | None) -> Iterable[object]:
    yield from _header(report)
    if report.smoke:
        yield Text()
        yield Text("The adapter did not get through the smoke stage, so nothing is said about the trainer:", "bold")
        reason, *told = report.smoke.splitlines()
        yield Text.assemble("  ", (line(reason), "yellow"))
        yield from (Text(f"  {printable(text)}", "dim") for text in told)
    if report.results:
        yield Text()
        yield from _chapters(report)
    yield from _equation(report)
    yield from _conventions(report)
    yield from _findings(report, folder)
    yield from _open(report)
    yield from _known(report)
    if report.header.blind:
        yield Text()
        yield _wrapped(f"{line(report.header.route)} cannot show: ", "; ".join(map(line, report.header.blind)))
    yield Text()
    yield _counts(report)
    if folder:
        yield Text(f"written to {folder}", "dim")


def _wrapped(label: str, text: str, style: str = "") -> Table:
    """A label and a text that wraps under itself."""
    table = Table.grid(padding=0, expand=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(label), Text(text, style))
    return table


def _header(report: Report) -> Iterable[object]:
    header = report.header
    name = f"{line(header.name)} {line(header.subject_version)}" if header.subject_version else line(header.name)
    parts = [f"auditing {name} through {line(header.route)}"]
    if header.adapter_lines:
        parts.append(f"adapter {header.adapter_lines} lines")
    parts += [f"tier {header.tier}", f"seed {header.seed}"]
    if header.isolation == "none":
        parts.append("isolation: none")
    yield Text("   ".join(parts), "bold")
    beside = [f"{name} {line(header.versions[name])}" for name in ("torch", "transformers") if name in header.versions]
    beside += [f"precision {number(header.precision, 2)}"] if header.precision else []
    if beside:
        yield _wrapped("with: ", ", ".join(beside))
    if header.forced:
        settings = ", ".join(f"{line(name)}={line(value)}" for name, value in header.forced.items())
        said = "forced by the adapter, not what people run: " if header.adapter_lines != 0 else "audited as: "
        yield _wrapped(said, settings)
    for stub in header.stubs:
        yield _wrapped("stub: ", line(stub))


def _chapters(report: Report) -> Iterable[object]:
    from dpocheck.check import CHAPTERS as ORDER

    chapters: dict[str, list[Result]] = {}
    for result in report.results:
        if result.chapter != KNOWN_CHAPTER:
            chapters.setdefault(result.chapter, []).append(result)
    names = [name for name in ORDER if name in chapters] + [name for name in chapters if name not in ORDER]
    idle = [name for name in names if {r.verdict for r in chapters[name]} == {"not-applicable"}]
    names = [name for name in names if name not in idle]
    longest = max((len(chapters[name]) for name in names), default=0)
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(min_width=11, no_wrap=True)
    table.add_column(min_width=min(longest, PER_LINE) * 2 - 1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name in names:
        results = chapters[name]
        marks = Text(" ").join(Text(MARKS[r.verdict], STYLES.get(r.verdict, "")) for r in results)
        table.add_row(Text("  " + line(CHAPTERS.get(name, name))), marks, Text(str(len(results))), _legend(results))
    if names:
        yield table
    if idle:
        count = sum(len(chapters[name]) for name in idle)
        titles = ", ".join(line(CHAPTERS.get(name, name)) for name in idle)
        yield _wrapped("  not applicable: ", f"{titles} ({plural(count, 'check')})", "dim")


def _legend(results: list[Result]) -> Text:
    """What the marks other than ✔ and ✘ of one line mean, with their number."""
    counts = Counter(result.verdict for result in results)
    words = {
        "info": "convention observed", "not-applicable": "not applicable", "blocked": "blocked",
        "expected-fail": "known", "unexpected-pass": "passes unexpectedly", "error": "error", "unknown": "undecided",
    }  # fmt: skip
    parts = []
    for verdict, said in words.items():
        if count := counts.get(verdict):
            said = "conventions observed" if verdict == "info" and count > 1 else said
            parts.append(f"{MARKS[verdict]} {count} {said}")
    return Text("  ".join(parts), "dim")


def _equation(report: Report) -> Iterable[object]:
    if not report.equation:
        return
    residual = "" if report.equation_residual is None else f" (residual {report.equation_residual:.0e})"
    yield Text()
    yield Text(f"What it optimises, fitted from what it did{residual}:", "bold")
    for part in str(report.equation).splitlines():
        yield Text("  " + line(part))
    if report.asked:
        same = line(report.asked) == line(str(report.equation).splitlines()[0])
        yield Text("  asked for: the same" if same else f"  asked for: {line(report.asked)}")


def _conventions(report: Report) -> Iterable[object]:
    found: dict[str, str] = {}
    for result in report.results:
        if result.verdict == "info" and result.convention:
            found[line(result.convention[0]).replace("_", " ")] = line(result.convention[1])
    if found:
        yield Text()
        yield _wrapped("conventions: ", " · ".join(f"{name} {value}" for name, value in found.items()))


def _findings(report: Report, folder: Path | str | None) -> Iterable[object]:
    findings = ordered(report.findings)
    if not findings:
        return
    yield Text()
    yield Text(plural(len(findings), "finding"), "bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    for options in ({"no_wrap": True}, {"overflow": "fold"}, {"overflow": "fold", "ratio": 1}, {"no_wrap": True}):
        table.add_column(**options)
    for result in findings[:FINDINGS]:
        style = STYLES[result.verdict]
        mark = Text("  " + MARKS[result.verdict], style)
        table.add_row(mark, Text(line(result.id), style), Text(cause(result)), Text(result.level))
    yield table
    if len(findings) > FINDINGS:
        where = f"{folder}/results.jsonl" if folder else "results.jsonl (give --out)"
        yield Text(f"  … and {len(findings) - FINDINGS} more in {where}")
    yield Text("  dpocheck explain ID · dpocheck replay ID", "dim")


def _open(report: Report) -> Iterable[object]:
    """Checks that gave no verdict, with the reason; equal reasons once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in report.results:
        if result.verdict in ("error", "unknown"):
            reasons.setdefault((result.verdict, cause(result)), []).append(line(result.id))
    if not reasons:
        return
    yield Text()
    yield Text(f"{plural(sum(map(len, reasons.values())), 'check')} without a verdict", "bold")
    for (verdict, reason), ids in reasons.items():
        names = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        yield _wrapped(f"  {MARKS[verdict]} {names}  ", reason[:300], STYLES[verdict])


def _known(report: Report) -> Iterable[object]:
    known = [result for result in report.results if result.verdict == "expected-fail"]
    if not known:
        return
    yield Text()
    yield Text(plural(len(known), "known failure"), "bold")
    for result in known:
        entry = result.known or {}
        said = "  ".join(line(entry[name]) for name in ("reason", "url") if entry.get(name))
        yield _wrapped(f"  {MARKS['expected-fail']} {line(result.id)}  ", said)


def _counts(report: Report) -> Text:
    results = [result for result in report.results if result.chapter != KNOWN_CHAPTER]
    counts = Counter(result.verdict for result in results)
    parts = []
    for verdict, said in COUNTED.items():
        if count := counts.get(verdict):
            noun = plural(count, said) if said in ("convention", "error") else f"{count} {said}"
            parts.append(noun)
    reasons = Counter(line(r.reason) for r in results if r.verdict == "not-applicable" and r.reason)
    if reasons and "not-applicable" in counts:
        often = [(textwrap.shorten(reason, 60, placeholder=" …"), n) for reason, n in reasons.most_common(2)]
        some = "; ".join(reason + (f" ×{n}" if n > 1 else "") for reason, n in often)
        parts[-1] += f" ({some}{'; …' if len(reasons) > 2 else ''})"
    if stale := len(report.results) - len(results):
        parts.append(f"{stale} stale or expired among the known failures")
    executed = sum(counts[v] for v in ("pass", "fail", "info", "expected-fail", "unexpected-pass"))
    applicable = len(results) - counts["not-applicable"]
    said = f"{plural(len(results), 'check')}, {executed} of {applicable} applicable ran: {', '.join(parts)}"
    if not results:
        said = "no check ran"
    return Text(f"{said}   {duration(report.seconds)}", "bold")
