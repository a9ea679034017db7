"""Does a trainer keep the text of rows on the user's own tokenizer and chat template?  What `--tokenizer` adds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpocheck.check import Case, Check, Comparison, Scene
from dpocheck.experiment import Message, Row, TextExperiment
from dpocheck.fixed import ORDINARY
from dpocheck.open import UsageError
from dpocheck.result import Result
from dpocheck.subject import Broken, Refused, Subject

CHAPTER = "tokenizer"
UNREADABLE = "holds no tokenizer that transformers loads"  # as `probes.fed` says it: the user's mistake, no finding
FIRST = "TOK-ROUND-TRIP"  # where the text is another, nothing else can be said of a row
SIDES = ("chosen", "rejected")

# A space at the prompt's end, words that go on across the boundary, bytes that are not ASCII, white space at the end.
TEXTS = (
    Row("What is 2 + 2?", " It is 4.", " It is five, I think."),
    Row("Say hello: ", "hello there", "hi"),
    Row("The na\u00efve caf\u00e9 costs \u20ac5 \u2014", " tr\u00e8s bien \u2713", " \u4f60\u597d, no"),
    Row("It was un", "believable, he said", "common, she said"),
    Row("First line.\nSecond line:\n", "  indented\n\nend", "one tab\tand a space "),
)
WHOLE_TEXTS = (Row(None, "Q: one or two? A: one", "Q: one or two? A: neither"),)


def _said(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


USER = ("user", "What is 2 + 2?")
YES, NO = _said(("assistant", "Yes, it is 4.")), _said(("assistant", "No."))
CHATS = (
    Row(_said(USER), _said(("assistant", "It is 4.")), _said(("assistant", "It is five, I think."))),
    Row(_said(("system", "Answer briefly."), USER), YES, NO),
    Row(_said(USER, ("assistant", "4."), ("user", "Sure?")), YES, NO),
    Row(_said(("user", "caf\u00e9 \u2713\n")), _said(("assistant", "tr\u00e8s\n\nbien")), NO),
)
WHOLE_CHATS = (Row(None, _said(USER, *((m.role, m.content) for m in YES)), _said(USER, ("assistant", "It is 22."))),)
RUNS = (
    ("text rows", TEXTS), ("text rows without a prompt", WHOLE_TEXTS), ("chat rows", CHATS),
    ("chat rows without a prompt", WHOLE_CHATS),
)  # fmt: skip


@dataclass(frozen=True)
class Fed:
    """What a run fed its policy.  `pairs`: what the tokenizer says is due; `rows`: the rows, in the order they came."""

    pairs: tuple[dict[str, Any], ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()  # rows that the template itself refuses
    raised: str | None = None
    refused: str | None = None
    output: str | None = None
    theirs: bool = True  # what was raised is the trainer's doing, not the adapter's
    floor: dict[str, float] = None  # type: ignore[assignment]  # nothing is measured here

    def matched(self) -> list[tuple[int, str, dict[str, Any], dict[str, Any]]]:
        """(pair, side, due, fed), where each pair was fed as two rows; which is which, the text decides."""
        found = []
        for number, pair in enumerate(self.pairs):
            rows = list(self.rows[2 * number : 2 * number + 2])
            straight = sum(row["text"].count(tail(pair, side)) for row, side in zip(rows, SIDES, strict=True))
            crossed = sum(row["text"].count(tail(pair, side)) for row, side in zip(rows[::-1], SIDES, strict=True))
            for row, side in zip(rows if straight >= crossed else rows[::-1], SIDES, strict=True):
                found.append((number, side, pair[side], row))
        return found


def tail(pair: dict[str, Any], side: str) -> str:
    """The end of a side's text: what tells it from the other."""
    other = pair["rejected" if side == "chosen" else "chosen"]["text"]
    text = pair[side]["text"]
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[same:].strip() or text


def scenes(tokenizer: str, subject: Subject) -> list[Scene]:
    objective = subject.objective or ORDINARY
    return [
        Scene(name, (TextExperiment(tokenizer, rows, objective),), family="tokenizer")  # type: ignore[arg-type]
        for name, rows in RUNS
    ]


def results(subject: Subject, checks: Iterable[Check], tokenizer: str, *, blocking: bool = True) -> list[Result]:
    """The chapter's results: four runs, each judged by every check.

    `blocking`: where a run's rows have other text than is due, the other checks say nothing about that run.
    """
    from dpocheck.session import Outcome

    fed = [(scene, _observed(subject, scene)) for scene in scenes(tokenizer, subject)]
    found, wrong = [], set()
    for check in sorted(checks, key=lambda check: check.id != FIRST):
        began = time.perf_counter()
        outcomes = []
        for scene, seen in fed:
            if blocking and scene.name in wrong:
                blocked = Comparison("blocked", reason=f"{FIRST} failed before")
                outcomes.append(Outcome(blocked, scene, blocked_by=FIRST))
                continue
            comparison = _judged(check, scene, seen, subject)
            if check.id == FIRST and comparison.verdict == "fail":
                wrong.add(scene.name)
            outcomes.append(Outcome(comparison, scene, "native", seen.output))
        found.append(_worst(check, outcomes, began))
    return found


def again(subject: Subject, check: Check) -> Result:
    """The result of one check on its own scenes: what a replay asks."""
    from dpocheck.session import Outcome

    began = time.perf_counter()
    fed = [(scene, _observed(subject, scene)) for scene in check.staged(subject.theory)]
    judged = [Outcome(_judged(check, scene, seen, subject), scene, "native", seen.output) for scene, seen in fed]
    return _worst(check, judged, began)


def _worst(check: Check, outcomes: list[Any], began: float) -> Result:
    from dpocheck.session import ORDER, report

    told = min(outcomes, key=lambda outcome: ORDER.index(outcome.comparison.verdict))
    return report(check, told, time.perf_counter() - began)


def _judged(check: Check, scene: Scene, seen: Fed, subject: Subject) -> Comparison:
    if seen.refused:
        return Comparison("not-applicable", reason=seen.refused)
    if seen.raised:
        reason = f"raised on legitimate {scene.name}: {seen.raised}"
        return Comparison("fail" if seen.theirs else "error", reason=reason)
    if not seen.pairs:
        reason = seen.left_out[0] if seen.left_out else "no rows"
        return Comparison("not-applicable", reason=f"the tokenizer has no template for {scene.name}: {reason}")
    return check.judge(Case(scene.experiments, (seen,), subject.theory, subject.says))


def _observed(subject: Subject, scene: Scene) -> Fed:
    if "train" not in subject.capabilities:
        return Fed(refused="the subject has no `train`")
    if subject.transport.about.get("form") == "command line":
        return Fed(refused="a command line shows no token rows: only files go in and come out")
    folder = subject.folder / f"tokenizer {scene.name}".replace(" ", "-")
    try:
        with subject.ahead.lease() as transport:
            payload, _ = transport.answer(scene.experiments[0], {}, folder)
    except Refused as refusal:
        return Fed(refused=str(refusal) or "refused without a reason")
    except Broken as fault:
        if UNREADABLE in fault.reason:
            raise UsageError(fault.reason) from fault
        return Fed(raised=fault.reason, output=fault.output, theirs=not (fault.in_adapter or fault.died))
    rows = payload["rows"]
    return Fed(tuple(rows["pairs"]), tuple(rows["fed"]), tuple(rows["left_out"]))
