"""Which positions of a row count towards its log-prob, and what does each of them see?

A scored position is (s, t, times): the logits at position s predict the token at position t, and its log-prob is
counted `times` times.  The paper's rule: s = t - 1 for each completion token t whose predecessor is a real token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpocheck.experiment import Pair, TokenRow
from dpocheck.oracle.theory import Theory

Scored = list[tuple[int, int, int]]

# The clock's attention score is CLOCK * (cos d - sin d) at the distance d = i - j, before the softmax.  It is not even:
# a score of cos d alone would let positions that are counted backwards pass.
CLOCK = 2.0


@dataclass(frozen=True)
class Side:
    """One side of a pair in token ids; the completion starts at `start`."""

    ids: tuple[int, ...]
    start: int

    def row(self, width: int, pad: int, padding: str) -> TokenRow:
        gap = width - len(self.ids)
        pads, zeros, ones = (pad,) * gap, (0,) * gap, (1,) * len(self.ids)
        completion = (0,) * self.start + (1,) * (len(self.ids) - self.start)
        if padding == "left":
            return TokenRow(pads + self.ids, zeros + ones, zeros + completion)
        return TokenRow(self.ids + pads, ones + zeros, completion + zeros)


Sides = tuple[Side, Side]  # chosen, rejected


def sides_of(pair: Pair) -> Sides:
    start = len(pair.prompt)
    return Side(pair.prompt + pair.chosen, start), Side(pair.prompt + pair.rejected, start)


def padded(pairs: list[Sides] | tuple[Sides, ...], pad: int, padding: str = "right") -> list[TokenRow]:
    """2 * pair rows, chosen first, padded to the longest."""
    sides = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    width = max(len(side.ids) for side in sides)
    return [side.row(width, pad, padding) for side in sides]


def completion(row: TokenRow) -> Scored:
    """The paper's rule."""
    real, scored = row.attention, row.completion
    return [(t - 1, t, 1) for t in range(1, len(row.ids)) if scored[t] and real[t - 1]]


def scored(
    row: TokenRow, rule: str, *, eos: int | None = None, pad: int | None = None, longest: bool = False
) -> Scored:
    """The positions that a rule (`Theory.counted`) counts.

    `eos`, `pad`: ids, None where unknown.  `longest`: the row fills the batch's width.
    """
    paper, ids, width = completion(row), row.ids, len(row.ids)
    marked = [t for t in range(width) if row.completion[t]]
    if rule in ("completion", "chosen-mask") or not marked:
        return paper
    if rule == "prompt":
        return [(t - 1, t, 1) for t in range(1, width) if row.attention[t] and row.attention[t - 1]]
    if rule == "last-prompt":
        t = marked[0] - 1
        return ([(t - 1, t, 1)] if t >= 1 and row.attention[t - 1] else []) + paper
    if rule == "no-first":
        return [p for p in paper if p[1] != marked[0]]
    if rule == "no-eos":
        return [p for p in paper if p[1] != marked[-1] or (eos is not None and ids[p[1]] != eos)]
    if rule == "eos-twice":
        return [(s, t, 2 if t == marked[-1] else 1) for s, t, _ in paper]
    if rule == "last-only":
        return [p for p in paper if p[1] == marked[-1]]
    if rule == "longest-loses-last":
        return paper[:-1] if longest else paper
    if rule == "no-pad-id":
        return [p for p in paper if ids[p[1]] != pad]
    if rule == "no-zero-id":
        return [p for p in paper if ids[p[1]] != 0]
    return _shifted(row, rule, paper, marked) if "shift" in rule else _with_pads(row, rule, paper)


def _shifted(row: TokenRow, rule: str, paper: Scored, marked: list[int]) -> Scored:
    width = len(row.ids)
    if rule == "unshifted":
        return [(t, t, 1) for t in marked]
    if rule == "unshifted-padding":
        return [(t, t, 1) for t in range(marked[0], width)]
    if rule == "unshifted-all":
        return [(t, t, 1) for t in range(width)]
    if rule == "mask-unshifted":
        return [(s, s + 1, 1) for s in marked if s + 1 < width]
    if rule == "double-shift":
        return [(t - 2, t, 1) for t in marked if t >= 2]
    return [(t + 1, t, 1) for t in marked if t + 1 < width]  # shifted-back


def _with_pads(row: TokenRow, rule: str, paper: Scored) -> Scored:
    pads = [t for t in range(1, len(row.ids)) if not row.attention[t]]
    left = bool(pads) and not row.attention[0]
    if rule == "one-pad":
        pads = pads[-1:] if left else pads[:1]
    return sorted(paper + [(t - 1, t, 1) for t in pads])


def _narrowed(rows: list[TokenRow]) -> list[TokenRow]:
    """Rows padded to the longest among them, on the side on which they are padded."""
    gap = min((row.attention.count(0) for row in rows), default=0)
    left = any(not row.attention[0] for row in rows)
    kept = slice(gap, None) if left else slice(None, len(rows[0].ids) - gap) if rows else slice(None)
    return [TokenRow(row.ids[kept], row.attention[kept], row.completion[kept]) for row in rows]


def seen(row: TokenRow, position: int, kind: str, attention: str, size: int) -> np.ndarray:
    """(token,): the share of each token in what position `position` attends to, under a glass or a clock body."""
    last = len(row.ids) if attention == "future" else position + 1
    keys = [j for j in range(last) if row.attention[j] or attention == "pads"]
    if not keys:
        keys = [position]
    if kind == "clock" and attention != "equal-positions":
        distance = (position - np.array(keys, dtype=float)) * (-1 if attention == "backwards" else 1)
        scores = CLOCK * (np.cos(distance) - np.sin(distance))
        weights = np.exp(scores - scores.max())
    else:
        weights = np.ones(len(keys))
    share = np.zeros(size)
    np.add.at(share, [row.ids[j] for j in keys], weights / weights.sum())
    return share


@dataclass(frozen=True, eq=False)
class Positions:
    """The scored positions of a batch of rows, flat.

    A *state* is what logits are computed for: a context token, or under a glass body one position of one row.
    """

    rows: int
    row: np.ndarray  # (position,): which row it counts for
    state: np.ndarray  # (position,): whose logits predict
    target: np.ndarray  # (position,): the token predicted
    times: np.ndarray  # (position,) float
    contexts: np.ndarray  # (state,): the last token
    mix: np.ndarray | None  # (state, token): attended shares, under a glass body
    counts: np.ndarray  # (row,) float: tokens counted
    widths: np.ndarray  # (row,) float: padded lengths


def positions(
    rows: list[TokenRow], rule: str, theory: Theory, *, kind: str, size: int, eos: int | None, pad: int | None,
    paired: bool = False,
) -> Positions:  # fmt: skip
    """Compile rows under a counting rule.  `paired`: the second half of the rows are the first half's rejected."""
    row_of, state_of, target, times, states, mixes = [], [], [], [], {}, []
    glass = kind in ("glass", "clock")
    if paired and rule == "padding-by-side":
        half = len(rows) // 2
        rows = _narrowed(rows[:half]) + _narrowed(rows[half:])
    for r, row in enumerate(rows):
        if paired and rule == "chosen-mask" and r >= len(rows) // 2:
            row = TokenRow(row.ids, row.attention, rows[r - len(rows) // 2].completion)
        longest = all(row.attention)
        for s, t, n in scored(row, rule, eos=eos, pad=pad, longest=longest):
            key = (r, s) if glass else row.ids[s]
            if key not in states:
                states[key] = (len(states), row.ids[s])
                if glass:
                    mixes.append(seen(row, s, kind, theory.attention, size))
            row_of.append(r)
            state_of.append(states[key][0])
            target.append(row.ids[t])
            times.append(n)
    row_array, times_array = np.array(row_of, dtype=np.intp), np.array(times, dtype=np.float64)
    return Positions(
        rows=len(rows),
        row=row_array,
        state=np.array(state_of, dtype=np.intp),
        target=np.array(target, dtype=np.intp),
        times=times_array,
        contexts=np.array([context for _, context in states.values()], dtype=np.intp),
        mix=np.array(mixes).reshape(-1, size) if glass else None,
        counts=np.bincount(row_array, weights=times_array, minlength=len(rows)),
        widths=np.array([len(row.ids) for row in rows], dtype=np.float64),
    )
