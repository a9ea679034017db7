"""What does a reader need to know of one failure?  Always the same lines, always in the same order.

Id, level, claim and source; observed; expected; how far off and where; the first stage that diverges; the smallest
experiment; the probable bug; what to do; the command that repeats it; the script that shows it without dpocheck.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from dpocheck.report.describe import describe
from dpocheck.report.words import MARKS, deviation, line, shown, shown_pair, stages
from dpocheck.result import Header, Report, Result
from dpocheck.stored import handle

WIDTH = 120
LABEL = 12  # columns of the labels on the left


def labelled(label: str, text: str) -> list[str]:
    """A label and its text, wrapped under itself."""
    wrapped = textwrap.wrap(text, WIDTH - LABEL - 2, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"  {(label if place == 0 else ''):<{LABEL}}{part}".rstrip() for place, part in enumerate(wrapped)]


def long_form(result: Result, report: Report, folder: Path | str | None = None) -> str:
    """The failure as plain text; `folder` is where the audit's files lie."""
    check = _declared(result.id)
    lines = [f"{MARKS[result.verdict]} {result.id} · {result.level} · version {result.version}"]
    lines += [f"  {part}" for part in textwrap.wrap(line(result.claim), WIDTH - 2)]
    if result.source:
        lines += textwrap.wrap(line(result.source), WIDTH, initial_indent="  source: ", subsequent_indent="          ")
    lines.append("")
    lines += _numbers(result)
    if diverges := stages(report, result):
        lines += labelled("stages", diverges)
    if result.blocked_by:
        lines += labelled("blocked by", line(result.blocked_by))
    if result.experiments:
        sentence, table = describe(result.experiments)
        lines += ["", *labelled("experiment", line(sentence))]
        lines += [" " * LABEL + row for row in table]
    lines.append("")
    lines += _advice(result, check, folder)
    return "\n".join(lines).rstrip() + "\n"


def _declared(id: str):
    from dpocheck.check import CHECKS

    return CHECKS.get(id)


def _numbers(result: Result) -> list[str]:
    lines: list[str] = []
    if result.observed is not None or result.expected is not None:
        observed, expected = shown_pair(result.observed, result.expected)
        lines += labelled("observed", observed) + labelled("expected", expected)
    if off := deviation(result):
        lines += labelled("off by", off.removeprefix("off by "))
    if result.where:
        lines += labelled("where", line(result.where))
    if result.reason:
        lines += labelled("reason", line(result.reason))
    if result.via:
        lines += labelled("seen", {"native": "directly", "derived": "through a coarser method",
                                   "files": "in the files it wrote"}.get(result.via, line(result.via)))  # fmt: skip
    return lines


def _advice(result: Result, check, folder: Path | str | None) -> list[str]:
    lines: list[str] = []
    for place, diagnosis in enumerate(result.diagnosis[:3]):
        close = f"its error is {diagnosis.score:.0e} of the paper's" if diagnosis.score else "fits exactly"
        if 2 * diagnosis.unexplained > diagnosis.others:
            close += f", but does not explain {diagnosis.unexplained} of {diagnosis.others} other observations"
        lines += labelled("probably" if place == 0 else "or", f"{line(diagnosis.name)} ({close})")
    if check is not None and check.bug:
        lines += labelled("in public", line(check.bug))
    if check is not None and check.fix:
        lines += labelled("to fix", line(check.fix))
    if result.known:
        reason = " ".join(line(result.known[name]) for name in ("reason", "url") if result.known.get(name))
        lines += labelled("known", reason)
    name = handle(result)
    if name:
        lines += labelled("repeat", f"dpocheck replay {Path(folder) / name if folder else name}")
    if result.script:
        lines += labelled("alone", str(Path(folder) / result.script if folder else result.script))
    if result.output:
        text = result.output.rstrip()
        if "\n" not in text and text.startswith("output/"):
            lines += labelled("its output", str(Path(folder) / text if folder else text))
    return lines


def replayed(path: Path, data: dict, result: Result) -> tuple[str, str]:
    """`fixed`, `failed` or `error`, and the text that says so, of a stored experiment and its new result."""
    word = {"pass": "fixed", "info": "fixed", "fail": "failed"}.get(result.verdict, "error")
    subject = " ".join(str(data[name]) for name in ("name", "subject_version") if data.get(name)) or data["subject"]
    lines = [f"{word}: {data['check']['id']} on the experiment of {path}", f"  stored with  {line(subject)}"]
    if data.get("observed") is not None:
        lines.append(f"  observed then  {shown(data['observed'])}")
    if word == "fixed":
        observed = "" if result.observed is None else f"{shown(result.observed)}, "
        lines.append(f"  observed now   {observed}as expected: {shown(result.expected)}")
        return word, "\n".join(lines) + "\n"
    if word == "error":
        lines.append(f"  no verdict     {result.verdict}: {line(result.reason) or 'no reason was given'}")
        return word, "\n".join(lines) + "\n"
    header = Header(
        suite="", subject=data["subject"], name=str(data.get("name", "")), subject_version=None, route="", forced={},
        isolation="process", precision=None, seed=0, tier=result.tier, platform="",
    )  # fmt: skip
    text = long_form(result, Report(header=header, results=(result,)), path.parent.parent)
    return word, "\n".join(lines) + "\n\n" + text
