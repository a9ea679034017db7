"""Do the tokens that are scored spell the rows that were given?"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.check import Case, Comparison, agree, check, scene
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Recipe, Row, Tokenizer, TrainExperiment
from dpocheck.oracle.theory import PAPER

LETTERS = Tokenizer(tuple("abcdefgh "), 64, kind="characters")


def dense(salt: int) -> scenes.Table:
    """Generic logits between all the letters, EOS included."""
    used = [*range(len(LETTERS.words)), LETTERS.eos]
    cells = [(u, v) for u in used for v in used]
    return scenes.Table(64, 0.0, tuple((u, v, scenes.generic(29 * salt + i)) for i, (u, v) in enumerate(cells)))


def letters(*rows: Row, **changes: object) -> TrainExperiment:
    """One full-batch step on rows of single letters: every character is a token, a space too."""
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=len(rows))
    return replace(TrainExperiment(dense(1), dense(2), LETTERS, rows, recipe), **changes)  # type: ignore[arg-type]


@check(
    "ROWS-ROUND-TRIP", chapter="rows", stage="tokens", level="must", needs={"train.gradient"},
    scenes=[
        scene("no prompt column, no shared start, chosen ends with a space",
              letters(Row(None, "ab ", "cd")), family="implicit prompt"),
        scene("no prompt column, a shared start", letters(Row(None, "efab", "efcd")), family="implicit prompt"),
    ],
    rivals=(PAPER.but(prefix="loses-shared"),),
    claim="Prompt + chosen and prompt + rejected spell the two texts of the row, character by character.",
    source="the row as the dataset gives it", covers=("RUN-TOK-BOUNDARY",),
    why="A lost or invented character is trained into every completion.",
    bug="TRL 0.12 to 1.16, extract_prompt: 'Paris ' and 'London' give the prompt 'Paris', chosen ' ', rejected 'n'.",
    fix="Take the longest common prefix; where there is none the prompt is empty.",
)  # fmt: skip
def round_trip(case: Case) -> Comparison:
    return agree(case, "gradient")
