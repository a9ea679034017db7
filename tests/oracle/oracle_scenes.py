"""Small experiments that the oracle's judges share.  Numbers are generic dyadics: never 0, never equal."""

from __future__ import annotations

import numpy as np

from dpocheck.experiment import (
    Body,
    LossExperiment,
    Objective,
    Pair,
    Recipe,
    Row,
    StepExperiment,
    Table,
    Tokenizer,
    TrainExperiment,
)

SIZE = 16


def table(seed: int, size: int = SIZE, scale: float = 16.0) -> Table:
    """Logits with a standard deviation near 1, in multiples of 1/16."""
    logits = np.random.default_rng(seed).normal(size=(size, size))
    return Table.of((np.rint(logits * scale) + 0.5) / scale)


PLAIN = Objective(beta=0.5)
PAIRS = (  # ragged; chosen longer in one, shorter in another; a repeated context; token 0 as content
    Pair((1, 2), (3, 4, 14), (5, 14)),
    Pair((6,), (7, 14), (3, 4, 0, 14)),
    Pair((8, 9, 1), (2, 2, 2, 14), (10, 11, 14)),
)


def step(objective: Objective = PLAIN, body: str = "silent", **changes) -> StepExperiment:
    settings = {"pad": 15, "eos": 14, "dtype": "float64"} | changes
    return StepExperiment(table(1), table(2), settings.pop("pairs", PAIRS), objective, Body(body), **settings)


LOSS = LossExperiment(
    (-3.5, -6.25, -2.0, -41.0), (-6.0, -4.75, -3.5, -9.5), (-4.0, -3.625, -2.5, -12.0), (-5.0, -5.5, -3.25, -11.0),
    PLAIN, ((3, 2), (2, 4), (5, 7), (9, 6)),
)  # fmt: skip

WORDS = tuple("abcdefghijkl")
TOKENIZER = Tokenizer(WORDS, SIZE)
ROWS = (
    Row("a b", " c d", " e"), Row("f", " g", " c d b"), Row("h i", " j k l", " a"), Row("c", " a e", " b f"),
    Row("d e", " k", " i h"),
)  # fmt: skip
HELD_OUT = (Row("a", " b c", " d"), Row("e f", " g", " h"), Row("i", " j", " k l"))


def train(recipe: Recipe | None = None, rows: tuple[Row, ...] = ROWS, **changes) -> TrainExperiment:
    recipe = recipe or Recipe(Objective(beta=0.5), learning_rate=4.0, batch=5, dtype="float64")
    settings = {"policy": table(1), "reference": table(2), "tokenizer": TOKENIZER} | changes
    return TrainExperiment(rows=rows, recipe=recipe, **settings)
