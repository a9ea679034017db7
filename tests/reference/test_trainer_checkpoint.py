"""Does a run that is continued equal the run that was never stopped, bit for bit?

Run alone: pytest tests/reference/test_trainer_checkpoint.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainer_tiny import gpt2, llama, numbers, pairs, same_bits, state

from reference_impl import LoraSettings, TrainConfig, train
from reference_impl.checkpoint import CheckpointError
from reference_impl.config import ConfigError
from reference_impl.folder import close_folder, open_folder

BASE = {"steps": 6, "batch": 2, "accumulation": 2, "save_every": 1, "learning_rate": 1e-2}
KINDS = {
    "adamw, linear": {"warmup_steps": 2},
    "sgd with momentum, cosine": {"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine"},
    "adapter": {"lora": LoraSettings(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))},
    "precomputed reference": {"reference_logps": "precomputed"},
    "bf16 with checkpointing": {"dtype": "bf16", "gradient_checkpointing": True},
    "fp64, epochs": {"dtype": "fp64", "steps": None, "epochs": 2},
}


def run(folder: Path, model: Any = None, data: Any = None, reference: Any = None, **settings: Any) -> Any:
    return train(
        TrainConfig(**{**BASE, **settings}),
        model=model or llama(),
        reference=reference,
        train_rows=data or pairs(10),
        eval_rows={"held": pairs(3, 1)},
        output_dir=folder,
    )


def trained_state(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{file.name} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_any_step_equals_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    """Weights, optimizer, generators and history, from every checkpoint into a folder of its own."""
    settings = KINDS[kind]
    whole = run(tmp_path / "whole", eval_every=2, **settings)
    last = max(whole.checkpoints)
    assert list(whole.checkpoints) == list(range(1, last + 1))
    for step, path in whole.checkpoints.items():
        again = run(tmp_path / f"from-{step}", eval_every=2, resume=str(path), **settings)
        assert same_bits(state(whole.model), state(again.model)), step
        assert numbers(again.history) == numbers(whole.history), step
        if step < last:
            left, right = (trained_state(r.checkpoints[last]) for r in (whole, again))
            assert same_bits(left, right), step


def test_interrupted_folder_goes_on_by_itself(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    run(interrupted)
    for step in (5, 6):
        shutil.rmtree(interrupted / f"checkpoint-{step:08d}")
    shutil.rmtree(interrupted / "final")
    again = run(interrupted)
    assert same_bits(state(whole.model), state(again.model))
    lines = [json.loads(line) for line in (interrupted / "metrics.jsonl").read_text().splitlines()]
    assert numbers(lines) == numbers(whole.history)  # each row once, though steps 5 and 6 were made twice


def test_resume_may_split_steps_otherwise(tmp_path: Path) -> None:
    """Four pairs a step as 2 × 2, then 1 × 4: the same pairs in the same steps, float64 rounding apart."""
    whole = run(tmp_path / "a", gpt2(), dtype="fp64")
    other = run(tmp_path / "b", gpt2(), dtype="fp64", batch=1, accumulation=4, resume=str(whole.checkpoints[3]))
    for (_, _, left), (_, _, right) in zip(numbers(whole.history), numbers(other.history), strict=True):
        assert left == pytest.approx(right, rel=1e-9, abs=1e-10)


def test_held_out_set_may_be_added_when_a_run_is_continued(tmp_path: Path) -> None:
    first = train(TrainConfig(**BASE), model=llama(), train_rows=pairs(10), output_dir=tmp_path / "a")
    again = run(tmp_path / "b", resume=str(first.checkpoints[2]))
    assert same_bits(state(first.model), state(again.model))


def test_history_with_infinite_numbers_survives_as_json(tmp_path: Path) -> None:
    """One held-out pair has no interval: from minus to plus infinity, which JSON has not."""
    config, given = TrainConfig(steps=2, save_every=1), {"train_rows": pairs(4), "eval_rows": {"one": pairs(1)}}
    first, again = (train(config, model=llama(), output_dir=tmp_path, **given) for _ in range(2))
    assert numbers(again.history) == numbers(first.history)
    assert first.history[0]["metrics"]["loss/high"] == float("inf")
    for file in tmp_path.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    result = run(tmp_path, keep_last=2)
    assert list(result.checkpoints) == [5, 6]
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["checkpoint-00000005", "checkpoint-00000006", "final"]


def test_nothing_written_is_a_pickle(tmp_path: Path) -> None:
    run(tmp_path, reference_logps="precomputed")
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl", ".yaml", ".md"}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            load_file(file)
        else:  # a pickle and torch's archives are not UTF-8
            content.decode("utf-8")


def test_final_and_checkpoint_load_as_ordinary_models(tmp_path: Path) -> None:
    model = llama(attention_dropout=0.25)
    result = run(tmp_path, model)
    for path in (result.final, result.checkpoints[6]):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert same_bits(state(loaded), state(result.model))
        assert loaded.config.attention_dropout == 0.25  # the model's own setting, not the run's 0
    card = (result.final / "README.md").read_text()
    assert "beta 0.1" in card
    assert (result.final / "train_config.yaml").is_file()


def test_final_adapter_loads_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = run(tmp_path, lora=LoraSettings(rank=2, targets=("q_proj",)))
    loaded = peft.PeftModel.from_pretrained(llama(), result.final)
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(loaded.eval()(ids).logits, result.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["policy", "reference", "data", "token order"])
def test_checkpoint_of_other_inputs_is_refused(kind: str, tmp_path: Path) -> None:
    run(tmp_path, reference=llama(1))
    inputs: dict[str, Any] = {"model": llama(), "reference": llama(1), "data": pairs(10)}
    words = {"policy": "the policy before training", "reference": "the reference"}.get(kind, "the training pairs")
    inputs |= {
        "policy": {"model": llama(7)},
        "reference": {"reference": llama(7)},
        "data": {"data": pairs(11)},
        "token order": {"data": pairs(10)[::-1]},
    }[kind]
    with pytest.raises(CheckpointError, match=f"another run: {words} differ"):
        run(tmp_path, **inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.2},
        {"objective": "hinge"},
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"steps": 7},
        {"dtype": "fp64"},
        {"shuffle": False},
        {"optimizer": "sgd"},
        {"lora": LoraSettings(rank=2)},
        {"max_length": 77},
    ],
    ids=str,
)
def test_checkpoint_of_another_config_is_refused_with_both_values(change: dict, tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=rf"another config \({next(iter(change))}: "):
        run(tmp_path, **{"steps": 2, **change})


def test_other_number_of_pairs_in_a_step_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="4 pairs in a step"):
        run(tmp_path, batch=3)


DAMAGE = {
    "weights flipped": lambda p: flip(p / "model.safetensors"),
    "optimizer flipped": lambda p: flip(p / "trainer" / "optimizer" / "whole.safetensors"),
    "history cut": lambda p: (p / "trainer" / "history.jsonl").write_text(""),
    "generators gone": lambda p: (p / "trainer" / "generators.safetensors").unlink(),
    "manifest gone": lambda p: (p / "manifest.json").unlink(),
    "manifest cut": lambda p: (p / "manifest.json").write_text("{"),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="reference_impl")  # the command line sets it for its whole process
    whole = run(tmp_path)
    DAMAGE[kind](whole.checkpoints[6])
    with pytest.raises(CheckpointError, match="cannot be continued from"):
        run(tmp_path / "other", resume=str(whole.checkpoints[6]))
    again = run(tmp_path)
    assert "passed over" in caplog.text
    assert same_bits(state(whole.model), state(again.model))


def test_folder_with_only_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    run(tmp_path, keep_last=1)
    flip(tmp_path / "checkpoint-00000006" / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove them to start anew"):
        run(tmp_path)


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, resume="never")
    with pytest.raises(ConfigError, match="resume=never"):
        run(tmp_path, resume="never")


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = open_folder(tmp_path)
    code = f"from reference_impl.folder import open_folder; open_folder({str(tmp_path)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "in use by another run" in other.stderr
    close_folder(folder)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
