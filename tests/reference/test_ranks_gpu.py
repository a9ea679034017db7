"""Do the same relations hold on GPUs, and what does a step of a real model need?

Run alone, where there are GPUs: pytest -m gpu -s tests/reference/test_ranks_gpu.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_ranks_equal import BASE, DATA, HELD, same, wide_llama
from test_ranks_layout import DEPTH
from trainer_ranks import join, one_thread, run, start
from trainer_tiny import llama

from reference_impl import TokenPair, TrainConfig, train

GPUS = torch.cuda.device_count()  # asks the driver; nothing is opened before the forks
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks"),
    pytest.mark.skipif(GPUS == 0, reason="there is no GPU here"),
]
several = pytest.mark.skipif(GPUS < 2, reason=f"two GPUs are needed, there are {GPUS}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def on_gpu(make: Any) -> Any:
    """In a process alone a live model trains where it is."""
    return lambda: make().to(f"cuda:{os.environ['LOCAL_RANK']}")


@several
def test_as_many_processes_as_gpus_equal_one_in_float64(tmp_path: Path) -> None:
    given = {"train_rows": DATA, "eval_rows": HELD}
    one = run(1, tmp_path / "1", on_gpu(wide_llama), BASE, **given)
    many = run(min(GPUS, 8), tmp_path / "n", wide_llama, BASE | {"device": "cuda"}, **given)
    print("float64: metrics differ by {:.1e}, weights by {:.1e}".format(*same(many, one)))


@several
def test_offloaded_weights_train_as_others(tmp_path: Path) -> None:
    given = {"train_rows": DATA, "eval_rows": HELD}
    near = run(2, tmp_path / "near", wide_llama, BASE | {"device": "cuda"}, **given)
    far = run(2, tmp_path / "far", wide_llama, BASE | {"device": "cuda", "cpu_offload": True}, **given)
    same(far, near)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=several)])
def test_bf16_is_within_its_rounding_of_float64(world: int, tmp_path: Path) -> None:
    """The first gradient's norm, off by six deviations of √(2 DEPTH) · 2⁻⁹ at most: see test_ranks_layout.py."""
    settings = {"steps": 1, "batch": 8, "optimizer": "sgd", "clip_norm": None}
    exact = run(1, tmp_path / "exact", lambda: llama(dtype=torch.float64), settings | {"dtype": "fp64"},
                train_rows=DATA)  # fmt: skip
    make = on_gpu(llama) if world == 1 else llama
    rounded = run(world, tmp_path / "bf16", make, settings | {"dtype": "bf16", "device": "cuda"}, train_rows=DATA)
    assert not any(exact.codes + rounded.codes), (exact.said, rounded.said)
    right, found = (outcome.history[-2][2]["grad_norm"] for outcome in (exact, rounded))
    assert abs(found - right) < 6 * (2 * DEPTH) ** 0.5 * 2.0**-9 * right


def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    settings = {"steps": 3, "batch": 4, "dtype": "fp32"}
    plain, quick = (run(1, tmp_path / str(on), on_gpu(llama), settings | {"compile": on}, train_rows=DATA, seconds=900)
                    for on in (False, True))  # fmt: skip
    assert not any(plain.codes + quick.codes), (plain.said, quick.said)
    for left, right in zip(plain.history, quick.history, strict=True):
        # float32 on a path of DEPTH operations, forward and backward.
        assert left[2]["loss"] == pytest.approx(right[2]["loss"], rel=6 * (2 * DEPTH) ** 0.5 * 2.0**-23)


BILLION = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize("world", sorted({1, GPUS or 1}))
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_steps_of_a_billion_weights(way: str, world: int, tmp_path: Path) -> None:
    """Random weights, AdamW, bf16, layers recomputed, no reference, 4 pairs of 1024 tokens a process: prints tokens/s
    and the greatest memory, and holds the memory against the arithmetic of docs/scaling.md."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128000, (32, 3, 512), generator=draw).tolist()
    data = [TokenPair(row, *map(tuple, sides)) for row, sides in enumerate(ids)]

    def action(rank: int) -> None:
        device = f"cuda:{rank}"
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BILLION))
        model = model.to(device) if world == 1 else model
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
        config = TrainConfig(
            steps=6, batch=4, accumulation=world, dtype="bf16", gradient_checkpointing=True, objective="simpo",
            device="cuda", compile=way == "compiled",
        )  # fmt: skip
        result = train(config, model=model, train_rows=data)
        steps = [row["metrics"] for row in result.history if row["split"] == "train"]
        told = {"tokens/s": steps[-1]["tokens/s"], "GiB": torch.cuda.max_memory_allocated() / 2**30,
                "loss": [step["loss"] for step in steps]}  # fmt: skip
        (tmp_path / f"told-{rank}.json").write_text(json.dumps(told))

    codes = join(start(world, action, tmp_path), 1500)
    assert not any(codes), (tmp_path / "said-0.txt").read_text()
    told = json.loads((tmp_path / "told-0.json").read_text())
    print(f"{torch.cuda.get_device_name(0)} × {world}, {way}: {told}")
    assert all(abs(loss) < 100 for loss in told["loss"])
    weights, outside = 1.24e9, 0.263e9
    held = 16 * weights / world + (8 * outside if world > 1 else 0)
    # Beside it: inputs of 16 layers for 8192 tokens in float32, one layer recomputed, a chunk of logits: below 8 GiB.
    assert told["GiB"] < held / 2**30 + 8
