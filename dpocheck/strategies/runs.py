"""Which whole runs are worth asking about: batches, accumulation, steps, clipping, and text rows?"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from dpocheck.derive import ONE_STEP, STILL, rows
from dpocheck.experiment import Objective, Recipe, Row, Table, Tokenizer, TrainExperiment
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.strategies.choose import choose, generic
from dpocheck.strategies.losses import sigmoids
from dpocheck.strategies.tokens import SALTS, SIZE, TEXT_CASES, WORDS, pairs, telling

# (pairs, micro-batch, accumulation, steps): what a run does with its batches
SHAPES = {
    "whole": ((1, 1, 1, 1), (2, 2, 1, 1), (3, 3, 1, 1), (5, 5, 1, 1), (6, 6, 1, 1)),
    "even": ((2, 1, 2, 1), (6, 3, 2, 1), (3, 1, 3, 1), (4, 2, 2, 1), (6, 2, 3, 1), (5, 1, 5, 1), (6, 1, 6, 1)),
    "uneven": ((3, 2, 2, 1), (5, 2, 3, 1), (5, 3, 2, 1), (5, 4, 2, 1)),
    "steps": ((1, 1, 1, 2), (3, 3, 1, 2), (4, 2, 1, 2), (4, 2, 1, 3), (6, 3, 1, 3), (4, 1, 2, 2), (6, 2, 3, 3)),
    "logged": ((3, 3, 1, 1), (6, 3, 2, 1), (6, 3, 1, 2), (5, 5, 1, 1), (6, 6, 1, 1), (10, 5, 1, 2), (6, 2, 3, 1)),
}
CLIPS = (2.0**-5, 2.0**-7, 2.0**-9)


@st.composite
def train_experiments(
    draw: st.DrawFn,
    objective: st.SearchStrategy[Objective] | None = None,
    *,
    batches: tuple[str, ...] = ("whole", "even", "uneven", "steps"),
    clip: bool = False,
    held_out: bool = False,
    still: bool = False,
    rectangular: bool | None = None,
    theory: Theory = PAPER,
) -> TrainExperiment:
    """A run on text rows of the word tokenizer; policy and reference differ, and three pairs or more tell apart.

    `batches`: all pairs as one batch, as micro-batches of one size, with a smaller last micro-batch, or over several
    steps; "logged" is one or two steps of three to six pairs.  A run of one step has a rate that shows the gradient;
    `still`, one that moves nothing and shows the log.  `clip`: the norm is clipped far below what it is.  `held_out`:
    the rows are also an evaluation set, evaluated in uneven batches.  `rectangular` None draws it.
    `theory` says whether the trainer appends EOS: the rows are written for it.
    """
    wanted = draw(objective if objective is not None else sigmoids((0.5, 0.25, 2.0)))
    count, batch, accumulation, steps = draw(choose(*(shape for name in batches for shape in SHAPES[name])))
    even = draw(st.booleans()) if rectangular is None else rectangular
    of = draw(pairs((count,), rectangular=even, cases=TEXT_CASES))
    policy, reference = telling(of, draw(choose(*range(0, SALTS, 8))))
    rate = STILL if still else ONE_STEP if steps == 1 else draw(choose(8.0, 2.0, 1.0))
    recipe = Recipe(wanted, learning_rate=rate, batch=batch, accumulation=accumulation, steps=steps)
    if clip:
        recipe = replace(recipe, clip_norm=draw(choose(*CLIPS)))
    made = TrainExperiment(policy, reference, WORDS, rows(of, SIZE, theory), recipe)
    if not held_out:
        return made
    size = draw(choose(*(size for size in (2, 3, 4, 5) if count % size)))
    return replace(made, evaluation=(("held", made.rows),), recipe=replace(recipe, eval_batch=size))


# --------------------------------------------------------------------------------------------------------- text rows

LETTERS = Tokenizer(tuple("abcdefgh "), SIZE, kind="characters")


def dense(tokens: tuple[int, ...], salt: int) -> Table:
    """Generic logits between all the given tokens, below 1: the sums over a row's tokens then leave margins of a few.

    At a margin of 10 a pair's weight sigma(-m) is 5e-5.  Written as sigma(m) - 1 it rounds once, at the size of 1: that
    one rounding is then the whole bound, and a right trainer comes near it.
    """
    cells = [(u, v) for u in tokens for v in tokens]
    return Table(SIZE, 0.0, tuple((u, v, generic(salt + i) / 4) for i, (u, v) in enumerate(cells)))


def run_on(texts: tuple[Row, ...], tokenizer: Tokenizer, **recipe: object) -> TrainExperiment:
    """One full-batch step on the rows, over dense tables of the tokenizer's first words."""
    used = (*range(min(len(tokenizer.words), 13)), tokenizer.bos, tokenizer.eos)
    asked = Recipe(Objective(beta=0.5), learning_rate=ONE_STEP, batch=len(texts))
    return TrainExperiment(dense(used, 0), dense(used, 7), tokenizer, texts, replace(asked, **recipe))  # type: ignore[arg-type]


ENDS = (("ab", "cd"), ("ab ", "cd"), ("a b", "dc"), ("abb", "c"), ("a", "dab"), (" ab", "cd"), ("ab", "abb"))


@st.composite
def letter_rows(draw: st.DrawFn) -> TrainExperiment:
    """Rows without a `prompt` column, every character one token: no shared start, one, one that ends in a space, texts
    that begin or end with a space, one text the start of the other."""
    texts = []
    for i in range(draw(choose(1, 2))):
        shared = draw(choose("ef", "", "e", "ef ", "e f", "efg"))
        chosen, rejected = draw(choose(*ENDS))
        turned = chosen[::-1] if i else chosen
        texts.append(Row(None, shared + turned, shared + rejected))
    return run_on(tuple(texts), LETTERS)


@st.composite
def chat_free_rows(draw: st.DrawFn, *, limit: bool = False, ahead: int = 0) -> TrainExperiment:
    """Prompt, chosen and rejected as words, of one to five words each.

    `limit`: chosen and rejected have one length, and `max_length` cuts both and leaves something of each completion,
    whichever side is kept.  (Of two lengths, a trainer may cut each side by its own excess or both alike.)
    `ahead`: tokens that the trainer puts before a prompt.
    """
    prompt, chosen, rejected = draw(choose(3, 1, 2)), draw(choose(4, 3, 5)), draw(choose(5, 2, 3, 4))
    rejected = chosen if limit else rejected
    words = iter(WORDS.words)
    parts = [[next(words) for _ in range(count)] for count in (prompt, chosen, rejected)]
    row = Row(" ".join(parts[0]), "".join(f" {w}" for w in parts[1]), "".join(f" {w}" for w in parts[2]))
    if not limit:
        return run_on((row,), WORDS)
    longest = ahead + prompt + chosen + 1
    length = draw(choose(*range(longest - 1, ahead + prompt, -1)))
    return run_on((row,), WORDS, max_length=length, truncation=draw(choose("keep_start", "keep_end")))
