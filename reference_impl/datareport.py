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
    "identical": "chosen equals rejected",
    "identical_tokens": "chosen and rejected have the same tokens",
    "identical_after_cut": "chosen and rejected are the same after the cut",
    "empty": "a completion without text",
    "parts_early": "the two sides part before the last reply",
    "not_assistant": "the completion holds a turn that is not the assistant's",
    "template_refuses": "the chat template refuses the conversation",
    "template_rewrites": "the chat template renders the prompt differently inside the conversation",
    "eos_inside": "EOS inside a completion",
    "bos_inside": "BOS after the start",
    "unscorable": "no prompt token before the completion, and the tokenizer has no BOS",
    "prompt_too_long": "prompt leaves no room for a completion token",
    "completion_too_long": "a completion leaves no room for the prompt",
    "too_long": "longer than max_length",
}
CUT = {
    "completion_cut": "end of a completion cut",
    "prompt_cut": "start of the prompt cut",
}


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
        return f"{self.place}: {self.kind}, {said}: {self.detail}"


@dataclass(frozen=True)
class Lengths:
    """Order statistics of one length, in tokens as trained."""

    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class LengthBias:
    """Is chosen longer than rejected? Full lengths of kept pairs, before any cut.

    `p` is the exact two-sided sign test (ties left out) of the hypothesis that either side is as often the longer one.
    """

    chosen_longer: int
    rejected_longer: int
    equal: int
    median_difference: float
    p: float

    @property
    def share(self) -> float:
        total = self.chosen_longer + self.rejected_longer + self.equal
        return self.chosen_longer / total if total else math.nan


@dataclass(frozen=True)
class DataReport:
    """One load of one source. `notes` lists every dropped and every cut row; `hints` are sentences to act on."""

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
        dropped = "".join(f", {count:,} dropped ({DROPPED[r]})" for r, count in self.dropped.items())
        out = [f"{self.read:,} rows of {self.source} ({self.format}): {self.kept:,} pairs kept{dropped}"]
        for reason, count in self.cut.items():
            share = count / self.kept if self.kept else 0.0
            out.append(f"cut to {self.max_length} tokens ({self.truncation}): {count:,} pairs ({share:.1%}), {CUT[reason]}")
        for name in ("prompt", "chosen", "rejected"):
            lengths = getattr(self, f"{name}_tokens")
            if lengths is not None:
                out.append(f"{name} tokens: median {lengths.median:g}, 95 % up to {lengths.p95:g}, longest {lengths.max:,}")
        out += self._bias_line()
        if self.duplicates:
            out.append(f"{self.duplicates:,} pairs repeat an earlier pair")
        if self.contradictory:
            out.append(f"{self.contradictory:,} pairs contradict another pair (same prompt, same texts, other choice)")
        out += self.hints
        return out

    def _bias_line(self) -> list[str]:
        bias = self.length_bias
        if bias is None:
            return []
        line = f"chosen is longer than rejected in {bias.share:.0%} of pairs (median {bias.median_difference:+g} tokens, sign test p = {bias.p:.2g})"
        if bias.p < 0.01 and bias.share > 0.55:
            line += ": length bias likely, the model may learn to be long rather than good"
        return [line]

    def rows(self, reason: str | None = None) -> list[str]:
        """One line for each dropped or cut row, all of them or those of one reason.

        Raises KeyError, with the reasons there are, for a reason nobody gives.
        """
        if reason is not None and reason not in DROPPED and reason not in CUT:
            raise KeyError(f"no such reason {reason!r}; there are {', '.join([*DROPPED, *CUT])}")
        return [note.line() for note in self.notes if reason in (None, note.reason)]


def lengths(values: Sequence[int]) -> Lengths | None:
    """Median, 95th percentile and maximum; None for no values."""
    if not len(values):
        return None
    ordered = sorted(values)
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Lengths(median, float(ordered[math.ceil(0.95 * n) - 1]), ordered[-1])


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> LengthBias | None:
    """Compare the lengths of the two sides pair by pair. One entry for each pair; None for no pairs."""
    from scipy.stats import binomtest

    differences = sorted(c - r for c, r in zip(chosen, rejected, strict=True))
    n = len(differences)
    if not n:
        return None
    longer = sum(d > 0 for d in differences)
    shorter = sum(d < 0 for d in differences)
    p = float(binomtest(longer, longer + shorter, 0.5).pvalue) if longer + shorter else 1.0
    median = (differences[(n - 1) // 2] + differences[n // 2]) / 2
    return LengthBias(longer, shorter, n - longer - shorter, median, p)


def count_reasons(notes: Sequence[RowNote], kind: str) -> dict[str, int]:
    """Rows by reason, the commonest first."""
    return dict(Counter(note.reason for note in notes if note.kind == kind).most_common())
