"""Which further experiments is a fixed one an example of?  The same scene with other numbers.

What a scene is about, its lengths, texts, batches and options, stays; the logits of its tables, beta and the seeds are
drawn.  Tables that are equal stay equal, so that a reference that is the policy remains it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from dpocheck.experiment import LossExperiment, Row, Sequence, Table, TrainExperiment
from dpocheck.strategies.choose import choose, generic

STARTS = tuple(range(126))  # in the list of numbers
SCALES = (1.0, 0.5, 2.0, 0.25)  # of beta
TURN = 31  # between the starts of two tables of one scene; coprime to the period of the numbers


def renumbered(scenes: Iterable[tuple[Any, ...]]) -> st.SearchStrategy[tuple[Any, ...]]:
    """One of the tuples of experiments, with other numbers in it.  Raises ValueError without any.

    Experiments of four log-probs are left as they are: relations between them are the checks' own.
    """
    return st.tuples(choose(*scenes), choose(*STARTS), choose(*SCALES), choose(*range(8))).map(
        lambda drawn: _Renumbering(*drawn[1:]).all(drawn[0])
    )


class _Renumbering:
    """One choice of numbers, applied alike to all experiments of a scene."""

    def __init__(self, start: int, scale: float, seed: int) -> None:
        self.start, self.scale, self.seed = start, scale, seed
        self.tables: dict[Table, Table] = {}

    def all(self, experiments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self.one(experiment) for experiment in experiments)

    def one(self, experiment: Any) -> Any:
        if isinstance(experiment, LossExperiment):
            return experiment
        if isinstance(experiment, Sequence):
            return replace(experiment, runs=self.all(experiment.runs))
        if not isinstance(experiment, TrainExperiment):
            names = ("table",) if hasattr(experiment, "table") else ("policy", "reference")
            changes = {name: self.table(getattr(experiment, name)) for name in names}
            if hasattr(experiment, "objective"):
                changes["objective"] = self.objective(experiment.objective)
            return replace(experiment, **changes)
        recipe = replace(experiment.recipe, seed=experiment.recipe.seed + 16 * self.seed)
        if experiment.policy is None:  # an ordinary small model: it has no numbers to draw, so its words are
            held = tuple((name, self.words(rows, experiment)) for name, rows in experiment.evaluation)
            return replace(experiment, rows=self.words(experiment.rows, experiment), evaluation=held, recipe=recipe)
        tables = {name: self.table(getattr(experiment, name)) for name in ("policy", "reference", "edited")}
        return replace(experiment, recipe=replace(recipe, objective=self.objective(recipe.objective)), **tables)

    def objective(self, asked: Any) -> Any:
        return replace(asked, beta=asked.beta * self.scale)

    def table(self, old: Table | None) -> Table | None:
        """Up to half a nat is added to each cell that has a logit of its own."""
        if old is None:
            return None
        if old not in self.tables:
            first = self.start + TURN * len(self.tables)
            cells = tuple((u, v, logit + generic(first + i) / 4) for i, (u, v, logit) in enumerate(old.entries))
            self.tables[old] = Table(old.size, old.base, cells)
        return self.tables[old]

    def words(self, rows: tuple[Row, ...], run: TrainExperiment) -> tuple[Row, ...]:
        """Rows of plain words, each word exchanged for the one `start` places on."""
        known = run.tokenizer.words
        turned = {word: known[(i + self.start) % len(known)] for i, word in enumerate(known)}

        def text(old: Any) -> Any:
            return " ".join(turned.get(word, word) for word in old.split(" ")) if isinstance(old, str) else old

        return tuple(Row(text(row.prompt), text(row.chosen), text(row.rejected)) for row in rows)
