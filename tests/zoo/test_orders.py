"""Is a loop that sorts its rows by length seen, though each epoch has every row once?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dpocheck import audit
from dpocheck.miniature import Miniature


@dataclass(frozen=True)
class SortsByLength(Miniature):
    """Rows in order of length, whatever was asked for."""

    def windows(self, examples, recipe):
        by_length = sorted(examples, key=lambda example: len(example.chosen.ids))
        yield from super().windows(by_length, replace(recipe, shuffle=False))


def verdict(adapter) -> tuple[str, str]:
    (result,) = [one for one in audit(adapter, only=("RUN-SHUFFLE",)).results if one.id == "RUN-SHUFFLE"]
    return result.verdict, str(result.observed)


def test_rows_sorted_by_length_are_no_shuffle():
    told, seen = verdict(SortsByLength())
    assert told == "fail"
    assert seen == "rows 2 4 6 1 8 7 3 5"  # their prompts have 1, 2, ..., 8 tokens


def test_the_orders_that_were_seen_are_told():
    told, seen = verdict(Miniature())
    assert told == "pass"
    assert "first epoch" in seen
    assert "second epoch" in seen
