"""The experiments that many checks share: tables, pairs and rows, minimal by construction.

Numbers come from a list of generic dyadics by position, never zero, never equal: symmetry hides faults.  The default
batch is rectangular and its prompts are disjoint, so that each pair owns its tokens; ragged batches belong to the
checks about padding, shared prompts to the optimum.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from dpocheck.derive import NEVER, ONE_STEP, rows  # noqa: F401  (scenes offers them to the chapters)
from dpocheck.experiment import Body, Objective, Pair, Recipe, StepExperiment, Table, TrainExperiment
from dpocheck.oracle.theory import Theory
from dpocheck.probes.tokenizers import plain_words

SIZE = 64
SILENT = Body()
HALF = Objective(beta=0.5)
WORDS = plain_words(SIZE)


def generic(position: int) -> float:
    """A dyadic in (-2, 2), never zero, different at neighbouring positions."""
    return ((position * 37 + 11) % 61 - 30) / 16 or 1 / 32


def table(pairs: tuple[Pair, ...], salt: int, *, size: int = SIZE, scale: float = 1.0) -> Table:
    """Generic logits on every transition of the pairs, prompts included; zero elsewhere."""
    cells: dict[tuple[int, int], float] = {}
    for pair in pairs:
        for completion in (pair.chosen, pair.rejected):
            ids = pair.prompt + completion
            for context, target in pairwise(ids):
                cells.setdefault((context, target), scale * generic(17 * salt + 3 * len(cells)))
    return Table(size, 0.0, tuple((u, v, logit) for (u, v), logit in cells.items()))


def rectangular(count: int, *, prompt: int = 2, completion: int = 2) -> tuple[Pair, ...]:
    """`count` pairs with tokens of their own: prompts and completions of one length each, EOS at the end."""
    width = prompt + 2 * completion
    found = []
    for i in range(count):
        ids = tuple(range(i * width, (i + 1) * width))
        chosen, rejected = ids[prompt : prompt + completion], ids[prompt + completion :]
        found.append(Pair(ids[:prompt], (*chosen, WORDS.eos), (*rejected, WORDS.eos)))
    return tuple(found)


def ragged() -> tuple[Pair, ...]:
    """Unequal lengths everywhere; the longest prompt and the longest completion are in different rows, and the widest
    row of all is a rejected one."""
    shapes = ((1, 1, 3), (4, 2, 1), (2, 4, 2), (1, 2, 7), (3, 1, 2))
    found, start = [], 0
    for prompt, chosen, rejected in shapes:
        ids = range(start, start + prompt + chosen + rejected)
        start += len(ids)
        first, second = tuple(ids[prompt : prompt + chosen]), tuple(ids[prompt + chosen :])
        found.append(Pair(tuple(ids[:prompt]), (*first, WORDS.eos), (*second, WORDS.eos)))
    return tuple(found)


def step(pairs: tuple[Pair, ...], objective: Objective = HALF, **changes: object) -> StepExperiment:
    """One step on generic tables, policy and reference different."""
    made = StepExperiment(
        table(pairs, 1), table(pairs, 2), pairs, objective, pad=WORDS.pad, eos=WORDS.eos
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def run(
    pairs: tuple[Pair, ...], theory: Theory, recipe: Recipe | None = None, *, body: Body = SILENT, **changes: object
) -> TrainExperiment:
    """A run on the same, as text rows; by default one full-batch step with a rate that shows the gradient."""
    recipe = recipe or Recipe(Objective(beta=0.5), learning_rate=ONE_STEP, batch=len(pairs))
    made = TrainExperiment(
        table(pairs, 1), table(pairs, 2), WORDS, rows(pairs, SIZE, theory), recipe, body=body
    )
    return replace(made, **changes)  # type: ignore[arg-type]
