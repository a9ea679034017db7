"""What is refused before several processes train, and do they refuse it as one?

Run alone: pytest tests/reference/test_ranks_input.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_ranks import join, one_thread, start
from trainer_tiny import gpt2, llama, pairs, rows, save

from reference_impl import TrainConfig, cli, processes, train
from reference_impl.config import ConfigError
from reference_impl.data import DataError
from reference_impl.models import ModelError

CPU = TrainConfig(device="cpu")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "more processes than pairs in a step": (
        8, {"batch": 3, "accumulation": 2},
        "8 processes were started, but an optimizer step has batch × accumulation = 6 pairs: start at most 6"),
    "groups that do not come out even": (
        6, {"shard": 4, "batch": 6}, "shard is 4, which does not divide 6 processes: allowed are 1, 2, 3, 6"),
    "groups of one process": (1, {"shard": 2}, "shard=2 has no effect: there is one process"),
    "offload of one process": (1, {"cpu_offload": True}, "cpu_offload=True has no effect: there is one process"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_so_many_processes_cannot_have(name: str) -> None:
    world, settings, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        processes.check(TrainConfig(**settings), world)
    assert message in str(caught.value)


def test_groups_of_zero_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="shard is 0, but should be at least 1"):
        TrainConfig(shard=0)


@pytest.mark.parametrize("said", ["two", "0", "-1", ""])
def test_number_of_processes_that_is_none_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(ConfigError, match="should be a number of processes: start them with torchrun"):
        train(TrainConfig(), model=llama(), train_rows=pairs(4))


@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_one_device_for_all_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"device is '{device}', but each of 2 processes has its own"):
        train(TrainConfig(device=device), model=llama(), train_rows=pairs(4))


def refusals(tmp_path: Path, action: Any, kind: type[Exception]) -> list[str]:
    """The messages of two processes that both raise an error of this kind."""

    def act(rank: int) -> None:
        with pytest.raises(kind) as caught:
            action(rank)
        (tmp_path / f"error-{rank}").write_text(str(caught.value))

    assert join(start(2, act, tmp_path)) == [0, 0], [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(2)]
    return [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]


def test_settings_that_differ_between_processes(tmp_path: Path) -> None:
    def action(rank: int) -> None:
        train(TrainConfig(beta=0.1 + rank, device="cpu"), model=llama(), train_rows=pairs(4))

    errors = refusals(tmp_path, action, ConfigError)
    assert errors[0] == errors[1] == (
        "the processes have different settings: beta is 0.1 in process 0 and 1.1 in process 1: "
        "start all with one command"
    )


def test_rows_that_differ_between_processes(tmp_path: Path) -> None:
    errors = refusals(tmp_path, lambda rank: train(CPU, model=llama(), train_rows=pairs(4, rank)), DataError)
    assert errors[0] == errors[1] == "train of process 1 is not that of process 0: give all processes the same"


def test_models_that_differ_between_processes(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "out"), device="cpu")
    errors = refusals(tmp_path, lambda rank: train(config, model=llama(rank), train_rows=pairs(4)), ModelError)
    assert errors[0] == errors[1] == "policy of process 1 is not that of process 0: give all processes the same"


def test_error_of_one_process_is_every_process_s_error(tmp_path: Path) -> None:
    """The second cannot read the file; the first, which can, does not wait for it."""
    (tmp_path / "train-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    save(tmp_path / "m")

    def action(rank: int) -> None:
        os.chdir(tmp_path)
        if rank == 0:
            os.symlink("train-0.jsonl", "train.jsonl")
        else:
            os.chdir("/")
        train(TrainConfig(model=str(tmp_path / "m"), train="train.jsonl", device="cpu"))

    errors = refusals(tmp_path, action, DataError)
    assert errors[0] == errors[1]
    assert "train.jsonl" in errors[0]


def test_loss_that_is_not_finite_stops_all_with_one_message(tmp_path: Path) -> None:
    """Only the first process's share of the step has the pair with it."""
    from reference_impl.training import TrainingError

    def action(rank: int) -> None:
        model = gpt2(dtype=torch.float32)
        model.transformer.wte.weight.data[31] = 3e38
        wild = [p for p in pairs(40) if 31 in p.prompt + p.chosen + p.rejected][:1]
        tame = [p for p in pairs(40) if 31 not in p.prompt + p.chosen + p.rejected][:3]
        train(TrainConfig(shuffle=False, device="cpu"), model=model, train_rows=wild + tame)

    errors = refusals(tmp_path, action, TrainingError)
    assert errors[0] == errors[1]
    assert "the weights are left as they were before it" in errors[0]


@pytest.mark.long
def test_torchrun_says_one_line_and_one_process_speaks(tmp_path: Path) -> None:
    """The command itself: refused with one line; then trained, the first process alone writing and speaking."""
    base = save(tmp_path / "m")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "reference_impl",
               f"model={base}", f"train={tmp_path / 'train.jsonl'}", f"output_dir={tmp_path / 'o'}",
               "device=cpu"]  # fmt: skip

    def ask(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=500)

    refused = ask("batch=1")
    assert refused.returncode != 0
    assert [line for line in refused.stderr.splitlines() if line.startswith("dpo-train:")] == [
        "dpo-train: 2 processes were started, but an optimizer step has batch × accumulation = 1 pairs: "
        "start at most 1, or raise batch or accumulation"
    ]
    done = ask("steps=2", "batch=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("DPO step 1/2") for line in lines) == 1
    assert lines[-1] == f"model: {tmp_path / 'o' / 'final'}"
    steps = [json.loads(line)["step"] for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]


def test_single_process_of_torchrun_is_a_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As WORLD_SIZE=1 is what torchrun sets for one."""
    base = save(tmp_path / "m")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    given = [f"model={base}", f"train={tmp_path / 'train.jsonl'}", f"output_dir={tmp_path / 'o'}", "steps=1"]
    assert cli.run(given) == 0
    assert not torch.distributed.is_initialized()
    assert (tmp_path / "o" / "final" / "model.safetensors").is_file()
