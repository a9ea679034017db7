"""Does the command line train, report, stop and go on as it says?

Run alone: pytest tests/reference/test_trainer_cli.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from trainer_tiny import llama, numbers, rows, save, state

from reference_impl import TrainConfig, cli, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def dataset(file: Path, count: int = 12) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return str(file)


def settings(tmp_path: Path, out: str, *more: str) -> list[str]:
    save(tmp_path / "m")
    data = dataset(tmp_path / "train.jsonl")
    held = dataset(tmp_path / "held.jsonl", 5)
    given = [f"model={tmp_path / 'm'}", f"train={data}", f"eval.held={held}", f"output_dir={tmp_path / out}"]
    return [*given, "batch=2", "learning_rate=1e-2", *more]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "reference_impl", *arguments]


def test_run_from_a_file_trains_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.5\nsteps: 3\nobjective: ipo\n")
    assert cli.run([str(config), *settings(tmp_path, "out", "steps=4")]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("DPO step")][-1].startswith("DPO step 4/4  loss ")
    assert "step 0  held: loss" in out
    assert "12 rows" in err
    folder = tmp_path / "out"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = train(
        TrainConfig(beta=0.5, steps=4, objective="ipo", batch=2, learning_rate=1e-2),
        model=llama(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "m"),
        train_rows=rows(12),
        eval_rows={"held": rows(5)},
    )
    assert numbers(lines) == numbers(expected.history)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    assert all(torch.equal(tensor, state(loaded)[name]) for name, tensor in state(expected.model).items())
    assert transformers.AutoTokenizer.from_pretrained(folder / "final").eos_token == "</s>"
    assert json.loads((folder / "data_report.train.json").read_text())
    assert "steps: 4" in (folder / "final" / "train_config.yaml").read_text()


@pytest.mark.long
def test_model_card_has_the_exact_command(tmp_path: Path) -> None:
    arguments = settings(tmp_path, "out", "steps=1")
    subprocess.run(command(*arguments), check=True, capture_output=True, timeout=300)
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    assert f"python -m reference_impl {' '.join(arguments)}" in card


@pytest.mark.long
def test_sigterm_ends_with_143_and_the_same_command_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = (settings(tmp_path, name, "steps=400", "save_every=150", "eval_every=400") for name in ("a", "b"))
    subprocess.run(command(*whole), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command(*stopped), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("DPO step 40/"):
            os.kill(process.pid, signal.SIGTERM)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "the same command goes on from there" in out
    assert not (tmp_path / "b" / "final").exists()
    again = subprocess.run(command(*stopped), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout
    left, right = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert left == right


def test_rows_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m")
    bad = [*rows(2), {"prompt": "w5", "chosen": " w6", "rejected": " w6"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    source = [f"tokenizer={tmp_path / 'm'}", f"train={tmp_path / 'd.jsonl'}"]
    assert cli.list_rows(source, None, None) == 0
    assert "chosen = rejected" in capsys.readouterr().out
    assert cli.list_rows(source, 1, None) == 0
    assert "all scored" in capsys.readouterr().out
    assert cli.list_rows(source, 9, None) == 2
    assert "rows 0 to 2, not 9" in capsys.readouterr().err


def test_show_config_prints_what_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["beta=0.25", "lora.rank=4"], show_config=True) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert cli.run([str(tmp_path / "c.yaml")], show_config=True) == 0
    assert "beta: 0.25" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    code = "import sys; from reference_impl.cli import command; command(['--help'], standalone_mode=False)"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "KEY=VALUE" in done.stdout


def test_broken_data_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reference_impl import models

    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded the model"))
    save(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text('{"prompt": "w5", "chosen": " w6", "rejected": " w7"}\n{"prompt": \n')
    assert cli.run([f"model={tmp_path / 'm'}", f"train={tmp_path / 'd.jsonl'}", f"output_dir={tmp_path / 'o'}"]) == 2
    assert "d.jsonl" in capsys.readouterr().err


def test_run_that_cannot_go_on_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = 3e38
    save(tmp_path / "m", model)
    data = dataset(tmp_path / "d.jsonl")
    given = [f"model={tmp_path / 'm'}", f"train={data}", f"output_dir={tmp_path / 'o'}"]
    assert cli.run(given) == 1
    assert "loss is nan" in capsys.readouterr().err


def test_tensorboard_gets_every_row_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert cli.run(settings(tmp_path, "out", "steps=2", "trackers=[tensorboard]")) == 0
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_tracker_that_is_not_installed_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.run(settings(tmp_path, "out", "trackers=[wandb]")) == 2
    assert "wandb is not installed" in capsys.readouterr().err


def test_public_names_are_the_documented_ones() -> None:
    import reference_impl

    assert callable(reference_impl.train)
    assert reference_impl.train.__module__ == "reference_impl.training"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = reference_impl.trian


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_example_is_a_config_that_is_accepted(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(example), "output_dir=out"], show_config=True) == 0
    assert "output_dir: out" in capsys.readouterr().out
