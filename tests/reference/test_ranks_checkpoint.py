"""Does a run of several processes go on where it stopped, in as many processes or in others, and lose nothing?

Run alone: pytest tests/reference/test_ranks_checkpoint.py
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_trainer_crash import FullDisk
from trainer_ranks import join, one_thread, put_together, start
from trainer_tiny import gpt2, llama, numbers, pairs, rows, save

from reference_impl import LoraSettings, TrainConfig, cli, train
from reference_impl.checkpoint import checkpoints
from reference_impl.export import export
from reference_impl.files import check_folder
from reference_impl.shards import save_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")
SETTINGS = {"steps": 6, "batch": 2, "accumulation": 2, "save_every": 2, "learning_rate": 1e-2, "dtype": "fp64",
            "warmup_steps": 1, "device": "cpu"}  # fmt: skip
ADAPTER = {"lora": LoraSettings(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))}
# 6 steps of float64, a thousand roundings of 1e-16 to numbers below 30.
BOUND = 1e-12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def train_in(folder: Path, watcher: Any = None, **settings: Any) -> Any:
    make = llama if settings.get("lora") else gpt2
    config = TrainConfig(**{**SETTINGS, "output_dir": str(folder), **settings})
    return train(config, model=make(dtype=torch.float64), train_rows=pairs(10), eval_rows={"held": pairs(3, 1)},
                 watcher=watcher)  # fmt: skip


def ranks(world: int, folder: Path, beside: Path, **settings: Any) -> None:
    codes = join(start(world, lambda rank: train_in(folder, **settings), beside))
    assert not any(codes), [(beside / f"said-{rank}.txt").read_text() for rank in range(world)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whatever number of files it is in."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        kinds.setdefault(kind_of(file), []).append(file)
    return {f"{kind} {name}": t for kind, files in kinds.items() for name, t in put_together(files).items()}


def kind_of(file: Path) -> str:
    if file.parent.name in ("weights", "optimizer"):
        return "model" if file.parent.name == "weights" else "optimizer"
    return file.name.split("-")[0].removesuffix(".safetensors")


def apart(left: Path, right: Path) -> float:
    mine, other = tensors(left), tensors(right)
    assert mine.keys() == other.keys()
    numeric = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    return max((mine[name].double() - other[name].double()).abs().max().item() for name in numeric)


def history(folder: Path) -> list[Any]:
    return numbers([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def go_on(tmp_path: Path, before: int, after: int, **settings: Any) -> tuple[Path, Path]:
    """A run in `before` processes, and one that goes on in `after` from its checkpoint of step 2."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    ranks(before, whole, tmp_path / "w", **settings)
    shutil.copytree(whole, again)
    for path in (again / "checkpoint-00000004", again / "checkpoint-00000006", again / "final"):
        shutil.rmtree(path)
    ranks(after, again, tmp_path / "a", **settings)
    return whole, again


@pytest.mark.parametrize("kind", [pytest.param("adapter", marks=pytest.mark.long), "all weights"])
def test_resumed_in_as_many_processes_it_is_the_same_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    whole, again = go_on(tmp_path, 2, 2, **(ADAPTER if kind == "adapter" else {}))
    assert list(checkpoints(again)) == [2, 4, 6]
    for name in ("checkpoint-00000004", "checkpoint-00000006", "final"):
        left, right = tensors(whole / name), tensors(again / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert history(again) == history(whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), *(pytest.param(*numbers, marks=pytest.mark.long) for numbers in ((1, 2), (1, 4), (4, 3)))],
)
@pytest.mark.parametrize("kind", [pytest.param("adapter", marks=pytest.mark.long), "all weights"])
def test_resumed_in_another_number_of_processes_it_is_the_same_to_rounding(
    before: int, after: int, kind: str, tmp_path: Path
) -> None:
    whole, again = go_on(tmp_path, before, after, **(ADAPTER if kind == "adapter" else {}))
    difference = max(apart(whole / name, again / name) for name in ("checkpoint-00000004", "checkpoint-00000006"))
    print(f"{before} → {after} processes, {kind}: {difference:.1e}")
    assert difference < BOUND
    left, right = history(whole), history(again)
    assert [row[:2] for row in left] == [row[:2] for row in right]
    for one, other in zip(left, right, strict=True):
        assert one[2] == pytest.approx(other[2], abs=BOUND, rel=BOUND)


@pytest.mark.long
def test_groups_of_processes_resume_as_one_line(tmp_path: Path) -> None:
    """A checkpoint of 2 × 2 processes in 3: what a folder holds does not depend on how the weights lay."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    ranks(4, whole, tmp_path / "w", shard=2)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-00000006")
    shutil.rmtree(again / "final")
    ranks(3, again, tmp_path / "a")
    assert apart(whole / "checkpoint-00000006", again / "checkpoint-00000006") < BOUND


@pytest.mark.long
def test_model_whose_files_have_other_names_is_saved_and_resumed(tmp_path: Path) -> None:
    """Experts lie in one tensor in the model, one by one in its files."""
    def make() -> Any:
        torch.manual_seed(0)
        settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, **heads))

    def action(rank: int) -> None:
        config = TrainConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), "steps": 4, "dtype": "fp32"})
        train(config, model=make(), train_rows=pairs(10))

    assert not any(join(start(2, action, tmp_path / "a"))), (tmp_path / "a" / "said-0.txt").read_text()
    names = load_file(tmp_path / "run" / "final" / "model.safetensors").keys()
    assert any("experts.1." in name for name in names), names
    before = tensors(tmp_path / "run" / "final")
    export(tmp_path / "run" / "checkpoint-00000004", tmp_path / "exported")
    exported = tensors(tmp_path / "exported")
    assert exported.keys() == before.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in before.items())
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000004")
    shutil.rmtree(tmp_path / "run" / "final")
    assert not any(join(start(2, action, tmp_path / "b"))), (tmp_path / "b" / "said-0.txt").read_text()
    after = tensors(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class FullDiskOf:
    """No file of one process grows beyond `allowed` bytes once a step is done."""

    def __init__(self, rank: int, step: int, allowed: int) -> None:
        self.disk, self.rank = FullDisk(step, allowed), rank


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_full_disk_under_one_process_spoils_no_older_checkpoint(rank: int, tmp_path: Path) -> None:
    """All processes end with one message; with room again the same command goes on bit for bit."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    ranks(2, whole, tmp_path / "w")

    def action(mine: int) -> None:
        import trainer_crash

        right = save_tensors

        def full(values: Any, folder: Path, crew: Any) -> None:
            if crew.rank == rank and "00000004" in str(folder):
                trainer_crash.limit_file_size(2000)
            right(values, folder, crew)

        from reference_impl import checkpoint, weights

        checkpoint.save_tensors = weights.save_tensors = full
        with pytest.raises(checkpoint.CheckpointError, match="could not be written") as caught:
            train_in(run)
        print("error:", caught.value)

    assert join(start(2, action, tmp_path / "full")) == [0, 0]
    said = [(tmp_path / "full" / f"said-{r}.txt").read_text() for r in range(2)]
    assert all("nothing of it is left and earlier checkpoints are whole" in text for text in said)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-00000002"]
    check_folder(run / "checkpoint-00000002")
    ranks(2, run, tmp_path / "again")
    assert apart(whole / "final", run / "final") == 0
    assert history(run) == history(whole)


def test_precomputed_reference_is_one_file_for_every_process_and_number_of_them(tmp_path: Path) -> None:
    """Written once by three, read by two and by one; the values are those of one process to rounding."""
    cache = tmp_path / "cache"
    given = {"reference_logps": "precomputed", "steps": 2, "save_every": None}
    train_in(tmp_path / "alone", reference_cache=str(tmp_path / "alone-cache"), **given)
    ranks(3, tmp_path / "three", tmp_path / "3", reference_cache=str(cache), **given)
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(cache.rglob("*")) if path.is_file()}
    assert len(files) == 4  # training and held-out pairs, each with its manifest
    ranks(2, tmp_path / "two", tmp_path / "2", reference_cache=str(cache), **given)
    train_in(tmp_path / "one", reference_cache=str(cache), **given)
    assert files == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(cache.rglob("*")) if p.is_file()}
    for path in (path for path in files if path.suffix == ".safetensors"):
        alone, shared = load_file(tmp_path / "alone-cache" / path.relative_to(cache)), load_file(path)
        assert torch.equal(alone["row"], shared["row"])
        assert all((alone[side] - shared[side]).abs().max() < BOUND for side in ("chosen", "rejected"))


def command(tmp_path: Path, out: str) -> list[str]:
    if not (tmp_path / "m").exists():
        save(tmp_path / "m")
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    return [f"model={tmp_path / 'm'}", f"train={tmp_path / 'train.jsonl'}", f"output_dir={tmp_path / out}", "steps=15",
            "save_every=3", "keep_last=2", "batch=2", "accumulation=2", "learning_rate=1e-2", "device=cpu"]  # fmt: skip


FOLDERS = {
    "adapter, reference of its own": (["lora.rank=2", "lora.targets=[q_proj,lm_head]"], True),
    "all weights, reference of its own": ([], True),
    "all weights": (["gradient_checkpointing=true"], False),
    "bf16": (["dtype=bf16"], False),
}


@pytest.mark.parametrize(
    "kind", [name if "adapter" in name else pytest.param(name, marks=pytest.mark.long) for name in FOLDERS]
)
def test_models_from_folders_train_as_in_one_process(kind: str, tmp_path: Path) -> None:
    """One process reads the weights, the other makes the models without; then the adapter that came out, trained on."""
    more, reference = FOLDERS[kind]
    more = [*more, "steps=4", *([f"reference={save(tmp_path / 'r', llama(7))}"] if reference else [])]
    one, many = command(tmp_path, "one") + more, command(tmp_path, "many") + more
    one, many = ([item for item in given if item != "steps=15"] for given in (one, many))
    assert cli.run(one) == 0
    assert join(start(2, lambda rank: leave(cli.run(many)), tmp_path / "a")) == [0, 0]
    # float32: four steps of AdamW at 1e-2 move a weight by 0.04 at most; where a gradient is rounding alone the moves
    # may differ by all of it. So the losses are compared, which such weights do not touch.
    bound = 1e-2 if kind == "bf16" else 1e-5
    left, right = (history(tmp_path / name) for name in ("one", "many"))
    assert [row[:2] for row in left] == [row[:2] for row in right]
    for row, other in zip(left, right, strict=True):
        assert row[2]["loss"] == pytest.approx(other[2]["loss"], abs=bound)
    if "adapter" in kind:
        again = [item for item in many if not item.startswith(("model=", "output_dir=", "lora.", "reference="))]
        again += [f"model={tmp_path / 'many' / 'final'}", f"output_dir={tmp_path / 'next'}"]
        assert join(start(2, lambda rank: leave(cli.run(again)), tmp_path / "b")) == [0, 0]
        assert history(tmp_path / "next")[0][2]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def leave(code: int) -> None:
    raise SystemExit(code)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
def test_killed_process_ends_the_job_at_once_with_one_message_and_it_goes_on(victim: int, tmp_path: Path) -> None:
    """SIGKILL after the second checkpoint. The other process ends within seconds by itself, and says what to do."""
    given = command(tmp_path, "killed")
    children = start(2, lambda rank: leave(cli.run(given)), tmp_path / "a")
    folder, end = tmp_path / "killed", time.monotonic() + 100
    while not (folder / "checkpoint-00000006").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(children[victim], signal.SIGKILL)
    assert join(children, 20)[1 - victim] == 1  # by itself: one that hangs would be killed, and count as -9
    said = (tmp_path / "a" / f"said-{1 - victim}.txt").read_text()
    lines = [line for line in said.splitlines() if line.startswith("dpo-train: ")]
    assert len(lines) == 1, said
    assert "can no longer reach another one" in lines[0]
    assert "the same command goes on from the last checkpoint" in lines[0]
    for step, path in checkpoints(folder).items():
        assert check_folder(path)["step"] == step
    assert join(start(2, lambda rank: leave(cli.run(given)), tmp_path / "b")) == [0, 0]
    undisturbed = command(tmp_path, "whole")
    assert join(start(2, lambda rank: leave(cli.run(undisturbed)), tmp_path / "c")) == [0, 0]
    assert apart(folder / "final", tmp_path / "whole" / "final") == 0
    assert history(folder) == history(tmp_path / "whole")


def test_error_of_the_writing_process_alone_is_the_one_message_and_the_job_ends(tmp_path: Path) -> None:
    """metrics.jsonl cannot be written after step 3, which the other process does not know until it is left alone."""
    from reference_impl import metrics
    from reference_impl.files import DiskError

    right, written = metrics.append_text, []

    def full(file: Path, text: str) -> None:
        written.append(text)
        if len(written) > 3:
            raise DiskError(file, OSError(28, "No space left on device"))
        right(file, text)

    given = command(tmp_path, "full")

    def action(rank: int) -> None:
        metrics.append_text = full
        leave(cli.run(given))

    assert join(start(2, action, tmp_path / "a"), 100) == [1, 1]
    said = [[line for line in (tmp_path / "a" / f"said-{rank}.txt").read_text().splitlines() if "dpo-train: " in line]
            for rank in range(2)]  # fmt: skip
    assert len(said[0]) == 1
    assert "metrics.jsonl could not be written (No space left on device)" in said[0][0]
    assert said[1] == []


def test_sigterm_to_one_process_stops_all_after_one_checkpoint(tmp_path: Path) -> None:
    given = command(tmp_path, "stopped")
    children = start(2, lambda rank: leave(cli.run([*given, "print_every=1"])), tmp_path / "a")
    folder, end = tmp_path / "stopped", time.monotonic() + 100
    while not (folder / "checkpoint-00000003").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(children[1], signal.SIGTERM)
    assert join(children, 60) == [143, 143]
    said = [(tmp_path / "a" / f"said-{rank}.txt").read_text() for rank in range(2)]
    assert "the same command goes on from there" in said[0]
    assert said[1] == ""  # one process speaks
    newest = max(checkpoints(folder))
    assert f"stopped after step {newest};" in said[0]
