"""Which pairs form each step, how much does each micro-batch weigh, and at which rate is the step taken?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpocheck.experiment import Recipe
from dpocheck.oracle.theory import Theory

MicroBatch = tuple[int, ...]  # indices of pairs
Window = tuple[MicroBatch, ...]  # the micro-batches of one optimizer step


@dataclass(frozen=True)
class Plan:
    """One epoch's windows, repeated until `steps` are done; of all epochs, where windows run on over their end.

    `known`: the rows' order is determined.
    """

    windows: tuple[Window, ...]
    steps: int
    full: int  # micro-batches in a complete window
    known: bool

    def window(self, step: int) -> Window:
        """The micro-batches of optimizer step `step`, counted from 0."""
        return self.windows[step % len(self.windows)]


def plan(pairs: int, recipe: Recipe, theory: Theory) -> Plan:
    """The steps of a run over `pairs` pairs in the given order.

    With `world_size` ranks of `batch` pairs each, a step averages `accumulation * world_size` micro-batches.
    """
    indices = list(range(1 if theory.first_row == "dropped" else 0, pairs))
    if theory.ranks_tail == "repeated" and recipe.world_size > 1:
        indices += (indices * recipe.batch * recipe.world_size)[: -len(indices) % (recipe.batch * recipe.world_size)]
    batches = [tuple(indices[i : i + recipe.batch]) for i in range(0, len(indices), recipe.batch)]
    if batches and len(batches[-1]) < recipe.batch:
        if theory.last_batch == "dropped" or (theory.last_batch == "kept" and recipe.drop_last):
            batches.pop()
        elif theory.last_batch == "padded":
            batches[-1] = tuple(([*batches[-1]] + indices * recipe.batch)[: recipe.batch])
    full = (1 if theory.accumulation == "steps" else recipe.accumulation) * recipe.world_size
    windows = [tuple(batches[i : i + full]) for i in range(0, len(batches), full)]
    if windows and len(windows[-1]) < full and theory.incomplete_window == "carried":
        windows = _carried(windows, recipe)
        return Plan(tuple(windows), len(windows), full, _order_known(windows, pairs, recipe))
    if windows and len(windows[-1]) < full and theory.incomplete_window == "dropped":
        windows.pop()
    each = len(batches) // full if theory.incomplete_window == "full-divisor-ended" else 0
    steps = recipe.steps if recipe.steps is not None else (recipe.epochs or 0) * (each or len(windows))
    return Plan(tuple(windows), steps if windows else 0, full, _order_known(windows, pairs, recipe))


def _carried(windows: list[Window], recipe: Recipe) -> list[Window]:
    """The windows of all epochs, where what an epoch leaves incomplete is in the next epoch's first."""
    own, left = windows[:-1], windows[-1]
    if not own:  # nothing is ever complete, and no step is taken
        return []
    epochs = recipe.epochs or 1 if recipe.steps is None else -(-recipe.steps // len(own))
    later = [(*left, *own[0]), *own[1:]]
    return (own + later * (epochs - 1))[: recipe.steps]


def _order_known(windows: list[Window], pairs: int, recipe: Recipe) -> bool:
    """Shuffled rows are as good as ordered where each epoch is one step that weighs all pairs alike."""
    if not recipe.shuffle:
        return True
    whole = len(windows) == 1 and sum(len(batch) for batch in windows[0]) == pairs
    return whole and len({len(batch) for batch in windows[0]}) == 1


def weights(window: Window, plan_: Plan, theory: Theory) -> list[float]:
    """How much each micro-batch's gradient weighs in its step.  By default the mean of the micro-batches' means."""
    size = len(window)
    if theory.uneven == "pairs":
        total = sum(len(batch) for batch in window)
        shares = [len(batch) / total for batch in window]
    else:
        shares = [1.0 / size] * size
    if theory.incomplete_window in ("full-divisor", "full-divisor-ended", "carried"):
        shares = [share * size / plan_.full for share in shares]
    if theory.accumulation == "sum":
        return [share * size for share in shares]
    if theory.accumulation == "twice":
        return [share / size for share in shares]
    if theory.accumulation == "last":
        return [0.0] * (size - 1) + shares[-1:]
    return shares


def rate(step: int, steps: int, recipe: Recipe, theory: Theory) -> float:
    """The learning rate, in logits, of optimizer step `step`, counted from 0.

    Linear warm-up over `warmup_steps`, then constant, a line or half a cosine down to 0 at `steps`.
    """
    warmup = 0 if theory.first_rate == "skipped" else recipe.warmup_steps
    schedule = recipe.schedule if theory.schedule in ("asked", "micro-step") else theory.schedule
    if theory.schedule == "micro-step":
        step *= recipe.accumulation
    if step < warmup:
        if theory.first_rate == "shifted":
            return recipe.learning_rate * (step + 1) / (warmup + 1)
        return recipe.learning_rate * (step if theory.first_rate == "zero" else step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "constant":
        return recipe.learning_rate
    if schedule == "linear":
        return recipe.learning_rate * (1.0 - done)
    if schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown schedule {schedule!r}; known: constant, linear, cosine")
