"""How does a row of text or messages become two padded token rows?  Parts: read, render, tokenize, truncate,
collate.

Choices that the sources leave open: EOS closes a text completion, never a templated chat; prompt and completion are
tokenised as one text and split where either side stops agreeing with the prompt; each side is truncated by itself, and
a pair that is left without completion tokens is dropped.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpocheck.adapter import PairBatch, Unsupported
from dpocheck.experiment import Recipe


@dataclass(frozen=True)
class Text:
    """A rendered row.  `chosen` and `rejected` are prompt and completion in one.

    `templated`: a chat template wrote it, its special tokens included, so that none is to be added.
    """

    prompt: str
    chosen: str
    rejected: str
    templated: bool


@dataclass(frozen=True)
class Side:
    """Prompt and completion ids; the completion starts at `start`."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Example:
    """One tokenised pair; `row` is its number among all rows of the run, evaluation sets included."""

    row: int
    chosen: Side
    rejected: Side


@dataclass(frozen=True)
class Batch(PairBatch):
    """A pair batch that knows its rows' numbers."""

    rows: tuple[int, ...] = ()


def read(given: Sequence[Mapping[str, Any]] | str | Path) -> list[Mapping[str, Any]]:
    """The rows of a data set: a list, or a file with a JSON object on each line."""
    if not isinstance(given, str | Path):
        return list(given)
    return [json.loads(line) for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of leading items that two sequences share."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))


def render(row: Mapping[str, Any], tokenizer: Any) -> Text:
    """A row of strings or messages as text.  Without a prompt, it is the longest common prefix; nothing is lost."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is not None:
        chosen, rejected = prompt + chosen, prompt + rejected
    else:
        shared = common_prefix(chosen, rejected)
        whole_messages = isinstance(chosen, list)
        prompt = chosen[: min(shared, len(chosen) - 1, len(rejected) - 1) if whole_messages else shared]
    if isinstance(chosen, str):
        return Text(prompt, chosen, rejected, templated=False)
    template = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    opening = template(prompt, add_generation_prompt=True) if prompt else ""
    return Text(opening, template(chosen), template(rejected), templated=True)


def tokenize(text: Text, tokenizer: Any, row: int) -> Example:
    """Tokenised jointly; EOS once at the end of a completion that no template has written."""

    def ids(string: str) -> tuple[int, ...]:
        return tuple(tokenizer(string, add_special_tokens=not text.templated)["input_ids"])

    prompt, sides = ids(text.prompt), [ids(text.chosen), ids(text.rejected)]
    start = min(common_prefix(prompt, side) for side in sides)
    eos = tokenizer.eos_token_id
    if not text.templated and eos is not None:
        sides = [side if side[start:][-1:] == (eos,) else (*side, eos) for side in sides]
    return Example(row, *(Side(side, start) for side in sides))


def truncate(example: Example, recipe: Recipe) -> Example | None:
    """Each side cut to `max_length` as `truncation` says; None where that leaves a side without completion."""
    limit = recipe.max_length
    if limit is None or max(len(example.chosen.ids), len(example.rejected.ids)) <= limit:
        return example
    if recipe.truncation == "drop":
        return None
    if recipe.truncation not in ("keep_start", "keep_end"):
        raise Unsupported(f"truncation {recipe.truncation!r}")

    def cut(side: Side) -> Side:
        surplus = max(0, len(side.ids) - limit)
        if recipe.truncation == "keep_start":
            return Side(side.ids[:limit], side.start)
        return Side(side.ids[surplus:], max(0, side.start - surplus))

    chosen, rejected = cut(example.chosen), cut(example.rejected)
    if any(side.start >= len(side.ids) for side in (chosen, rejected)):
        return None
    return replace(example, chosen=chosen, rejected=rejected)


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Right-padded rows, chosen first.  A row's first token has nothing before it that predicts it: it never counts."""
    sides = [example.chosen for example in examples] + [example.rejected for example in examples]
    width = max(len(side.ids) for side in sides)

    def rows(fill: Callable[[Side], Iterable[int]], rest: int) -> torch.Tensor:
        return torch.tensor([[*fill(side)] + [rest] * (width - len(side.ids)) for side in sides])

    return Batch(
        input_ids=rows(lambda side: side.ids, pad),
        attention_mask=rows(lambda side: [1] * len(side.ids), 0),
        completion_mask=rows(lambda side: [int(at >= max(1, side.start)) for at in range(len(side.ids))], 0),
        pad_token_id=pad,
        rows=tuple(example.row for example in examples),
    )


def batches_of(items: Sequence[Any], size: int) -> list[Any]:
    """Consecutive pieces of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
