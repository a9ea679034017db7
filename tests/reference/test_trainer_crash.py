"""Is a run that is killed at any moment, or that runs out of disk, continued with nothing lost?

Run alone: pytest tests/reference/test_trainer_crash.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_crash import SETTINGS, in_child, kill_at, limit_file_size, train_in
from trainer_tiny import llama, numbers, pairs, rows, save

from reference_impl import TrainConfig, cli, train
from reference_impl.checkpoint import CheckpointError
from reference_impl.files import check_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would hang
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_in(folder)
    return folder


def same_end(folder: Path, expected: Path) -> bool:
    left, right = (load_file(f / "final" / "model.safetensors") for f in (folder, expected))
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (folder, expected)]
    rows = [numbers([json.loads(line) for line in some]) for some in lines]
    return all(torch.equal(left[name], right[name]) for name in right) and rows[0] == rows[1]


def newest_step(folder: Path) -> int:
    """Of the whole checkpoints; a folder with a checkpoint's name that is not whole is an error."""
    steps = [0]
    for path in folder.glob("checkpoint-*"):
        steps.append(check_folder(path)["step"])
    return max(steps)


def operations(folder: Path) -> int:
    """How many file operations a whole run makes: the smallest n at which nothing is killed any more, by bisection."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high) // 2
        target = folder / str(middle)
        killed = in_child(lambda n=middle, t=target: (kill_at(n, t), train_in(t))) == -signal.SIGKILL
        low, high = (middle + 1, high) if killed else (low, middle)
        shutil.rmtree(target, ignore_errors=True)
    return low - 1


@needs_fork
@pytest.mark.long
def test_killed_at_every_file_operation_it_goes_on_bit_for_bit(tmp_path: Path, uninterrupted: Path) -> None:
    """Every crash point of a run with three checkpoints, two of them kept, in turn; then the same command again."""
    total = operations(tmp_path)
    assert total > 100  # the hook sees the run
    lost = []
    for n in range(1, total + 1):
        folder = tmp_path / "run"
        code = in_child(lambda n=n, f=folder: (kill_at(n, f), train_in(f)))
        assert code == -signal.SIGKILL, n
        if folder.exists():
            newest_step(folder)
        assert in_child(lambda f=folder: train_in(f)) == 0, n
        if not same_end(folder, uninterrupted):
            lost.append(n)
        assert not [p for p in folder.iterdir() if p.name.startswith((".writing", ".removing"))], n
        shutil.rmtree(folder)
    assert lost == []


@needs_fork
def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(tmp_path: Path, uninterrupted: Path) -> None:
    """A sample of the test above that takes seconds: 12 crash points spread over the run."""
    for n in range(5, 245, 20):
        folder = tmp_path / str(n)
        in_child(lambda n=n, f=folder: (kill_at(n, f), train_in(f)))
        assert in_child(lambda f=folder: train_in(f)) == 0
        assert same_end(folder, uninterrupted), n


@needs_fork
@pytest.mark.long
def test_killed_at_twenty_random_moments_it_goes_on_bit_for_bit(tmp_path: Path, uninterrupted: Path) -> None:
    began = time.monotonic()
    in_child(lambda: train_in(tmp_path / "timed"))
    whole = time.monotonic() - began
    draw, killed = random.Random(0), 0
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:
            try:
                train_in(folder)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.1, 0.95) * whole)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert in_child(lambda f=folder: train_in(f)) == 0
        assert same_end(folder, uninterrupted), attempt
    assert killed >= 10


@needs_fork
def test_sigterm_saves_and_ends_and_the_run_goes_on_bit_for_bit(tmp_path: Path, uninterrupted: Path) -> None:
    """The signal comes during step 3, between two checkpoints; nothing is lost, not even that step."""

    class Watcher:
        def started(self, *_: Any) -> None: ...

        def row(self, step: int, split: str, metrics: dict[str, float]) -> None:
            if step == 3 and split == "train":
                os.kill(os.getpid(), signal.SIGTERM)

    def action() -> None:
        config = TrainConfig(**{**SETTINGS, "output_dir": str(tmp_path)})
        result = train(config, model=llama(), train_rows=pairs(10), eval_rows={"held": pairs(3, 1)}, watcher=Watcher())
        assert result.stopped
        assert result.final is None
        assert list(result.checkpoints) == [2, 3]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    assert in_child(action) == 0
    assert newest_step(tmp_path) == 3
    assert in_child(lambda: train_in(tmp_path)) == 0
    assert same_end(tmp_path, uninterrupted)


class FullDisk:
    """A watcher that lets no file grow beyond `allowed` bytes from a step on."""

    def __init__(self, step: int, allowed: int) -> None:
        self.step, self.allowed = step, allowed

    def started(self, *_: Any) -> None: ...

    def row(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if step == self.step and split == "train":
            limit_file_size(self.allowed)


@needs_fork
@pytest.mark.parametrize("allowed", [6000, 20000, 40000])
def test_full_disk_leaves_earlier_checkpoints_whole_and_nothing_half_written(
    allowed: int, tmp_path: Path, uninterrupted: Path
) -> None:
    """Limits below the tokens of history and weights (22 kB) and of optimizer (44 kB): other writers fail."""

    def action() -> None:
        config = TrainConfig(**{**SETTINGS, "output_dir": str(tmp_path)})
        held = {"held": pairs(3, 1)}
        with pytest.raises(CheckpointError, match="could not be written") as caught:
            train(config, model=llama(), train_rows=pairs(10), eval_rows=held, watcher=FullDisk(4, allowed))
        assert "run the same command" in str(caught.value)

    assert in_child(action) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["checkpoint-00000002"]
    assert newest_step(tmp_path) == 2
    assert in_child(lambda: train_in(tmp_path)) == 0
    assert same_end(tmp_path, uninterrupted)


@needs_fork
@pytest.mark.parametrize("file", ["data_report.train.json", "train_config.yaml", "metrics.jsonl"])
def test_full_disk_under_a_small_file_is_one_line_and_leaves_no_half_of_it(file: str, tmp_path: Path) -> None:
    """They are written in this order and each is larger than the one before: less room than it needs meets it."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    save(tmp_path / "m")
    given = [f"model={tmp_path / 'm'}", f"train={tmp_path / 'train.jsonl'}", "steps=6"]
    assert in_child(lambda: cli.run([*given, f"output_dir={tmp_path / 'a'}"])) == 0
    needed = [(tmp_path / "a" / name).stat().st_size for name in ("data_report.train.json", "train_config.yaml", file)]
    assert needed == sorted(needed) or file == "data_report.train.json"
    # Speeds are logged with as many digits as they have, so that a history's size differs from run to run.
    limit = max(needed[1] + 1, needed[2] * 3 // 4) if file == "metrics.jsonl" else needed[2] - 1

    def action() -> None:
        with io.StringIO() as said, contextlib.redirect_stderr(said):
            limit_file_size(limit)
            assert cli.run([*given, f"output_dir={tmp_path / 'b'}"]) == 1
            lines = [line for line in said.getvalue().splitlines() if line.startswith("dpo-train: ")]
        assert len(lines) == 1
        assert f"{file} could not be written (File too large): make room, run the same command" in lines[0]

    assert in_child(action) == 0
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.startswith(".writing")]
    if file == "metrics.jsonl":
        whole, left = ((tmp_path / name / file).read_text().splitlines() for name in ("a", "b"))
        assert [json.loads(line)["step"] for line in left] == [json.loads(line)["step"] for line in whole][: len(left)]
        assert 0 < len(left) < len(whole)
    else:
        assert not (tmp_path / "b" / file).exists()
