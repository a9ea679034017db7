"""Are the rows right on the user's own tokenizer and chat template?  Asked with `--tokenizer` only.

The tokenizer judges itself: what it decodes and renders, in a process that the trainer has not touched, is what is due.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpocheck.check import Case, Comparison, check

SOURCE = "the tokenizer's own encoding, and its chat template"
BOTH = 2  # rows a pair
Told = dict[str, Any]
Judge = Callable[[Case, Told, Told, Told, Told], tuple[str, str] | None]  # case, pair, due, row, the pair's other row


def _each(case: Case, wrong: Judge) -> Comparison:
    """The first row of which something wrong is told: (seen, due)."""
    fed = case.observed[0]
    if len(fed.rows) != BOTH * len(fed.pairs):
        return Comparison("unknown", reason=f"{len(fed.rows)} token rows were fed for {len(fed.pairs)} pairs")
    matched = fed.matched()
    for place, (number, side, due, row) in enumerate(matched):
        if told := wrong(case, fed.pairs[number], due, row, matched[place ^ 1][3]):
            seen, expected = told
            where = f"{side} of pair {number + 1}, {due['text']!r}"
            return Comparison("fail", observed=seen, expected=expected, where=where)
    return Comparison("pass")


def _bare(text: str, row: dict[str, Any]) -> str:
    """Without what stands of BOS in front and of EOS at the end, which other checks look at."""
    bos, eos = row["bos_text"], row["eos_text"]
    while bos and text.startswith(bos):
        text = text.removeprefix(bos)
    while eos and text.endswith(eos):
        text = text.removesuffix(eos)
    return text


@check(
    "TOK-PAIRS-FED", chapter="tokenizer", stage="tokens", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="Every pair is fed to the policy, as one chosen and one rejected row.", covers=("RUN-COVERAGE",),
    why="What is dropped on the way is never learned, and no log says so.",
    bug="A filter on lengths that counts characters as tokens drops rows in silence.",
    fix="Say how many pairs are dropped, and why, before training.",
)  # fmt: skip
def pairs_fed(case: Case) -> Comparison:
    fed = case.observed[0]
    seen, due = len(fed.rows), BOTH * len(fed.pairs)
    if seen == 0:
        return Comparison("unknown", reason="the policy's decoder was not called with rows of token ids")
    shown = {"observed": f"{seen} rows", "expected": f"{due} rows"}
    return Comparison("pass" if seen == due else "fail", error=float(abs(seen - due)), bound=0.5, **shown)


@check(
    "TOK-ROUND-TRIP", chapter="tokenizer", stage="tokens", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="A row decodes to the text given, and a chat row to the chat as its template renders it.",
    covers=("RUN-TOK-BOUNDARY",), why="The model learns other words than those that were compared.",
    bug="Prompt and completion stripped or joined by a space; a template applied to the completion a second time.",
    fix="Render the whole conversation once, tokenize it, and split it at the prompt.",
)  # fmt: skip
def round_trip(case: Case) -> Comparison:
    def wrong(case: Case, pair: Told, due: Told, row: Told, mate: Told) -> tuple[str, str] | None:
        seen = _bare(row["text"], row)
        return None if seen in (_bare(due["text"], row), _bare(due["faithful"], row)) else (seen, due["text"])

    return _each(case, wrong)


def _straddles(row: Told, prompt: str) -> bool:
    """Whether the first scored token, or the one before it, lies across the prompt's end."""
    start, before, through = (len(_bare(row[name], row)) for name in ("prompt", "before", "through"))
    end = len(_bare(prompt, row))
    return start < end < through or before < end < start


@check(
    "TOK-SCORED", chapter="tokenizer", stage="mask", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="What is scored is the completion to its end and nothing of the prompt, up to one token across the boundary.",
    covers=("LOGP-GRAD-SUPPORT",),
    why="Prompt tokens that are scored are learned; completion tokens that are not, are not.",
    bug="The length of the prompt tokenized alone, with a BOS or a generation prompt that the whole row does not have.",
    fix="Find the boundary in the row that is fed, by offsets, not by the length of another encoding.",
)  # fmt: skip
def scored(case: Case) -> Comparison:
    def wrong(case: Case, pair: Told, due: Told, row: Told, mate: Told) -> tuple[str, str] | None:
        positions = row["scored"]
        if not positions or positions != list(range(row["start"], len(row["ids"]))):
            return f"scored positions {positions} of {len(row['ids'])}", "one stretch to the end of the row"
        if pair["prompt"] is None:
            return None
        if _bare(row["prompt"], row) == _bare(pair["prompt"], row) or _straddles(row, pair["prompt"]):
            return None
        if mate["start"] == row["start"] and _straddles(mate, pair["prompt"]):
            return None  # both rows are cut before the token that lies across the boundary of one
        return f"scored after {row['prompt']!r}", f"scored after {pair['prompt']!r}"

    return _each(case, wrong)


@check(
    "TOK-SAME-PROMPT", chapter="tokenizer", stage="tokens", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="Chosen and rejected are conditioned on the same prompt tokens, but for one token across the boundary.",
    covers=("RUN-TOK-BOUNDARY",), why="log Z of the prompt cancels in the loss only where the prompt is the same.",
    bug="A prompt that is tokenized with each completion, and cut at the length of another.",
    fix="Tokenize the prompt once for both rows, or cut both where they first differ.",
)  # fmt: skip
def same_prompt(case: Case) -> Comparison:
    fed = case.observed[0]
    if len(fed.rows) != BOTH * len(fed.pairs):
        return Comparison("unknown", reason=f"{len(fed.rows)} token rows were fed for {len(fed.pairs)} pairs")
    for number in range(len(fed.pairs)):
        first, second = fed.rows[BOTH * number], fed.rows[BOTH * number + 1]
        common = min(first["start"], second["start"]) - 1
        apart = first["ids"][: max(0, common)] != second["ids"][: max(0, common)]
        if apart or abs(first["start"] - second["start"]) > 1:
            return Comparison(
                "fail", observed=f"{first['prompt']!r} and {second['prompt']!r}", expected="one prompt",
                where=f"pair {number + 1}",
            )  # fmt: skip
    return Comparison("pass")


@check(
    "TOK-EOS", chapter="tokenizer", stage="tokens", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="A text row ends with one EOS, where the trainer appends it; a chat row ends as its template ends it.",
    covers=("RUN-TOK-EOS",), why="A model that never scores an EOS does not learn to stop; two teach it nonsense.",
    bug="EOS appended to chats whose template has written it already.",
    fix="Append EOS to plain completions only, and only where it is not the last token.",
)  # fmt: skip
def eos(case: Case) -> Comparison:
    def wrong(case: Case, pair: Told, due: Told, row: Told, mate: Told) -> tuple[str, str] | None:
        extra = row["eos"] - due["eos"]
        if row["same"]:  # one token for both: a BOS in front is no end
            extra -= row["bos_first"] and not due["bos"]
        allowed = {1 if case.theory.eos == "appended" else 0}
        if pair["chat"]:
            written = row["eos_text"] and due["text"].rstrip().endswith(row["eos_text"])
            allowed = {0} if written or case.theory.template_eos == "once" else {1}
        elif due["ends"]:
            allowed = {0}
        if not row["eos_text"] or (extra in allowed and (extra == 0 or row["eos_last"])):
            return None
        return f"{extra} added, row ends {row['text'][-24:]!r}", f"{min(allowed)} added"

    return _each(case, wrong)


@check(
    "TOK-BOS", chapter="tokenizer", stage="tokens", level="must", needs=set(), scenes=[], source=SOURCE,
    claim="A row has the BOS that its tokenizer or template puts in front, once.", covers=("RUN-TOK-BOS",),
    why="Rows that start otherwise than at inference are out of distribution from their first token.",
    bug="A template that writes the BOS, tokenized with special tokens added: two of them.",
    fix="Tokenize rendered chats with add_special_tokens=False.",
)  # fmt: skip
def bos(case: Case) -> Comparison:
    def wrong(case: Case, pair: Told, due: Told, row: Told, mate: Told) -> tuple[str, str] | None:
        if row["same"] or not row["bos_text"]:
            return None  # one token for both: the check of EOS counts it
        if row["bos"] == due["bos"] and (not due["bos"] or row["bos_first"]):
            return None
        return f"{row['bos']} in {row['text'][:24]!r}...", f"{due['bos']}"

    return _each(case, wrong)
