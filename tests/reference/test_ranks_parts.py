"""What lies in a checkpoint of several processes, and what model is made of it?

Run alone: pytest tests/reference/test_ranks_parts.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from test_ranks_checkpoint import ADAPTER, SETTINGS, apart, leave, ranks, tensors, train_in
from test_trainer_checkpoint import flip
from trainer_ranks import join, one_thread, put_together, start
from trainer_tiny import gpt2, llama, pairs, same_bits

from reference_impl import TrainConfig, cli, shards, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")
STEP = "checkpoint-00000002"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def run(world: int, folder: Path, beside: Path, **settings: Any) -> Path:
    """A run of two steps in so many processes, one of them without a fork."""
    given = {"steps": 2, "warmup_steps": 0, **settings}
    train_in(folder, **given) if world == 1 else ranks(world, folder, beside, **given)
    return folder


def held_bytes(files: list[Path]) -> int:
    """What the tensors in safetensors files take, without the headers."""
    total = 0
    for file in files:
        with safe_open(file, "pt") as held:
            total += sum(held.get_tensor(name).nbytes for name in held.keys())  # noqa: SIM118 (not a dict)
    return total


@pytest.mark.parametrize(
    ("world", "shard"), [(2, None), *(pytest.param(*n, marks=pytest.mark.long) for n in ((3, None), (4, 2), (4, 1)))]
)
def test_every_number_of_weights_and_optimizer_is_written_once(world: int, shard: int | None, tmp_path: Path) -> None:
    """As many bytes as one copy has, however many copies lie over the processes; of a tensor of more rows than
    processes, none is whole in a file; and nothing is a pickle."""
    checkpoint = run(world, tmp_path / "run", tmp_path, shard=shard) / STEP
    model = gpt2()
    for name in ("weights", "trainer/optimizer"):
        files = sorted((checkpoint / name).iterdir())
        assert [file.name[:12] for file in files] == [f"shard-{rank:05d}-" for rank in range(1, world + 1)]
    weights = sum(p.nbytes for p in model.parameters())  # the head is tied: once
    assert held_bytes(sorted((checkpoint / "weights").iterdir())) == weights
    steps = 4 * len(list(model.parameters()))  # AdamW counts in float32
    assert held_bytes(sorted((checkpoint / "trainer" / "optimizer").iterdir())) == 2 * weights + steps
    if shard != 1:
        wide = model.transformer.wte.weight.shape
        for file in (checkpoint / "weights").iterdir():
            with safe_open(file, "pt") as held:
                if "transformer.wte.weight" in held.keys():  # noqa: SIM118 (not a dict)
                    assert held.get_slice("transformer.wte.weight").get_shape()[0] < wide[0]
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jsonl"}


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {}),
        *(pytest.param(*given, marks=pytest.mark.long)
          for given in ((1, {}), (3, {}), (4, {"shard": 2}), (1, ADAPTER), (2, ADAPTER))),
    ],
    ids=str,
)  # fmt: skip
def test_exported_checkpoint_is_the_final_model_to_the_last_bit(
    world: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    out = run(world, tmp_path / "run", tmp_path, **settings)
    assert cli.export([str(out / STEP), str(tmp_path / "exported")]) == 0
    left, right = tensors(tmp_path / "exported"), tensors(out / "final")
    assert same_bits(left, right)
    beside = {path.name for path in (out / "final").iterdir()} - {"README.md", "train_config.yaml", "manifest.json"}
    assert {path.name for path in (tmp_path / "exported").iterdir()} - {"manifest.json", "README.md"} == beside
    if "lora" in settings:
        return
    assert (tmp_path / "exported" / "config.json").read_bytes() == (out / "final" / "config.json").read_bytes()
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype="auto", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.dtype == torch.float64
    assert all(torch.equal(model.state_dict()[name.removeprefix("model ")], tensor) for name, tensor in right.items())
    assert json.loads((out / "final" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_large_model_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole ones with their index; in parts, several of each process.  A fork has the limits of its parent."""
    monkeypatch.setattr(shards, "FILE_BYTES", 20000)
    monkeypatch.setattr(shards, "PART_BYTES", 10000)
    out = run(2, tmp_path / "run", tmp_path)
    parts = sorted((out / STEP / "weights").iterdir())
    assert len(parts) > 4
    assert all(path.stat().st_size < 10000 + 4000 for path in parts)  # with the header
    assert same_bits(put_together(parts), load_tensors_of(out / "final"))
    assert cli.export([str(out / STEP), str(tmp_path / "exported")]) == 0
    for folder in (out / "final", tmp_path / "exported"):
        files = sorted(path.name for path in folder.glob("model-*.safetensors"))
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 1
        _, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
    assert same_bits(tensors(tmp_path / "exported"), tensors(out / "final"))


def load_tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_buffers() -> Any:
    """A model that keeps a number, a whole number and a row of them beside its weights; one weight has a single row."""
    model = llama(dtype=torch.float64)
    model.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))
    model.register_buffer("seen", torch.tensor(2**40 + 1))
    model.model.register_buffer("flags", torch.tensor([True, False, True]))
    model.model.register_parameter("single", torch.nn.Parameter(torch.full((1, 3), 0.1, dtype=torch.float64)))
    return model


def test_numbers_without_rows_and_of_other_kinds_come_back(tmp_path: Path) -> None:
    """Saved by three processes, one or two of which have no part of the smallest; read by two, and exported."""

    def action(folder: str, **settings: Any) -> Callable[[int], None]:
        def go(rank: int) -> None:
            model = with_buffers()
            config = TrainConfig(**{**SETTINGS, "output_dir": str(tmp_path / folder), "steps": 4, **settings})
            train(config, model=model, train_rows=pairs(10))

        return go

    assert not any(join(start(3, action("run"), tmp_path / "a"))), (tmp_path / "a" / "said-0.txt").read_text()
    checkpoint = tmp_path / "run" / STEP
    found = put_together(sorted((checkpoint / "weights").iterdir()))
    for name, value in with_buffers().named_buffers():
        if "inv_freq" not in name:  # not kept
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
    assert found["model.single"].shape == (1, 3)
    assert cli.export([str(checkpoint), str(tmp_path / "exported")]) == 0
    assert same_bits(load_file(tmp_path / "exported" / "model.safetensors"), found)
    resumed = action("next", resume=str(checkpoint))
    assert not any(join(start(2, resumed, tmp_path / "b"))), (tmp_path / "b" / "said-0.txt").read_text()
    assert apart(tmp_path / "run" / "final", tmp_path / "next" / "final") < 1e-12


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


DAMAGE = {
    "a part flipped": lambda p: flip(next((p / "weights").glob("shard-00002-*"))),
    "a part cut": lambda p: cut(next((p / "weights").glob("shard-00002-*"))),
    "a part missing": lambda p: next((p / "weights").glob("shard-00002-*")).unlink(),
    "a part of the optimizer missing": lambda p: next((p / "trainer" / "optimizer").glob("shard-00001-*")).unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
}


def test_damaged_part_is_named_and_never_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By two processes, by one, and by export; no half of an exported model is left."""
    out = run(2, tmp_path / "run", tmp_path, steps=4)
    for kind, damage in DAMAGE.items():
        copy = tmp_path / kind.replace(" ", "-")
        shutil.copytree(out / "checkpoint-00000004", copy)
        damage(copy)
        said = (tmp_path / "said" / "said-0.txt", tmp_path / "said" / "said-1.txt")

        def refused(rank: int, copy: Path = copy) -> None:
            with pytest.raises(RuntimeError, match="cannot be continued from: ") as caught:
                train_in(tmp_path / "other", resume=str(copy), steps=4)
            print(caught.value)

        assert join(start(2, refused, tmp_path / "said")) == [0, 0], [file.read_text() for file in said]
        refused(0)
        wanted = "manifest.json" if kind == "no manifest" else "shard-0000"
        assert all(wanted in file.read_text() for file in said), kind
        capsys.readouterr()
        assert cli.export([str(copy), str(tmp_path / "exported")]) == (2 if kind == "no manifest" else 1)
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert ("no checkpoint of a run" if kind == "no manifest" else "the checkpoint is damaged: ") in line
        assert not list(tmp_path.glob("*exported*"))
    # Found by itself, the one before is taken.
    DAMAGE["a part flipped"](out / "checkpoint-00000004")
    before = tensors(out / "final")
    shutil.rmtree(out / "final")
    ranks(2, out, tmp_path / "again", steps=4, warmup_steps=0)
    assert same_bits(tensors(out / "final"), before)


def test_export_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(1, tmp_path / "run", tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    for given, words in (
        ((out / STEP, taken), "taken is there already"),
        ((out / "final", tmp_path / "new"), "final is no checkpoint of a run"),
        ((tmp_path / "nowhere", tmp_path / "new"), "nowhere is no checkpoint of a run"),
    ):
        assert cli.export([str(path) for path in given]) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not list(taken.iterdir())


@pytest.mark.parametrize("allowed", [2000, 15000])
def test_full_disk_while_exporting_is_one_line_and_leaves_nothing(allowed: int, tmp_path: Path) -> None:
    """Less than the tokens' settings need, or the weights."""
    out = run(2, tmp_path / "run", tmp_path)

    def action(rank: int) -> None:
        import trainer_crash

        trainer_crash.limit_file_size(allowed)
        leave(cli.export([str(out / STEP), str(tmp_path / "exported")]))

    assert join(start(1, action, tmp_path / "full")) == [1]
    said = (tmp_path / "full" / "said-0.txt").read_text()
    assert said.count("\n") == 1
    assert "could not be written" in said
    assert not list(tmp_path.glob("*exported*"))
