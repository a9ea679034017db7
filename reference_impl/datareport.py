"""What is in the data: which rows were read, kept, dropped or cut, and what about them should worry one?

Plain data: `DataReport.lines()` for the terminal, `DataReport.to_json()` for a file. Lengths are in tokens.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

# Reason of a dropped or cut row -> what a person reads. A row has one reason: the first that applies.
DROPPED = {
    "identical": "chosen = rejected",
    "identical_tokens": "chosen and rejected the same tokens",
    "identical_after_cut": "chosen and rejected the same after the cut",
    "empty": "a completion without text",
    "parts_early": "the two sides part before the last reply",
    "not_assistant": "the completion is not the assistant's",
    "template_refuses": "refused by the chat template",
    "template_rewrites": "prompt changed by the chat template once a reply follows",
    "eos_inside": "text after EOS",
    "bos_inside": "a second BOS",
    "unscorable": "no token before the completion, and no BOS",
    "prompt_too_long": "prompt leaves no room for a completion",
    "completion_too_long": "completion leaves no room for the prompt",
    "too_long": "longer than max_length",
}
CUT = {
    "completion_cut": "end of a completion cut",
    "prompt_cut": "start of the prompt cut",
}
# What to do where a reason takes every row.
REMEDY = {
    "identical": "check that 'chosen' and 'rejected' are read from different columns",
    "identical_tokens": "the tokenizer does not know this text: take the tokenizer of the model",
    "empty": "a completion must have text",
    "parts_early": "give pairs that differ in the last reply only",
    "not_assistant": "the completions must be messages of the role 'assistant'",
    "template_refuses": "change the messages to what the template allows, or give another chat template",
    "template_rewrites": "use a template that renders the prompt the same with and without the reply",
    "eos_inside": "remove the EOS text from the rows; the loader appends EOS itself",
    "bos_inside": "remove BOS from the texts, or from the chat template; the tokenizer adds it itself",
    "unscorable": "give the rows a prompt, or set tokenizer.bos_token",
    "identical_after_cut": "raise max_length",
    "prompt_too_long": "raise max_length, or use truncation keep_end, which cuts the prompt",
    "completion_too_long": "raise max_length, or use truncation keep_start, which cuts completions",
    "too_long": "raise max_length, or use truncation keep_start or keep_end",
}
# Shares above which a report says so: chosen longer in most pairs, and beyond chance; many texts cut.
BIAS_SHARE, BIAS_P, CUT_SHARE = 0.55, 0.01, 0.05


@dataclass(frozen=True)
class RowNote:
    """What happened to one row: `kind` "dropped" or "cut", `reason` a key of DROPPED or CUT, `detail` an excerpt."""

    row: int
    place: str
    kind: str
    reason: str
    detail: str

    def line(self) -> str:
        said = (DROPPED if self.kind == "dropped" else CUT)[self.reason]
        return f"{self.place}: {'dropped, ' if self.kind == 'dropped' else ''}{said}: {self.detail}"


@dataclass(frozen=True)
class Lengths:
    """Order statistics of one length, in tokens as trained."""

    median: float
    p95: int
    max: int


@dataclass(frozen=True)
class LengthBias:
    """Is chosen longer than rejected? Full lengths in tokens of kept pairs, before any cut.

    `share` counts pairs with the longer chosen among all pairs. `p` is the exact two-sided sign test, ties left out, of
    the hypothesis that chosen is as often the longer as the shorter side.
    """

    chosen_longer: int
    rejected_longer: int
    equal: int
    share: float
    median_difference: float
    p: float

    @property
    def likely(self) -> bool:
        return self.share > BIAS_SHARE and self.p < BIAS_P


@dataclass(frozen=True)
class DataReport:
    """One load of one source. `notes` lists every dropped and every cut row; `hints` are sentences to act on.

    `duplicates`: pairs whose tokens repeat an earlier pair's. `contradictory`: pairs whose reverse is there as well.
    `boundary_merges`: pairs with a token across the end of the prompt. `not_round_trip` and `spacing_only`: pairs whose
    tokens do not decode to the text, in more than white space or in white space only. `bos_added`: pairs without any
    prompt token, before which BOS was put.
    """

    source: str
    format: str
    max_length: int | None
    truncation: str
    read: int
    kept: int
    dropped: dict[str, int]
    cut: dict[str, int]
    prompt_tokens: Lengths | None
    chosen_tokens: Lengths | None
    rejected_tokens: Lengths | None
    length_bias: LengthBias | None
    duplicates: int
    contradictory: int
    boundary_merges: int
    not_round_trip: int
    spacing_only: int
    bos_added: int
    hints: tuple[str, ...]
    notes: tuple[RowNote, ...]

    def to_json(self) -> str:
        """The whole report, notes included, as one JSON object."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens", "length_bias"):
            value[name] = None if value[name] is None else asdict(value[name])
        value["notes"] = [asdict(note) for note in self.notes]
        return json.dumps(value, ensure_ascii=False, indent=1)

    def lines(self) -> list[str]:
        """The report for the terminal, most important first."""
        dropped = "".join(f", {spaced(count)} dropped ({DROPPED[r]})" for r, count in self.dropped.items())
        listed = "; dpo-train rows lists them" if self.notes else ""
        rows, kept = spaced(self.read), spaced(self.kept)
        out = [f"{rows} rows of {self.source} ({self.format}): {kept} pairs kept{dropped}{listed}"]
        out += [self._cut_line(reason, count) for reason, count in self.cut.items()]
        for name in ("prompt", "chosen", "rejected"):
            found = getattr(self, f"{name}_tokens")
            if found is not None:
                middle = f"{found.median:g} tokens in the median, 95 % up to {spaced(found.p95)}"
                out.append(f"{name}: {middle}, longest {spaced(found.max)}")
        out += self._bias_line()
        if self.duplicates:
            out.append(f"{spaced(self.duplicates)} pairs repeat an earlier pair")
        if self.contradictory:
            count = spaced(self.contradictory)
            out.append(f"{count} pairs contradict another pair: the same, chosen and rejected swapped")
        return [*out, *self.hints]

    def _cut_line(self, reason: str, count: int) -> str:
        share = count / self.kept if self.kept else 0.0
        line = f"{spaced(count)} pairs ({share:.1%}) cut to {self.max_length} tokens: {CUT[reason]}"
        if reason == "completion_cut" and share > CUT_SHARE:
            line += "; cut completions never teach the model to end, raise max_length"
        return line

    def _bias_line(self) -> list[str]:
        bias = self.length_bias
        if bias is None:
            return []
        line = (
            f"chosen is longer than rejected in {bias.share:.0%} of pairs "
            f"(median {bias.median_difference:+g} tokens, sign test p = {bias.p:.2g})"
        )
        return [line + (": length bias likely, length may be learnt in place of quality" if bias.likely else "")]

    def rows(self, reason: str | None = None) -> list[str]:
        """One line for each dropped or cut row: all of them, or those of one reason.

        Raises KeyError, with the reasons there are, for an unknown reason.
        """
        if reason is not None and reason not in DROPPED and reason not in CUT:
            raise KeyError(f"no reason is called {reason!r}; there are {', '.join([*DROPPED, *CUT])}")
        return [note.line() for note in self.notes if reason in (None, note.reason)]

    def nothing_left(self) -> str:
        """Why there is no pair to train on, the remedy for the commonest reason, and an example."""
        counts = "; ".join(f"{spaced(count)} dropped: {DROPPED[r]}" for r, count in self.dropped.items())
        reason = next(iter(self.dropped))
        note = next(n for n in self.notes if n.reason == reason)
        return (
            f"{self.source}: none of {spaced(self.read)} rows can be trained on ({counts}); {REMEDY[reason]}. "
            f"For example {note.place}: {note.detail}"
        )


def spaced(number: int) -> str:
    """Thousands apart: 61 135."""
    return f"{number:,}".replace(",", " ")


def lengths(values: Sequence[int]) -> Lengths | None:
    """Median, 95th percentile (nearest rank) and maximum; None for no values."""
    if not len(values):
        return None
    ordered = sorted(values)
    return Lengths(_median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1])


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> LengthBias | None:
    """Compare the lengths of the two sides pair by pair; None for no pairs."""
    from scipy.stats import binomtest

    differences = sorted(c - r for c, r in zip(chosen, rejected, strict=True))
    n = len(differences)
    if not n:
        return None
    longer = sum(d > 0 for d in differences)
    shorter = sum(d < 0 for d in differences)
    p = float(binomtest(longer, longer + shorter, 0.5).pvalue) if longer + shorter else 1.0
    return LengthBias(longer, shorter, n - longer - shorter, longer / n, _median(differences), p)


def count_reasons(notes: Sequence[RowNote], kind: str) -> dict[str, int]:
    """Rows by reason, the commonest first."""
    return dict(Counter(note.reason for note in notes if note.kind == kind).most_common())


def _median(ordered: Sequence[int]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
