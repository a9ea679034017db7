"""Is every wrong input refused with one line that says what was given, what is right and what to do?

Run alone: pytest tests/reference/test_trainer_bad_input.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_tiny import WORDS, llama, pairs, rows, save, state, tokenizer

from reference_impl import LoraSettings, TokenPair, TrainConfig, cli, train
from reference_impl.config import ConfigError, load_config
from reference_impl.data import DataError
from reference_impl.models import ModelError

# Settings as a person types them → words that the one line must have.
REFUSED_SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["bta=0.1"], ["bta", "Did you mean", "'beta'"]),
    "unknown nested key": (["lora.rnk=4"], ["lora.rnk", "Did you mean: 'rank'"]),
    "no value": (["beta"], ["'beta'", "key=value"]),
    "set twice": (["beta=0.1", "beta=0.2"], ["beta is set twice", "beta=0.2"]),
    "text for a number": (["beta=strong"], ["beta", "strong", "Float"]),
    "true for a number": (["beta=true"], ["beta", "True"]),
    "fraction for a whole number": (["batch=2.5"], ["batch", "2.5", "Integer"]),
    "text for a switch": (["shuffle=maybe"], ["shuffle", "maybe"]),
    "list for a number": (["batch=[1,2]"], ["batch"]),
    "unknown objective": (["objective=dop"], ["dop", "'dpo'", "'ipo'"]),
    "unknown optimizer": (["optimizer=adam"], ["adam", "'adamw'", "'sgd'"]),
    "unknown dtype": (["dtype=fp16"], ["fp16", "'bf16'"]),
    "unknown truncation": (["truncation=left"], ["left", "'keep_end'"]),
    "dangling interpolation": (["beta=${gone}"], ["gone"]),
    "negative beta": (["beta=-0.1"], ["beta is -0.1", "above 0"]),
    "beta zero": (["beta=0"], ["beta is 0", "log 2"]),
    "beta not finite": (["beta=.inf"], ["beta is inf", "finite"]),
    "beta not a number": (["beta=.nan"], ["beta is nan", "finite"]),
    "negative learning rate": (["learning_rate=-1e-6"], ["learning_rate", "at least 0"]),
    "smoothing of one half for robust": (["objective=robust", "label_smoothing=0.5"], ["0.5", "[0, 0.5)", "1 − 2ε"]),
    "smoothing above one half for cdpo": (["objective=cdpo", "label_smoothing=0.6"], ["0.6", "[0, 0.5]"]),
    "negative smoothing": (["objective=cdpo", "label_smoothing=-0.1"], ["-0.1", "[0, 0.5]"]),
    "smoothing where it has no effect": (["label_smoothing=0.1"], ["no effect under objective=dpo", "cdpo, robust"]),
    "gamma where it has no effect": (["gamma=0.5"], ["no effect", "simpo"]),
    "ipo_length where it has no effect": (["ipo_length=mean"], ["no effect", "ipo"]),
    "reference for simpo": (["objective=simpo", "reference=x"], ["simpo has no reference"]),
    "precomputing for simpo": (["objective=simpo", "reference_logps=precomputed"], ["simpo has no reference"]),
    "momentum for adamw": (["momentum=0.9"], ["momentum=0.9 has no effect", "SGD"]),
    "betas for sgd": (["optimizer=sgd", "betas=[0.8,0.9]"], ["betas", "no effect", "AdamW"]),
    "three betas": (["betas=[0.9,0.99,0.999]"], ["betas", "length 3", "length 2"]),
    "beta of adam out of range": (["betas=[0.9,1.0]"], ["betas", "below 1"]),
    "epsilon zero": (["epsilon=0"], ["epsilon", "above 0"]),
    "clip of zero": (["clip_norm=0"], ["clip_norm", "null for no clipping"]),
    "no pairs": (["batch=0"], ["batch is 0", "at least 1"]),
    "no steps": (["steps=0"], ["steps is 0", "at least 1"]),
    "epochs and steps": (["epochs=1", "steps=5"], ["epochs=1 and steps=5", "give one"]),
    "warm-up longer than the run": (["steps=5", "warmup_steps=5"], ["warmup_steps is 5", "below steps=5"]),
    "warm-up start without warm-up": (["warmup_first=zero"], ["no effect", "warmup_steps=0"]),
    "keep without saving": (["keep_last=2"], ["keep_last=2 has no effect", "save_every"]),
    "keep nothing": (["save_every=1", "keep_last=0"], ["keep_last is 0"]),
    "cache folder while online": (["reference_cache=/tmp/x"], ["no effect", "reference_logps=online"]),
    "max_length too small": (["max_length=1"], ["max_length is 1", "at least 2"]),
    "negative seed": (["seed=-1"], ["seed is -1"]),
    "confidence as a percentage": (["confidence=95"], ["confidence is 95", "0.95"]),
    "rank zero": (["lora.rank=0"], ["rank", "at least 1"]),
    "adapter nowhere": (["lora.targets=[]"], ["targets not empty"]),
    "held-out set named train": (["eval.train=x"], ["'train'", "taken"]),
    "unknown tracker": (["trackers=[mlflow]"], ["mlflow", "tensorboard, wandb"]),
    "negative SFT weight": (["sft_weight=-1"], ["sft_weight is -1"]),
}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("dpo-train: ")]
    assert len(lines) == 1, (out, err)
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_setting_is_refused_before_anything_is_loaded(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_train", lambda *_: pytest.fail("went on to training"))
    settings, words = REFUSED_SETTINGS[case]
    code = cli.run(["model=m", "train=d", "output_dir=o", *settings])
    assert code == 2
    line = one_line(capsys)
    assert [word for word in words if word not in line] == [], line
    assert len(line) < 400


FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "key given twice": ("beta: 0.1\nbeta: 0.2\n", ["beta"]),
    "not YAML": ("beta: [0.1\n", []),
    "a list": ("- beta\n- 0.1\n", []),
    "a number": ("7\n", []),
    "not text": (b"\xff\xfe\x00\x01", []),
    "unknown key in the file": ("learning_rat: 1\n", ["learning_rat", "learning_rate"]),
    "wrong type in the file": ("beta: yes\n", ["beta"]),
}


@pytest.mark.parametrize("case", FILES)
def test_config_file_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[case]
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.run([str(file), "model=m", "train=d", "output_dir=o"]) == 2
    line = one_line(capsys)
    assert [word for word in words if word not in line] == [], line


def test_config_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml" in one_line(capsys)


@pytest.mark.parametrize("missing", ["model", "train", "output_dir"])
def test_missing_setting_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{name}=x" for name in ("model", "train", "output_dir") if name != missing]
    assert cli.run(given) == 2
    assert f"{missing} is not set" in one_line(capsys)


@pytest.mark.parametrize(
    "bad",
    [{"beta": "0.1"}, {"batch": 2.0}, {"batch": True}, {"shuffle": 1}, {"objective": "x"}, {"dtype": 32}, {"model": 3}],
    ids=str,
)
def test_record_made_in_python_is_checked_like_a_file(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrainConfig(**bad)


def damaged(folder: Path, change: Callable[[Path], None]) -> str:
    save(folder)
    change(folder)
    return str(folder)


def nan_model() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def refused(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], *settings: str) -> None:
    data = tmp_path / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    out = tmp_path / "out"
    defaults = {"model": str(tmp_path / "m"), "train": str(data), "output_dir": str(out), "steps": "1"}
    given = dict(item.split("=", 1) for item in settings)
    code = cli.run([f"{key}={value}" for key, value in {**defaults, **given}.items()])
    assert code == 2
    line = one_line(capsys)
    assert [word for word in words if word not in line] == [], line
    half_written = (".writing", "checkpoint", "final")
    assert not [p for p in out.rglob("*") if p.suffix == ".safetensors" or p.name.startswith(half_written)]


MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no such folder": (lambda p: None, ["no tokenizer can be loaded"]),
    "NaN weights": (lambda p: save(p, nan_model()), ["layers.1.mlp.up_proj.weight", "NaN", "damaged"]),
    "vocabulary larger than the embedding": (
        lambda p: save(p, words=tokenizer(words=[*WORDS, "extra"])),
        ["33 tokens", "embedding only 32", "resize_token_embeddings"],
    ),
    "tokenizer without EOS": (lambda p: save(p, words=tokenizer(eos_token=None)), ["eos_token"]),
    "no weights": (lambda p: damaged(p, lambda f: (f / "model.safetensors").unlink()), ["no causal language model"]),
    "cut weights": (
        lambda p: damaged(p, lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 20)),
        ["damaged", "model"],
    ),
    "config that is not JSON": (lambda p: damaged(p, lambda f: (f / "config.json").write_text("{")), []),
    "unknown architecture": (
        lambda p: damaged(p, lambda f: (f / "config.json").write_text('{"model_type": "abacus"}')),
        ["abacus"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_or_tokenizer_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = MODELS[case]
    make(tmp_path / "m")
    refused(tmp_path, words, capsys)


REFERENCES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no such reference": (lambda p: None, ["no causal language model", "r"]),
    "reference with NaN": (lambda p: save(p, nan_model()), ["the reference's weight", "NaN"]),
    "reference of another vocabulary": (lambda p: save(p, llama(vocab_size=30)), ["reference's embedding only 30"]),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_reference_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = REFERENCES[case]
    save(tmp_path / "m")
    make(tmp_path / "r")
    refused(tmp_path, words, capsys, f"reference={tmp_path / 'r'}")


RUNS: dict[str, tuple[list[str], list[str]]] = {
    "too few pairs for a step": (["batch=8", "last_step=drop"], ["6 pairs", "last_step=keep"]),
    "warm-up of a whole epoch": (["batch=6", "epochs=1", "warmup_steps=1"], ["warmup_steps is 1", "only 1 steps"]),
    "no data file": (["train=/nowhere/x.jsonl"], ["/nowhere/x.jsonl"]),
    "adapter on modules that are not there": (["lora.targets=[query]"], ["lora.targets", "query"]),
    "unknown device": (["device=abacus"], ["device 'abacus'"]),
    "device that is not here": (["device=cuda:9"], ["device 'cuda:9'"]),
    "resume from nowhere": (["resume=/nowhere"], ["resume=/nowhere", "manifest.json"]),
    "held-out set that is not there": (["eval.dev=/nowhere/y.jsonl"], ["/nowhere/y.jsonl"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_run_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, words = RUNS[case]
    save(tmp_path / "m")
    if "epochs" in str(settings):
        settings = [*settings, "steps=null"]
    if case == "resume from nowhere":  # not a wrong setting as such: found when the folder is looked at
        assert cli.run(["model=m", "train=d", f"output_dir={tmp_path / 'out'}", *settings]) == 1
        line = one_line(capsys)
        assert [word for word in words if word not in line] == [], line
        return
    refused(tmp_path, words, capsys, *settings)


def not_a_folder(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "out")


def read_only(tmp_path: Path) -> str:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere but where the kernel writes
        return "/proc/dpo-train-out"
    return str(folder / "out")


@pytest.mark.parametrize("place", [not_a_folder, read_only])
def test_folder_that_cannot_be_written_is_refused_first(
    place: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = place(tmp_path)
    assert cli.run(["model=/nowhere", "train=/nowhere", f"output_dir={where}"]) == 2
    line = one_line(capsys)
    assert "output_dir" in line
    assert "cannot be written" in line


def test_tokenizer_without_padding_token_trains_with_eos(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "reference_impl")
    result = train(TrainConfig(steps=2), model=llama(), tokenizer=tokenizer(pad_token=None), train_rows=rows(4))
    assert "'</s>' pads, masked and never scored" in caplog.text
    expected = train(TrainConfig(steps=2), model=llama(), tokenizer=tokenizer(), train_rows=rows(4))
    for name, tensor in state(expected.model).items():
        assert torch.equal(state(result.model)[name], tensor)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ConfigError, "no policy"),
        ({"model": llama}, ConfigError, "no training data"),
        ({"model": llama, "train_rows": lambda: rows(3)}, ConfigError, "no tokenizer"),
        ({"model": llama, "train_rows": list, "tokenizer": tokenizer}, DataError, "no rows"),
        ({"model": nan_model, "train_rows": lambda: pairs(3)}, ModelError, "NaN"),
        ({"model": llama, "train_rows": lambda: [TokenPair(5, (1,), (2,), (32,))]}, ModelError, "row 5 .* token 32"),
        (
            {"model": lambda: llama().requires_grad_(False), "train_rows": lambda: pairs(3)},
            ModelError,
            "no parameter of the policy requires a gradient",
        ),
        (
            {"model": llama, "train_rows": lambda: pairs(3), "eval_rows": lambda: {"summary": pairs(3)}},
            ConfigError,
            "summary",
        ),
    ],
)
def test_live_input_is_refused(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(TrainConfig(steps=1), **{name: make() for name, make in given.items()})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"save_every": 1}, "save_every=1 needs output_dir"), ({"reference_logps": "precomputed"}, "needs a folder")],
)
def test_setting_that_needs_a_folder_is_refused_without_one(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(TrainConfig(**settings), model=llama(), train_rows=pairs(3))


def test_two_references_are_refused() -> None:
    with pytest.raises(ConfigError, match="two references"):
        train(TrainConfig(reference="x"), model=llama(), reference=llama(1), train_rows=pairs(3))


def test_live_reference_for_simpo_is_refused() -> None:
    with pytest.raises(ConfigError, match="simpo has none"):
        train(TrainConfig(objective="simpo"), model=llama(), reference=llama(1), train_rows=pairs(3))


def test_refused_live_model_comes_back_as_it_was() -> None:
    model = llama(attention_dropout=0.3).eval()
    with pytest.raises(ModelError):
        train(TrainConfig(), model=model, reference=nan_model(), train_rows=pairs(3))
    assert model.config.attention_dropout == 0.3
    assert model.model.layers[0].self_attn.attention_dropout == 0.3
    assert not any(module.training for module in model.modules())


def test_model_that_could_not_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.temperature = 0.5  # without do_sample: transformers loads this and refuses to save it
    model.generation_config.do_sample = False
    with pytest.raises(ModelError, match="generation_config cannot be saved"):
        train(TrainConfig(steps=1), model=model, train_rows=pairs(3), output_dir=tmp_path)


def test_pairs_with_one_row_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="one row number"):
        train(TrainConfig(), model=llama(), train_rows=[*pairs(3), pairs(1)[0]])


def test_every_refusal_has_its_own_words() -> None:
    assert len(REFUSED_SETTINGS) + len(FILES) + len(MODELS) + len(REFERENCES) + len(RUNS) >= 60


def test_config_survives_being_saved_and_loaded(tmp_path: Path) -> None:
    from reference_impl.config import to_yaml

    config = TrainConfig(
        objective="cdpo", label_smoothing=0.1, eval={"dev": "x"}, lora=LoraSettings(rank=3), betas=(0.8, 0.9),
        clip_norm=None, learning_rate=5e-7, trackers=("wandb",), chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert load_config(tmp_path / "c.yaml", ["beta=0.7"]).beta == 0.7
