"""How does a run go, from the first pair to the saved model?  The loop, on one page, top to bottom."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from reference_impl import checkpoint, dpo, processes, randomness
from reference_impl.artifact import save_final
from reference_impl.config import TrainConfig, check_folders, to_yaml
from reference_impl.evaluate import evaluate, judge_part
from reference_impl.files import write_text
from reference_impl.folder import close_folder, open_folder
from reference_impl.metrics import History, PairSums, Tracker, check_trackers, open_trackers
from reference_impl.optimize import clip_gradient, learning_rate
from reference_impl.order import Position, Window, parts, windows
from reference_impl.parallel import bring_back
from reference_impl.prepare import Run, prepare
from reference_impl.processes import Processes


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite."""


class Watcher(Protocol):
    """Told what happens in a run, for a screen."""

    def started(self, run: Run, first_step: int) -> None: ...

    def row(self, step: int, split: str, metrics: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """model: the policy after training, the object that was passed (inside its adapter, if one was added).
    history: rows of step, split and metrics.  checkpoints: step → folder.  final: the saved model's folder.
    stopped: SIGTERM ended the run early, after a checkpoint."""

    model: nn.Module
    history: list[dict[str, Any]]
    checkpoints: dict[int, Path]
    final: Path | None
    stopped: bool


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    reference: nn.Module | None = None,
    tokenizer: Any = None,
    train_rows: Any = None,
    eval_rows: Any = None,
    output_dir: str | Path | None = None,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Trains a policy by DPO or another objective of the config.

    What is not passed comes from the config.  A live model is trained in place, in the config's dtype.  Under torchrun
    every process calls this with the same arguments; the first one writes, and tells the watcher.

    Args:
        model, reference: causal LMs; without a reference it is a frozen copy of the policy as passed.
        train_rows: rows as dicts, a path, PairData or TokenPairs; eval_rows: the same, or name → the same.
        output_dir: overrides the config's.
        watcher: told about every row of the history.
    Raises:
        ConfigError, DataError, ModelError: before the first step; CheckpointError, TrainingError, DiskError,
        LostProcessError: later.
    """
    if output_dir is not None:
        config = replace(config, output_dir=str(output_dir))
    with processes.joined(config) as crew, randomness.seeded(config.seed):
        folder = crew.together(lambda: _folder(config, crew))
        try:
            found = crew.tell(crew.together(lambda: _found(config, crew, folder)))
            run = prepare(config, crew, folder, model, reference, tokenizer, train_rows, eval_rows)
        except BaseException:
            if folder is not None and crew.first:
                close_folder(folder)
            raise
        try:
            return _train(run, found and Path(found), watcher if crew.first else None)
        finally:
            run.close()


def _found(config: TrainConfig, crew: Processes, folder: Path | None) -> str | None:
    path = checkpoint.find_checkpoint(config, folder) if crew.first else None
    return None if path is None else str(path)


def _folder(config: TrainConfig, crew: Processes) -> Path | None:
    check_folders(config)
    check_trackers(config.trackers)
    if config.output_dir is None:
        return None
    return open_folder(config.output_dir) if crew.first else Path(config.output_dir)


def _train(run: Run, found: Path | None, watcher: Watcher | None) -> TrainResult:
    config, crew, total = run.config, run.crew, run.total_steps
    folder = run.folder if crew.first else None  # what one process writes

    # Where the run stands: at its beginning, or at a checkpoint of its own.
    state = checkpoint.State(0, Position(), [])
    if found is not None:
        state = checkpoint.load_checkpoint(found, run)
    history = crew.together(lambda: _history(run, folder, state, watcher))
    step, final, stopped, began = state.step, None, False, time.perf_counter()
    order = {"seed": config.seed, "shuffle": config.shuffle, "last_step": config.last_step}
    steps = windows(len(run.train.pairs), config.pairs_per_step, start=state.position, **order)

    with contextlib.closing(history), _Stop(enabled=run.folder is not None) as stop:
        if watcher is not None:
            watcher.started(run, step)
        if step == 0 and config.eval_at_start:
            _evaluate(run, 0, history)
        while step < total and not stopped:
            window = next(steps)
            metrics = optimizer_step(run, window, step)
            step += 1
            history.add(step, "train", metrics)
            if step == total or (config.eval_every and step % config.eval_every == 0):
                _evaluate(run, step, history)
            stopped = crew.any(stop.asked) and step < total  # once: a signal after this is seen after the next step
            if stopped or (config.save_every and (step == total or step % config.save_every == 0)):
                state = checkpoint.State(step, window.after, history.rows)
                checkpoint.save_checkpoint(run, state)
        if step == total:
            history.add(step, "summary", summary(history.rows, time.perf_counter() - began))
            if run.folder is not None:
                final = save_final(run, history.rows)
    bring_back(run.policy)
    kept = checkpoint.checkpoints(run.folder) if run.folder is not None else {}
    return TrainResult(run.policy.whole, history.rows, kept, final, stopped)


def _history(run: Run, folder: Path | None, state: checkpoint.State, watcher: Watcher | None) -> History:
    trackers = [Tracker(watcher.row)] if watcher else []
    if folder is not None:
        write_text(folder / "train_config.yaml", to_yaml(run.config))
    if run.crew.first:
        trackers = open_trackers(run.config, folder, state.step) + trackers
    return History(folder, state.history, trackers)


def optimizer_step(run: Run, window: Window, step: int) -> dict[str, float]:
    """One step on the pairs of a window, each process on its share, in micro-batches.

    Each micro-batch's loss is Σ losses / N with N the pairs of the *window*, so the gradients that add up are those of
    the mean over the window's pairs, whatever the sizes of its parts (dpo.mean_over_pairs).  Metrics are sums over the
    same pairs, divided by N once.
    """
    config, crew, began = run.config, run.crew, time.perf_counter()
    pairs_in_step, sums = len(window.indices), PairSums()
    run.optimizer.zero_grad(set_to_none=True)
    for part in parts(window.indices, config.batch, crew.rank, crew.world):
        losses, values = judge_part(run.policy, run.references.get("train"), run.train.pairs, part, config)
        dpo.mean_over_pairs(losses, pairs_in_step).backward()
        sums.add(values)

    norm = clip_gradient(run.optimizer, config.clip_norm)
    rate = learning_rate(config, step, run.total_steps)
    metrics = sums.means(crew) | {"grad_norm": norm, "learning_rate": rate}
    for name in ("loss", "grad_norm"):
        if not abs(metrics[name]) < float("inf"):
            rows = [run.train.pairs[index].row for index in window.indices]
            raise TrainingError(
                f"step {step + 1}: {name} is {metrics[name]}; the weights are left as they were before it. "
                f"Rows of the step: {rows[:20]}. Lower learning_rate, or look at these rows"
            )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    pairs = [run.train.pairs[index] for index in window.indices]
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    seconds = time.perf_counter() - began
    return metrics | {
        "epoch": window.after.epoch + window.after.consumed / len(run.train.pairs),
        "pairs": float(pairs_in_step),
        "tokens": float(tokens),
        "tokens/s": tokens / seconds,
        "pairs/s": pairs_in_step / seconds,
    }


def summary(rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """What the whole run comes to: the mean loss over all pairs seen, not over steps, and totals."""
    steps = [row["metrics"] for row in rows if row["split"] == "train"]
    pairs = sum(m["pairs"] for m in steps)
    return {
        "loss": sum(m["loss"] * m["pairs"] for m in steps) / pairs,
        "steps": float(len(steps)),
        "pairs": pairs,
        "tokens": sum(m["tokens"] for m in steps),
        "seconds": seconds,
    }


def _evaluate(run: Run, step: int, history: History) -> None:
    for name, data in run.held_out.items():
        history.add(step, name, evaluate(run.policy, run.references.get(name), data.pairs, run.config, run.crew))


class _Stop:
    """Turns SIGTERM into a question that the loop asks after each step, in the main thread and with a folder only."""

    def __init__(self, enabled: bool) -> None:
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Stop:
        if self._enabled:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            signal.signal(signal.SIGTERM, self._before)
