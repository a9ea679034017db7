"""Which token rows and which table models are worth asking about?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from dpocheck.experiment import Body, LogpExperiment, Objective, Pair, StepExperiment, Table, TokenRow
from dpocheck.probes.tokenizers import plain_words
from dpocheck.strategies.choose import choose, generic, sized
from dpocheck.strategies.losses import sigmoids

SIZE = 64
WORDS = plain_words(SIZE)
COUNTS = (1, 2, 3, 5, 6)
CASES = (
    "plain", "shared first token", "shared prefix", "repeated token", "chosen is EOS", "rejected is EOS", "token 0",
)  # fmt: skip
TEXT_CASES = tuple(case for case in CASES if "is EOS" not in case)  # a trainer may drop a row with an empty text
SALTS = 126  # starting points in the list of numbers
FEW, MANY = 2.0, 6.0  # logits lie within 2 or 6 nats of zero


# -------------------------------------------------------------------------------------------------------------- pairs


@st.composite
def pairs(
    draw: st.DrawFn,
    counts: tuple[int, ...] = COUNTS,
    *,
    rectangular: bool = False,
    cases: tuple[str, ...] = CASES,
    shared_prompts: bool = False,
) -> tuple[Pair, ...]:
    """Token pairs; completions end with EOS.  Prompts have 1 to 6 tokens, completions 1 to 8 and EOS.

    Prompts are disjoint: each pair then owns its rows of the gradient.  Completions have tokens of their own while the
    vocabulary lasts.  `cases` are the hard ones: a completion that is EOS alone, a first token or a prefix that chosen
    and rejected share, one token twice in a row, the token with id 0.  `rectangular` pairs have one shape and no hard
    cases.  With `shared_prompts` all pairs may have one prompt.
    """
    count = draw(sized(*counts))
    one = (draw(choose(2, 1, 3, 4, 6)), draw(choose(2, 1, 3, 4)))
    prompts: list[tuple[int, ...]] = []
    shapes = []
    fresh = 1  # token 0 is kept for its case
    for _ in range(count):
        prompt, length = one if rectangular else (draw(choose(2, 1, 3, 4, 5, 6)), draw(choose(3, 1, 2, 4, 5, 6, 8)))
        prompt = prompt if count <= 6 else min(prompt, 3)  # prompts are disjoint, and completions need tokens too
        other = length if rectangular else draw(choose(1, 2, 3, 4, 5, 7, 8))
        shapes.append((length, other))
        prompts.append(tuple(range(fresh, fresh + prompt)))
        fresh += prompt
    if shared_prompts and draw(st.booleans()):
        prompts = [prompts[0]] * count
    take = _taker(range(fresh, len(WORDS.words)))
    found = []
    for prompt_ids, (length, other) in zip(prompts, shapes, strict=True):
        case = "plain" if rectangular else draw(choose(*cases))
        chosen, rejected = _completions(case, take(length), take(other), take)
        found.append(Pair(prompt_ids, (*chosen, WORDS.eos), (*rejected, WORDS.eos)))
    return tuple(found)


Ids = tuple[int, ...]


def _taker(pool: range) -> Callable[[int], Ids]:
    """Tokens one after the other, from the start again when none is left."""
    taken = 0

    def take(count: int) -> Ids:
        nonlocal taken
        ids = tuple(pool[(taken + i) % len(pool)] for i in range(count))
        taken += count
        return ids

    return take


def _completions(case: str, chosen: Ids, rejected: Ids, take: Callable[[int], Ids]) -> tuple[Ids, Ids]:
    """The two completions without EOS, changed to show the case; they always differ."""
    if case == "shared first token":
        return chosen, (chosen[0], *(rejected[1:] or take(1)))
    if case == "shared prefix":
        chosen = chosen if len(chosen) > 1 else chosen + take(1)
        return chosen, chosen[:2] + rejected
    if case == "repeated token":
        return (chosen[0], *chosen), (*rejected, rejected[-1])
    if case == "chosen is EOS":
        return (), rejected
    if case == "rejected is EOS":
        return chosen, ()
    if case == "token 0":
        return (*chosen[:-1], 0), (0, *rejected)
    return chosen, rejected


# ------------------------------------------------------------------------------------------------------------- tables


def cells(of: tuple[Pair, ...]) -> tuple[tuple[int, int], ...]:
    """The transitions (context, target) of the pairs, prompts included, in order of appearance."""
    rows = (pair.prompt + completion for pair in of for completion in (pair.chosen, pair.rejected))
    return tuple(dict.fromkeys(cell for row in rows for cell in pairwise(row)))


def table(of: tuple[Pair, ...], salt: int, scale: float = FEW) -> Table:
    """Generic logits within `scale` of zero on every transition of the pairs; zero elsewhere."""
    return Table(SIZE, 0.0, tuple((u, v, scale / 2 * generic(salt + i)) for i, (u, v) in enumerate(cells(of))))


def tables(of: tuple[Pair, ...]) -> st.SearchStrategy[Table]:
    """A table model over the tokens of the pairs, at one of several starts in the list of numbers and two scales."""
    return st.tuples(choose(*range(0, SALTS, 8)), choose(FEW, MANY)).map(lambda drawn: table(of, *drawn))


def log_ratios(of: tuple[Pair, ...], policy: Table, reference: Table) -> np.ndarray:
    """(4, pair): log-probs of chosen and rejected under policy, then under reference, in nats."""
    found = []
    for model in (policy, reference):
        logits = model.logits()
        logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for side in ("chosen", "rejected"):
            rows = [pairwise(pair.prompt[-1:] + getattr(pair, side)) for pair in of]
            found.append([sum(logps[cell] for cell in row) for row in rows])
    return np.array(found)


def tells_apart(logps: np.ndarray) -> bool:
    """Whether a batch, as its `log_ratios` (4, pair), is fit for checks of metrics and steps.

    The accuracy, its opposite, that of the log-probs and that of the chosen rewards are four different numbers, so
    none is 1/2; some h is above 2 and some below -2.
    """
    lw, ll, rw, rl = logps
    h = (lw - rw) - (ll - rl)
    right = int((h > 0).sum())
    shares = {right, len(h) - right, int((lw > ll).sum()), int((lw > rw).sum())}
    return len(shares) == 4 and bool(h.max() > 2) and bool(h.min() < -2)


TURNS = (7, 11, 13, 17, 23, 29, 31, 37, 41, 47, 53, 59, 61)  # the reference's start after the policy's; 63 would negate


def telling(of: tuple[Pair, ...], salt: int, scale: float = MANY) -> tuple[Table, Table]:
    """Policy and reference, different in every cell: from the first starts after `salt` whose batch tells apart.

    Found by going through the list of numbers, so that nothing drawn is thrown away.  One pair or two cannot tell
    apart, and any start serves them.
    """
    if len(of) < 3:
        return table(of, salt, scale), table(of, salt + TURNS[0], scale)
    scored = _Scored(of)
    for wider in (1.0, 1.5, 2.0, 4.0):
        for turn in TURNS:
            for start in range(salt, salt + 126):
                if tells_apart(scored.log_ratios(start, start + turn, wider * scale)):
                    return table(of, start, wider * scale), table(of, start + turn, wider * scale)
    return table(of, salt, scale), table(of, salt + TURNS[0], scale)


class _Scored:
    """The log-probs of pairs under the tables of many starts, without making the tables."""

    def __init__(self, of: tuple[Pair, ...]) -> None:
        places = {cell: i for i, cell in enumerate(cells(of))}
        contexts = np.array([u for u, _ in places])
        self.same = (contexts[:, None] == contexts[None, :]).astype(float)  # cells that share a context
        self.idle = SIZE - self.same.sum(axis=1)  # targets with logit zero
        self.times = np.zeros((2, len(of), len(places)))
        for i, pair in enumerate(of):
            for side, completion in enumerate((pair.chosen, pair.rejected)):
                for cell in pairwise(pair.prompt[-1:] + completion):
                    self.times[side, i, places[cell]] += 1

    def log_ratios(self, start: int, other: int, scale: float) -> np.ndarray:
        found = []
        for salt in (start, other):
            logits = np.array([scale / 2 * generic(salt + i) for i in range(len(self.idle))])
            found += list(self.times @ (logits - np.log(self.same @ np.exp(logits) + self.idle)))
        return np.array(found)


# -------------------------------------------------------------------------------------------------------- experiments


def padded(rows: list[tuple[Ids, Ids]], side: str, extra: int, pad: int) -> tuple[TokenRow, ...]:
    """(prompt, completion) rows padded to one width on one side."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + extra
    made = []
    for prompt, completion in rows:
        real, gap = len(prompt) + len(completion), width - len(prompt) - len(completion)
        ids, ones, marks = prompt + completion, (1,) * real, (0,) * len(prompt) + (1,) * len(completion)
        pads, zeros = (pad,) * gap, (0,) * gap
        parts = ((pads, ids), (zeros, ones), (zeros, marks))
        made.append(TokenRow(*(fill + part if side == "left" else part + fill for fill, part in parts)))
    return tuple(made)


@st.composite
def logp_experiments(
    draw: st.DrawFn,
    counts: tuple[int, ...] = COUNTS,
    *,
    cases: tuple[str, ...] | None = None,
    own_masks: bool = True,
    dtype: str = "float32",
) -> LogpExperiment:
    """Rows of a padded batch, chosen first, then rejected, under a table.

    `own_masks`: pads stand on either side, up to seven more than needed, and hold the pad token, EOS, or an ordinary
    token that is content elsewhere.  Without, pads are on the right and hold the pad token, as in a whole run.
    """
    of = draw(pairs(counts, cases=cases or (CASES if own_masks else TEXT_CASES)))
    model = draw(tables(of))
    rows = [(pair.prompt, pair.chosen) for pair in of] + [(pair.prompt, pair.rejected) for pair in of]
    if not own_masks:
        return LogpExperiment(model, padded(rows, "right", 0, WORDS.pad), dtype=dtype)
    side, extra = draw(choose("right", "left")), draw(choose(0, 1, 3, 7))
    pad = draw(choose(WORDS.pad, WORDS.eos, 0, of[0].rejected[0]))
    return LogpExperiment(model, padded(rows, side, extra, pad), dtype=dtype)


@st.composite
def step_experiments(
    draw: st.DrawFn,
    objective: st.SearchStrategy[Objective] | None = None,
    *,
    counts: tuple[int, ...] = COUNTS,
    rectangular: bool = False,
    cases: tuple[str, ...] | None = None,
    own_masks: bool = True,
    body: str = "silent",
    dtype: str = "float32",
) -> StepExperiment:
    """One step on policy and reference tables that differ everywhere; batches of three or more tell apart, but for a
    few of three pairs whose lengths are very unequal.

    Prompts are disjoint.  `own_masks`: pads on either side, holding the pad token, EOS or an ordinary token; without,
    as in a whole run.
    """
    wanted = draw(objective if objective is not None else sigmoids((0.5, 0.125, 2.0)))
    of = draw(pairs(counts, rectangular=rectangular, cases=cases or (CASES if own_masks else TEXT_CASES)))
    policy, reference = telling(of, draw(choose(*range(0, SALTS, 8))))
    side, pad = "right", WORDS.pad
    if own_masks:
        side = draw(choose("right", "left"))
        pad = draw(choose(WORDS.pad, WORDS.eos, 0, of[0].rejected[0]))
    return StepExperiment(
        policy, reference, of, wanted, body=Body(body), pad=pad, eos=WORDS.eos, padding=side, dtype=dtype
    )
