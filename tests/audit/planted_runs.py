"""Which mistakes were planted around a trainer's runs?  Each class hands a right trainer one thing that is wrong, or
spoils one thing that comes back; the trainer inside is the miniature, or TRL where a test says so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpocheck.adapter import Probe, TrainOut
from dpocheck.miniature import MINIATURE


class Damaged:
    """A trainer that is right, seen through hooks that change nothing.  A subclass overrides one of them."""

    def __init__(self, inner: Any = MINIATURE) -> None:
        self.inner, self.says = inner, inner.says

    def train(self, probe: Probe, rows: Mapping[str, Any], recipe: Any, folder: Path) -> TrainOut:
        rows = {name: self.rows(name, list(held)) if isinstance(held, list) else held for name, held in rows.items()}
        done = self.inner.train(self.models(probe), rows, self.recipe(recipe), folder)
        return self.out(done, probe)

    def rows(self, name: str, rows: list[dict]) -> list[dict]:
        return rows

    def models(self, probe: Probe) -> Probe:
        return probe

    def recipe(self, recipe: Any) -> Any:
        return recipe

    def out(self, done: TrainOut, probe: Probe) -> TrainOut:
        return done


def _loading(probe: Probe, load: Any) -> Probe:
    return replace(probe, load=load)


def _logged(done: TrainOut, change: Any) -> TrainOut:
    return replace(done, history=[dict(entry, metrics=change(dict(entry["metrics"]))) for entry in done.history])


# --------------------------------------------------------------------------------------------------------------- rows


class SwapsEveryThirdRow(Damaged):
    def rows(self, name, rows):
        swap = lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]}  # noqa: E731
        return [swap(row) if number % 3 == 2 else row for number, row in enumerate(rows)]


class DropsRepeatedRows(Damaged):
    def rows(self, name, rows):
        return [row for number, row in enumerate(rows) if row not in rows[:number]]


class SortsByLength(Damaged):
    def rows(self, name, rows):
        return sorted(rows, key=lambda row: len(str(row["rejected"])))


class DropsTheLongerChosen(Damaged):
    def rows(self, name, rows):
        return [row for row in rows if len(str(row["chosen"])) <= len(str(row["rejected"]))] or rows[:1]


class StripsText(Damaged):
    def rows(self, name, rows):
        return [{k: v.strip() if isinstance(v, str) else v for k, v in row.items()} for row in rows]


class LosesThePrompt(Damaged):
    """The prompt's last word alone is kept, as a window that is too short would."""

    def rows(self, name, rows):
        return [row | {"prompt": row["prompt"].split(" ")[-1]} if isinstance(row.get("prompt"), str) else row
                for row in rows]  # fmt: skip


class LastRowTwice(Damaged):
    def rows(self, name, rows):
        return [*rows, rows[-1]] if name == "train" else rows


class EvaluatesOnAnother(Damaged):
    """Every evaluation set is measured without its first row."""

    def rows(self, name, rows):
        return rows if name == "train" else rows[1:]


# ------------------------------------------------------------------------------------------------------------- recipe


class ScalesTheRate(Damaged):
    """The learning rate is multiplied by the number of pairs in a batch, undocumented."""

    def recipe(self, recipe):
        return replace(recipe, learning_rate=recipe.learning_rate * recipe.batch)


class OneStepTooMany(Damaged):
    def recipe(self, recipe):
        return replace(recipe, steps=recipe.steps + 1) if recipe.steps else recipe


class BatchForAccumulation(Damaged):
    def recipe(self, recipe):
        return replace(recipe, batch=recipe.accumulation, accumulation=recipe.batch)


class BetasExchanged(Damaged):
    def recipe(self, recipe):
        return replace(recipe, betas=recipe.betas[::-1])


class WarmsUpUnasked(Damaged):
    def recipe(self, recipe):
        return replace(recipe, warmup_steps=recipe.warmup_steps or 2)


class BetaOfTheRun(Damaged):
    """A beta below 0.2 is taken for a mistake and raised."""

    def recipe(self, recipe):
        return replace(recipe, objective=replace(recipe.objective, beta=max(recipe.objective.beta, 0.75)))


# ------------------------------------------------------------------------------------------------------------- models


class StartsFromTheReference(Damaged):
    def models(self, probe):
        if probe.reference_path is None:
            return probe
        return _loading(
            probe, lambda what: copy.deepcopy(probe.load("reference")) if what == "policy" else probe.load(what)
        )


class ModelsExchanged(Damaged):
    def models(self, probe):
        if probe.reference_path is None:
            return probe
        other = {"policy": "reference", "reference": "policy"}
        return _loading(probe, lambda what: probe.load(other.get(what, what)))


class ReferenceShaken(Damaged):
    """The reference's head is multiplied by 0.97, as a lossy quantisation would leave it."""

    def models(self, probe):
        def load(what):
            model = probe.load(what)
            if what == "reference":
                model.lm_head.weight.data.mul_(0.97)
            return model

        return _loading(probe, load)


class HeadScaled(Damaged):
    def models(self, probe):
        def load(what):
            model = probe.load(what)
            if what == "policy":
                model.lm_head.weight.data.mul_(1.02)
            return model

        return _loading(probe, load)


class KeepsTheStart(Damaged):
    def models(self, probe):
        self.start = copy.deepcopy(probe.policy())
        return probe


class ReturnsTheAverage(KeepsTheStart):
    """What comes back is half way between the start and the end."""

    def out(self, done, probe):
        start = self.start.state_dict()
        for name, value in done.policy.state_dict().items():
            value.mul_(0.5).add_(start[name], alpha=0.5)
        return done


class ReturnsTheStart(KeepsTheStart):
    def out(self, done, probe):
        return replace(done, policy=self.start)


# ------------------------------------------------------------------------------------------------------------ history


class LogsOneStepLate(Damaged):
    """Every entry carries the loss of the entry before it."""

    def out(self, done, probe):
        entries, kept = [], None
        for entry in done.history:
            metrics = dict(entry["metrics"])
            if entry["split"] == "train" and "loss" in metrics:
                metrics["loss"], kept = metrics["loss"] if kept is None else kept, metrics["loss"]
            entries.append(dict(entry, metrics=metrics))
        return replace(done, history=entries)


class AccuracyInPercent(Damaged):
    def out(self, done, probe):
        key = "rewards/accuracies"
        return _logged(done, lambda m: m | {key: 100 * m[key]} if key in m else m)


class MarginHalved(Damaged):
    def out(self, done, probe):
        key = "rewards/margins"
        return _logged(done, lambda m: m | {key: 0.5 * m[key]} if key in m else m)


class LogpsPerPairSummed(Damaged):
    def out(self, done, probe):
        key = "logps/chosen"
        return _logged(done, lambda m: m | {key: 2 * m[key]} if key in m else m)


class SmoothedLoss(Damaged):
    """The loss is a running mean, as a progress bar shows it."""

    def out(self, done, probe):
        mean, entries = None, []
        for entry in done.history:
            metrics = dict(entry["metrics"])
            if entry["split"] == "train" and "loss" in metrics:
                mean = metrics["loss"] if mean is None else 0.5 * mean + 0.5 * metrics["loss"]
                metrics["loss"] = mean
            entries.append(dict(entry, metrics=metrics))
        return replace(done, history=entries)
