"""What became of the rows of a source, and what exactly does the model see and score of one of them?

For people who doubt: whether the prompt is masked, whether chosen and rejected are swapped, why a row is missing.
"""

from collections.abc import Mapping
from typing import Any

from reference_impl.data import DataError, PairData, TokenPair, load_pairs

EDGE = 6  # tokens shown one by one on each side of the end of the prompt


def list_rows(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reason: str | None = None,
    row: int | None = None,
) -> list[str]:
    """Lines for the terminal: dropped and cut rows (of one `reason`), or with `row` all about that row (from 0).

    Works too where no pair is left to train on. Raises DataError for an unreadable source and for an absent row,
    KeyError for an unknown reason.
    """
    try:
        data = load_pairs(
            source, tokenizer, max_length=max_length, truncation=truncation, chat_template_kwargs=chat_template_kwargs
        )
    except DataError as error:
        if error.report is None:
            raise
        data = PairData((), error.report, "")
    if row is None:
        return data.report.rows(reason) or ["no row was dropped or cut" + ("" if reason is None else f" for {reason}")]
    return _about(row, data, tokenizer)


def _about(row: int, data: PairData, tokenizer: Any) -> list[str]:
    if not 0 <= row < data.report.read:
        raise DataError(f"{data.report.source} has rows 0 to {data.report.read - 1}, not {row}")
    out = [note.line() for note in data.report.notes if note.row == row]
    for pair in data.pairs:
        if pair.row == row:
            out += show_pair(pair, tokenizer)
    return out


def show_pair(pair: TokenPair, tokenizer: Any) -> list[str]:
    """One pair as the model sees it: its three parts as texts, and single tokens around the end of the prompt."""
    out = [f"row {pair.row}", f"prompt, {len(pair.prompt)} tokens, not scored: {_text(pair.prompt, tokenizer)!r}"]
    for name in ("chosen", "rejected"):
        side = getattr(pair, name)
        ends = f"EOS {tokenizer.eos_token!r} in it" if tokenizer.eos_token_id in side else "no EOS: it was cut"
        out.append(f"{name}, {len(side)} tokens, all scored, {ends}: {_text(side, tokenizer)!r}")
        before, after = _tokens(pair.prompt[-EDGE:], tokenizer), _tokens(side[:EDGE], tokenizer)
        more = " ..." if len(side) > EDGE else ""
        out.append(f"{name} at the end of the prompt: {' '.join(before)} || {' '.join(after)}{more}")
    return out


def _text(ids: tuple[int, ...], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tokens(ids: tuple[int, ...], tokenizer: Any) -> list[str]:
    return [repr(_text((i,), tokenizer)) for i in ids]
