"""Does a whole run see every row, repeat, resume and save what it trained?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, scene, worst
from dpocheck.checks import scenes
from dpocheck.derive import STILL
from dpocheck.experiment import Objective, Pair, Recipe, Sequence
from dpocheck.oracle.theory import Theory
from dpocheck.reading import entries

HALF = Objective(beta=0.5)


def _same_digest(case: Case, what: str) -> Comparison:
    first, second = case.observed[0].runs[0], case.observed[0].runs[-1]
    if first.digest == second.digest:
        return Comparison("pass", error=0.0, bound=0.0)
    change = float("nan")
    if first.logits is not None and second.logits is not None:
        change = float(np.max(np.abs(first.logits - second.logits)))
    return Comparison(
        "fail", error=change, bound=0.0, observed=f"weights differ, logits by up to {change:.3g}",
        expected="the same bits", where=what,
    )  # fmt: skip


def _twice(theory: Theory) -> list:
    recipe = Recipe(HALF, learning_rate=8.0, batch=2, steps=6, shuffle=True, seed=7)
    run = scenes.run(scenes.rectangular(5), theory, recipe)
    return [scene("six shuffled steps, twice", Sequence((run, run)), family="replay")]


@check(
    "RUN-SAME-SEED", judges="same", chapter="runs",
    stage="run", level="should", needs={"sequence.digest"}, scenes=_twice,
    claim="The same recipe with the same seed gives the same bits.", source="reproducibility on one CPU",
    covers=("RUN-DETERMINISM", "RUN-SEED"), why="A difference between two settings can then be told from chance.",
    bug="A shuffle from a generator that nobody seeds.", fix="Derive the order from seed and epoch.",
)  # fmt: skip
def same_seed(case: Case) -> Comparison:
    return _same_digest(case, "the second run")


def resumed(theory: Theory, *, steps: int, at: int, shuffle: bool) -> Sequence:
    """A run with a checkpoint, and the same resumed from it; Adam, so that lost moments show.

    Eight steps at this rate move logits by about 1: far beyond rounding, and no margin is so large that its gradient
    vanishes, as it would whatever the rows then are.
    """
    recipe = Recipe(
        HALF, optimizer="adamw", learning_rate=2.0**9, epsilon=1e-8, batch=2, steps=steps, shuffle=shuffle, seed=3,
        save_every=at, schedule="linear",
    )  # fmt: skip
    whole = scenes.run(scenes.rectangular(6), theory, recipe)
    return Sequence((whole, replace(whole, recipe=replace(recipe, resume_from=at))))


def _resume(first: bool) -> object:
    def build(theory: Theory) -> list:
        steps, at = (3, 2) if first else (8, 5)
        return [
            scene(f"{steps} steps, {'shuffled' if shuffle else 'in order'}, resumed at {at}",
                  resumed(theory, steps=steps, at=at, shuffle=shuffle), family="resume")
            for shuffle in (False, True)
        ]  # fmt: skip

    return build


RESUME = {
    "judges": "same", "chapter": "runs", "stage": "run", "needs": {"sequence.digest"},
    "source": "a checkpoint holds the state of the run", "covers": ("RUN-RESUME",),
    "why": "Long runs are interrupted; what was resumed should be what was asked for.",
    "fix": "Save and restore model, optimizer, schedule, position in the data and random state; the reference is not "
    "the checkpoint.",
}  # fmt: skip


@check(
    "RUN-RESUME", level="must", scenes=_resume(True), bug="The reference re-loaded from the policy's checkpoint.",
    claim="A run that is resumed in its first epoch ends with the same bits as one that was not interrupted.", **RESUME,
)  # fmt: skip
def resume(case: Case) -> Comparison:
    return _same_digest(case, "the resumed run")


@check(
    "RUN-RESUME-EPOCH", level="must", scenes=_resume(False), bug="Data that start again at the first row.",
    claim="A run that is resumed in a later epoch ends with the same bits as one that was not interrupted.", **RESUME,
)  # fmt: skip
def resume_epoch(case: Case) -> Comparison:
    return _same_digest(case, "the resumed run")


def _coverage(theory: Theory) -> list:
    """In order, with a short last batch.  Shuffled, in batches of one, so that none is short: of eight rows that are
    drawn with replacement one goes unseen 399 times in 400."""
    plain = Recipe(HALF, learning_rate=8.0, batch=2, steps=None, epochs=1, seed=5)
    mixed = replace(plain, batch=1, shuffle=True)
    five = scenes.run(scenes.rectangular(5), theory, plain)
    return [
        scene("one epoch over five pairs, in order", five, family="epoch"),
        scene("the same from a JSONL file", replace(five, rows_on_disk=True), family="epoch"),
        scene("one epoch over eight pairs, shuffled", scenes.run(scenes.rectangular(8), theory, mixed), family="epoch"),
    ]


@check(
    "RUN-COVERAGE", chapter="runs", stage="run", level="must", needs={"train.logits"}, scenes=_coverage,
    claim="In one epoch every row is used once, but for a last short batch where the trainer drops it.",
    source="an epoch is one pass over the data", covers=("RUN-COVERAGE", "RUN-SHUFFLE"),
    why="Rows that are never seen are preferences that are never learned.",
    bug="HALOs gave every rank the same rows; open-instruct threw away the shuffled order.",
    fix="Let the order be a permutation of all rows.",
)  # fmt: skip
def coverage(case: Case) -> Comparison:
    start, seen = case.experiments[0].policy.logits(), case.observed[0].logits
    pairs = scenes.rectangular(len(case.experiments[0].rows))
    unused = [i for i, p in enumerate(pairs) if seen[p.prompt[-1], p.chosen[0]] == start[p.prompt[-1], p.chosen[0]]]
    allowed = len(pairs) % case.experiments[0].recipe.batch if case.theory.last_batch == "dropped" else 0
    if len(unused) > allowed:
        rows = ", ".join(str(i + 1) for i in unused)
        return Comparison("fail", observed=f"rows without any effect: {rows}", expected="every row used",
            error=len(unused), bound=allowed)
    told = Comparison("pass", error=float(len(unused)), bound=float(allowed))
    return told if case.experiments[0].recipe.shuffle else worst([told, agree(case, "logits")])


# ------------------------------------------------------------------------------------------------------- the order

ROWS = 8  # one order in 40 320: two are equal by chance as good as never
PROMPTS = (4, 1, 7, 2, 8, 3, 6, 5)  # tokens: a loop that sorts by length, after shuffling too, has one order


def _unequal() -> tuple[Pair, ...]:
    """Pairs of one token and EOS a side, after prompts of eight lengths."""
    eos, start, found = scenes.WORDS.eos, 0, []
    for length in PROMPTS:
        ids = tuple(range(start, start + length + 2))
        start += length + 2
        found.append(Pair(ids[:length], (ids[length], eos), (ids[length + 1], eos)))
    return tuple(found)


def _orders(theory: Theory) -> list:
    recipe = Recipe(HALF, learning_rate=STILL, batch=1, steps=2 * ROWS, shuffle=True, seed=11)
    first = scenes.run(_unequal(), theory, recipe)
    second = replace(first, recipe=replace(recipe, seed=12))
    plain = replace(first, recipe=replace(recipe, shuffle=False, steps=ROWS))
    return [scene("two epochs over eight rows with one seed, with another, and in order", first, second, plain,
        family="order")]


@check(
    "RUN-SHUFFLE", chapter="runs", stage="run", level="should", needs={"train.history.loss"}, scenes=_orders,
    claim="Shuffled rows come once in each epoch, in another order in each epoch and for each seed; without shuffling, "
    "as they stand.",
    source="an epoch is one pass over the data; the recipe", covers=("RUN-SHUFFLE", "RUN-SEED"),
    why="With one order in all epochs each batch is the same set of pairs, and so is every run of a sweep over seeds.",
    bug="open-instruct shuffled the data set and trained on the unshuffled one.",
    fix="Draw each epoch's permutation from seed and epoch, and use it.",
)  # fmt: skip
def shuffled(case: Case) -> Comparison:
    orders = [_order(case, index) for index in range(3)]
    first, second, plain = orders
    if any(order is None for order in orders) or None in plain:
        return Comparison("unknown", reason="the logged losses do not tell which row each step was on")
    epochs = {"first epoch": first[:ROWS], "second epoch": first[ROWS:], "first epoch with another seed": second[:ROWS]}
    in_order = list(range(ROWS))
    for name, order in epochs.items():
        if None in order:  # though in order every step's loss is that of a row
            return _rows_come("fail", f"{name}: the loss of step {order.index(None) + 1} is that of no row", order,
                "each row once")
        if sorted(order) != in_order:
            return _rows_come("fail", name, order, "each row once")
        if order == in_order:
            return _rows_come("fail", name, order, "another order than the data's")
    if epochs["first epoch"] in (epochs["second epoch"], epochs["first epoch with another seed"]):
        same = "second epoch" if first[:ROWS] == first[ROWS:] else "first epoch with another seed"
        return _rows_come("fail", same, epochs[same], "another order than in the first epoch")
    if plain != in_order:
        return _rows_come("fail", "run without shuffling", plain, "the data's order")
    seen = "; ".join(f"{name}: {' '.join(str(i + 1) for i in order)}" for name, order in epochs.items())
    return Comparison("pass", observed=f"rows in the {seen}")


def _rows_come(verdict: str, where: str, order: list[int | None], expected: str) -> Comparison:
    told = " ".join("?" if i is None else str(i + 1) for i in order)
    return Comparison(verdict, observed=f"rows {told}", expected=expected, where=where)


def _order(case: Case, index: int) -> list[int | None] | None:
    """Which row each step was on, by its loss, None where it is that of no row; the models stand still."""
    due = np.array(entries(case.predicted(2).history, "train", "loss"))
    noise = np.broadcast_to(np.asarray(case.bound("history.train.loss", 2), float), due.shape)
    seen = np.array(entries(case.observed[index].history, "train", "loss"))
    apart = np.abs(due[:, None] - due) > 2 * (noise[:, None] + noise)
    if len(seen) != case.experiments[index].recipe.steps or not np.all(apart | np.eye(len(due), dtype=bool)):
        return None
    distance = np.abs(seen[:, None] - due[None, :]) / noise
    nearest = zip(distance.argmin(axis=1), distance.min(axis=1), strict=True)
    return [int(row) if off <= 1.0 else None for row, off in nearest]


def _saved(theory: Theory) -> list:
    recipe = Recipe(HALF, learning_rate=8.0, batch=2, steps=2, save_every=1)
    return [scene("two steps, saved after each", scenes.run(scenes.rectangular(4), theory, recipe))]


@check(
    "RUN-SAVED", chapter="runs", stage="run", level="must", needs={"train.saved", "train.logits"}, scenes=_saved,
    claim="The checkpoint of the last step holds the trained policy.", source="a checkpoint is what is used later",
    covers=("RUN-SAVE",), why="What is evaluated and deployed is the file, not the model in memory.",
    bug="The reference saved instead of the policy; weights cast to bfloat16 on the way.",
    fix="Save the policy, in its own dtype.",
)  # fmt: skip
def saved(case: Case) -> Comparison:
    seen = case.observed[0]
    if 2 not in seen.saved:
        return Comparison("not-applicable", reason="no checkpoint of the last step is reported")
    change = float(np.max(np.abs(seen.saved[2] - seen.logits)))
    verdict = "fail" if change else "pass"
    return Comparison(verdict, error=change, bound=0.0, observed=f"logits differ by up to {change:.3g}",
        expected="the same bits")


def _evaluated(theory: Theory) -> list:
    recipe = Recipe(HALF, learning_rate=8.0, batch=2, steps=4, shuffle=True, seed=2, eval_batch=3)
    run = scenes.run(scenes.rectangular(5), theory, recipe)
    # Preferences that contradict the training: their loss grows, and the best evaluation is the first one.
    against = tuple(replace(row, chosen=row.rejected, rejected=row.chosen) for row in run.rows)
    held = replace(run, evaluation=(("held", against),), recipe=replace(recipe, eval_every=1))
    return [scene("four shuffled steps, without and with an evaluation after each", Sequence((run, held)),
        family="replay")]


@check(
    "EVAL-PURE", judges="same", chapter="runs",
    stage="run", level="must", needs={"sequence.digest"}, scenes=_evaluated,
    claim="An evaluation in between changes nothing in the training.", source="evaluation has no side effects",
    covers=("RUN-EVAL-PURE", "REF-RNG"), why="Two runs that differ in how often they are evaluated would differ.",
    bug="Evaluation that draws from the training's random numbers, or leaves the policy in eval mode; the weights of "
    "the best evaluation handed back where nobody asked for them.",
    fix="Restore mode and random state after evaluating; hand back what was trained.",
)  # fmt: skip
def eval_pure(case: Case) -> Comparison:
    return _same_digest(case, "the run with evaluations")
