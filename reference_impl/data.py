"""Which tokens does the trainer compare? The front door of the data side.

`load_pairs` reads a preference set in any usual format, tokenises it, cuts it to length, and says what became of every
row. Every pair it returns has one prompt for both sides, and at least one scored token on each side.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from reference_impl.datareport import DataReport, RowNote, count_reasons, length_bias, lengths, spaced
from reference_impl.render import check_template, render
from reference_impl.rows import ChatPair, Form, TextPair, detect, parse
from reference_impl.sources import DataError, SourceRow, read_rows, source_name
from reference_impl.tokens import Ids, SpecialTokens, TokenisedPair, special_tokens, tokenise, tokenizer_hash
from reference_impl.truncate import TRUNCATIONS, fit

__all__ = ["DataError", "DataReport", "PairData", "RowNote", "TokenPair", "load_pairs"]

BATCH = 512  # rows tokenised at once: enough to keep the tokenizer's threads busy, little memory


@dataclass(frozen=True)
class TokenPair:
    """One preference as tokens. `row` is its index in the source, from 0.

    prompt + chosen and prompt + rejected are the two sequences; every token of a completion is scored. A completion
    includes EOS where its text ends, and no EOS where it was cut.
    """

    row: int
    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass(frozen=True)
class PairData:
    """All pairs of a source, in its order. `fingerprint`: SHA-256 of token rows, tokenizer and truncation."""

    pairs: tuple[TokenPair, ...]
    report: DataReport
    fingerprint: str


@dataclass
class _Tally:
    """What is counted while rows stream by."""

    read: int = 0
    merged: int = 0
    text_lost: int = 0
    spacing_lost: int = 0
    bos_added: int = 0
    eos_added: int = 0
    repeats_prompt: int = 0
    unanswered: int = 0
    unanswered_text: str = ""


def load_pairs(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PairData:
    """Read, render, tokenise and cut a preference set.

    `source`: a path (.jsonl, .json, also .gz; .parquet), "hub:name[:split]", or rows (dicts) in memory.
    `max_length`: tokens of prompt + completion, at least 2; None for no limit. `truncation`: see truncate.py.
    Raises DataError for what cannot be read, and where no pair is left to train on.
    """
    _check_settings(max_length, truncation)
    special = special_tokens(tokenizer)
    kwargs = dict(chat_template_kwargs or {})
    tally, notes, pairs = _Tally(), [], []
    full = {"chosen": array("l"), "rejected": array("l")}
    rows = read_rows(source)
    first = next(rows)
    form = detect(first)
    if form.chat:
        check_template(tokenizer, kwargs)
    interned: dict[int, int] = {}
    for batch in _batches(_texts(first, rows, form, tokenizer, kwargs, tally, notes), BATCH):
        for item in tokenise(batch, tokenizer, special, add_prefix=not form.chat):
            pair = _fit(item, max_length, truncation, special, notes)
            if pair is None:
                continue
            _count(item, tally)
            full["chosen"].append(len(item.chosen))
            full["rejected"].append(len(item.rejected))
            # Equal ids become one object: a token then costs 8 bytes instead of 36.
            sides = (tuple(map(interned.setdefault, s, s)) for s in (pair.prompt, pair.chosen, pair.rejected))
            pairs.append(TokenPair(pair.row, *sides))
    notes.sort(key=lambda note: note.row)
    report = _report(source_name(source), form, max_length, truncation, tally, notes, pairs, full, tokenizer)
    if not pairs:
        error = DataError(report.nothing_left())
        error.report = report
        raise error
    return PairData(tuple(pairs), report, _fingerprint(pairs, tokenizer, max_length, truncation))


def _check_settings(max_length: int | None, truncation: str) -> None:
    if truncation not in TRUNCATIONS:
        raise DataError(f"truncation {truncation!r} is unknown; allowed are {', '.join(TRUNCATIONS)}")
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2):
        raise DataError(f"max_length {max_length!r} must be a whole number from 2 (prompt and completion), or None")


def _texts(
    first: SourceRow, rest: Iterator[SourceRow], form: Form, tokenizer: Any, kwargs: Mapping[str, Any],
    tally: _Tally, notes: list[RowNote],
) -> Iterator[TextPair]:  # fmt: skip
    """Rows as texts. What states no preference goes to `notes`."""
    row: SourceRow | None = first
    while row is not None:
        tally.read += 1
        item = parse(row, form)
        if isinstance(item, ChatPair):
            item = render(item, tokenizer, kwargs)
        if isinstance(item, RowNote):
            notes.append(item)
        else:
            yield item
        row = next(rest, None)


def _batches(items: Iterable[TextPair], size: int) -> Iterator[list[TextPair]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _fit(
    item: TokenisedPair | RowNote, max_length: int | None, truncation: str, special: SpecialTokens, notes: list[RowNote]
) -> TokenPair | None:
    if isinstance(item, RowNote):
        notes.append(item)
        return None
    fitted = fit(item.prompt, item.chosen, item.rejected, max_length=max_length, truncation=truncation, bos=special.bos)
    size = f"{len(item.prompt)} + {len(item.chosen)} / {len(item.rejected)} tokens, limit {max_length}"
    if isinstance(fitted, str):
        notes.append(RowNote(item.row, item.place, "dropped", fitted, size))
        return None
    if fitted.reason:
        notes.append(RowNote(item.row, item.place, "cut", fitted.reason, size))
    return TokenPair(item.row, fitted.prompt, fitted.chosen, fitted.rejected)


def _count(item: TokenisedPair, tally: _Tally) -> None:
    tally.merged += item.merged
    tally.text_lost += item.lossy == "text"
    tally.spacing_lost += item.lossy == "spacing"
    tally.bos_added += item.bos_added
    tally.eos_added += item.eos_added
    tally.repeats_prompt += item.repeats_prompt
    tally.unanswered += bool(item.unanswered)
    tally.unanswered_text = tally.unanswered_text or item.unanswered


def _report(
    name: str, form: Form, max_length: int | None, truncation: str, tally: _Tally, notes: list[RowNote],
    pairs: list[TokenPair], full: dict[str, array], tokenizer: Any,
) -> DataReport:  # fmt: skip
    duplicates, contradictory = _repeats(pairs)
    return DataReport(
        source=name, format=form.name, max_length=max_length, truncation=truncation, read=tally.read, kept=len(pairs),
        dropped=count_reasons(notes, "dropped"), cut=count_reasons(notes, "cut"),
        prompt_tokens=lengths([len(p.prompt) for p in pairs]),
        chosen_tokens=lengths([len(p.chosen) for p in pairs]),
        rejected_tokens=lengths([len(p.rejected) for p in pairs]),
        length_bias=length_bias(full["chosen"], full["rejected"]),
        duplicates=duplicates, contradictory=contradictory, boundary_merges=tally.merged,
        not_round_trip=tally.text_lost, spacing_only=tally.spacing_lost, bos_added=tally.bos_added,
        hints=_hints(form, tally, tokenizer), notes=tuple(notes),
    )  # fmt: skip


def _hints(form: Form, tally: _Tally, tokenizer: Any) -> tuple[str, ...]:
    """One sentence for each thing that a person should know, with the number of kept pairs."""
    template = getattr(tokenizer, "chat_template", None)
    said = (
        (not form.chat and bool(template), "the rows are texts: the tokenizer's chat template is not applied to them"),
        (
            tally.repeats_prompt,
            "pairs repeat the prompt at the start of both completions, where it is scored: if 'chosen' and 'rejected' "
            "hold the whole text, remove the column 'prompt'",
        ),
        (
            form.chat and tally.eos_added,
            f"pairs do not end with EOS {tokenizer.eos_token!r} in the chat template: it is appended",
        ),
        (
            tally.unanswered,
            f"prompts are cut before {tally.unanswered_text!r}, which the template's generation prompt has and its "
            "finished conversations lack: training and generation start from different prompts",
        ),
        (
            tally.merged,
            "pairs have a token across the end of the prompt: it is scored, as part of the completion "
            "(the usual cause is a prompt that ends with a space)",
        ),
        (tally.text_lost, "pairs do not decode to their text: the tokenizer rewrites or drops characters"),
        (tally.spacing_lost, "pairs decode to their text but for white space"),
        (tally.bos_added, "pairs have no prompt token: BOS is put in front, so that the first token can be scored"),
    )
    return tuple(text if count is True else f"{spaced(count)} {text}" for count, text in said if count)


def _digest(*parts: Ids) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(array("q", (len(part), *part)).tobytes())
    return h.digest()


def _repeats(pairs: list[TokenPair]) -> tuple[int, int]:
    """Pairs that repeat an earlier one, and pairs whose reverse is among the pairs too."""
    keys = [_digest(p.prompt, p.chosen, p.rejected) for p in pairs]
    seen = set(keys)
    contradictory = sum(_digest(p.prompt, p.rejected, p.chosen) in seen for p in pairs)
    return len(keys) - len(seen), contradictory


def _fingerprint(pairs: list[TokenPair], tokenizer: Any, max_length: int | None, truncation: str) -> str:
    h = hashlib.sha256()
    h.update(json.dumps([tokenizer_hash(tokenizer), max_length, truncation]).encode())
    for p in pairs:
        sizes = (p.row, len(p.prompt), len(p.chosen), len(p.rejected))
        h.update(array("q", (*sizes, *p.prompt, *p.chosen, *p.rejected)).tobytes())
    return h.hexdigest()
