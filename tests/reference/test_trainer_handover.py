"""Can others, and the next run, take what a run leaves behind?  And is a start that would spoil it refused?

Run alone: pytest tests/reference/test_trainer_handover.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_tiny import numbers, rows, save, state

from reference_impl import LoraSettings, TrainConfig, artifact, cli, train
from reference_impl.config import ConfigError

BASE = {"steps": 3, "batch": 4, "learning_rate": 1e-2, "shuffle": False}


def dataset(file: Path, count: int = 8) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return str(file)


def run(tmp_path: Path, out: str, model: str, **settings: Any) -> Any:
    config = {**BASE, "model": model, "train": dataset(tmp_path / "train.jsonl"), "output_dir": str(tmp_path / out)}
    return train(TrainConfig(**{**config, **settings}))


def first(result: Any) -> dict[str, float]:
    return result.history[0]["metrics"]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_previous_run_is_policy_and_reference_of_the_next(lora: Any, tmp_path: Path) -> None:
    """Iterative DPO.  Round two starts at log 2 from round one's model, whether it is named once or twice."""
    one = run(tmp_path, "1", save(tmp_path / "base"), lora=lora)
    two = run(tmp_path, "2", str(one.final))
    named = run(tmp_path, "3", str(one.final), reference=str(one.final))
    assert first(two)["loss"] == pytest.approx(math.log(2), abs=2**-23)
    assert first(two)["logps/chosen"] > first(one)["logps/chosen"]  # it goes on where round one ended
    if lora is None:
        assert numbers(two.history) == numbers(named.history)
    else:  # the reference's weights are the same, its adapter is another module
        assert first(named)["loss"] == pytest.approx(math.log(2), abs=2**-23)


def test_previous_run_as_reference_of_another_policy(tmp_path: Path) -> None:
    """Rewards are against round one's model: at the start β (log π_base − log π_1), here of the base itself."""
    base = save(tmp_path / "base")
    one = run(tmp_path, "1", base)
    two = run(tmp_path, "2", base, reference=str(one.final))
    trained = run(tmp_path, "3", str(one.final))
    moved = first(trained)["logps/chosen"] - first(one)["logps/chosen"]
    assert abs(moved) > 0.1
    # float32 sums of a few tokens, each below 16 nats: 2⁻²⁰ apiece.
    assert first(two)["rewards/chosen"] == pytest.approx(-0.1 * moved, abs=0.1 * 8 * 2**-20)


@pytest.mark.long
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_trl_trains_on_from_the_saved_folder(lora: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    result = run(tmp_path, "out", save(tmp_path / "base"), lora=lora)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    model = str(result.final)
    if lora is not None:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True)
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows(4)),
                             processing_class=None if lora is None else _tokenizer(result.final))  # fmt: skip
    before = state(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any(not bool((before[name] == tensor).all()) for name, tensor in state(trainer.model).items())


def _tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"steps": 2}, {"model": "other"}], ids=str)
def test_finished_model_is_not_replaced_by_that_of_other_settings(change: dict, tmp_path: Path) -> None:
    done = run(tmp_path, "out", save(tmp_path / "base"))
    before = (done.final / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=rf"the model of another run \({next(iter(change))}: "):
        run(tmp_path, "out", **{"model": str(tmp_path / "base"), **change})
    assert (done.final / "model.safetensors").read_bytes() == before


def test_the_same_command_makes_the_same_model_again(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    models = [(run(tmp_path, "out", base).final / "model.safetensors").read_bytes() for _ in range(2)]
    assert models[0] == models[1]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_no_launcher_started_are_refused_with_one_message(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would train a model of its own and write over the other's."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert cli.run(["model=/nowhere", "train=/nowhere", f"output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    if rank == "1":
        assert said == ""
    else:
        assert said.startswith("dpo-train: 2 processes were started (WORLD_SIZE=2), but cannot find each other (")
        assert said.endswith("): start them with torchrun\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


COMMANDS = {
    "python -m reference_impl.demo --out x": (["/p/demo/__main__.py", "--out", "x"], ["-m", "reference_impl.demo"]),
    "python train.py 'a b'": (["train.py", "a b"], ["train.py"]),
}


@pytest.mark.parametrize("expected", COMMANDS)
def test_command_on_the_card_is_the_one_that_was_typed(expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, start = COMMANDS[expected]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *start, *argv[1:]])
    assert artifact.command_line() == expected


def test_installed_command_is_named_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dpo-train"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "run.yaml", "beta=0.5"])
    assert artifact.command_line() == "dpo-train run.yaml beta=0.5"
