"""What was measured over many pairs, exactly?  Sums and counts, divided once.

A mean over pairs is Σ value / Σ 1 over all micro-batches and all processes, never a mean of means, so it does not
depend on how the pairs were split.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_impl.config import ConfigError, TrainConfig
from reference_impl.files import append_text, write_text
from reference_impl.processes import ALONE, Processes


class PairSums:
    """Adds up per-pair values, in float64 on their own device: no synchronisation until the end."""

    def __init__(self) -> None:
        self.pairs = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """values: name → (pair,), the same names and number of pairs in each call's dict."""
        self.pairs += len(next(iter(values.values())))
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def means(self, crew: Processes = ALONE) -> dict[str, float]:
        """The means over the pairs of all processes."""
        if crew.world == 1:
            return {name: total.item() / self.pairs for name, total in self._sums.items()}
        totals = torch.stack(list(self._sums.values()))
        pairs, *totals = crew.add(torch.cat([totals.new_tensor([self.pairs]), totals])).tolist()
        return {name: total / pairs for name, total in zip(self._sums, totals, strict=True)}


class History:
    """The rows of a run, in memory and, with a folder, as one line each in metrics.jsonl.

    A row is {"step": …, "split": 'train', a held-out set's name or 'summary', "metrics": {name: number}}.
    """

    def __init__(self, folder: Path | None, rows: list[dict[str, Any]], trackers: list[Tracker]) -> None:
        self.rows = list(rows)
        self._trackers = trackers
        self._path = folder / "metrics.jsonl" if folder is not None else None
        if self._path is not None:
            # Rows after the checkpoint that a run continues from belong to steps that will be made again.
            write_text(self._path, "".join(to_line(row) for row in self.rows))

    def add(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Raises DiskError: the disk is full or gone."""
        row = {"step": step, "split": split, "metrics": metrics}
        self.rows.append(row)
        if self._path is not None:
            append_text(self._path, to_line(row))
        for tracker in self._trackers:
            tracker.row(step, split, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


@dataclass(frozen=True)
class Tracker:
    """Something else that is told every row, and when there are no more."""

    row: Callable[[int, str, dict[str, float]], None]
    close: Callable[[], object] = lambda: None


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trackers has {name}, but {name} is not installed: pip install {name}, or leave it out")


def open_trackers(config: TrainConfig, folder: Path | None, first_step: int) -> list[Tracker]:
    """TensorBoard and Weights & Biases, where asked for (check_trackers first)."""
    known = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [known[name](folder, dataclasses.asdict(config), first_step) for name in config.trackers]


def _tensorboard(folder: Path, settings: dict[str, Any], first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Steps after the checkpoint that a run continues from will be made again.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{split}/{name}", value, step)
        writer.flush()

    return Tracker(track, writer.close)


def _wandb(folder: Path, settings: dict[str, Any], first_step: int) -> Tracker:
    import wandb

    run = wandb.init(dir=str(folder), config=settings)

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        # Evaluation and training rows of one step share it; wandb refuses a step that goes back.
        run.log({f"{split}/{name}": value for name, value in metrics.items()} | {"step": step})

    return Tracker(track, run.finish)


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON.  NaN and infinity, which JSON has not, become strings, so that anything can read it."""
    metrics = {k: v if v == v and abs(v) != float("inf") else str(v) for k, v in row["metrics"].items()}
    return json.dumps({**row, "metrics": metrics}, allow_nan=False) + "\n"


def from_line(line: str) -> dict[str, Any]:
    """The row that to_line wrote."""
    row = json.loads(line)
    return {**row, "metrics": {name: float(value) for name, value in row["metrics"].items()}}
