"""Where do the weights lie, what is gathered how often, and what do rounded numbers cost?

Run alone: pytest tests/reference/test_ranks_layout.py
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from trainer_ranks import join, one_thread, run, start
from trainer_tiny import gpt2, llama, pairs

from reference_impl import TrainConfig, logps, parallel, train
from reference_impl.processes import Processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")
DATA, HELD = pairs(16), {"held": pairs(8, 1)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def collectives(folder: Path, at_once: int) -> dict[str, int]:
    """How often a step of one micro-batch gathers weights and adds up gradients, with so many logits at a time."""

    def action(rank: int) -> None:
        counted = dict.fromkeys(("all_gather_single", "reduce_scatter_single"), 0)

        def counting(name: str) -> Any:
            right = getattr(dist, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                counted[name] += 1
                return right(*args, **kwargs)

            return call

        for name in counted:
            setattr(dist, name, counting(name))
        logps.LOGITS_AT_ONCE = at_once
        config = TrainConfig(steps=1, batch=8, objective="simpo", clip_norm=None, device="cpu")
        train(config, model=llama(), train_rows=DATA)
        (folder / f"counted-{rank}.json").write_text(json.dumps(counted))

    assert join(start(2, action, folder)) == [0, 0], (folder / "said-0.txt").read_text()
    first, second = (json.loads((folder / f"counted-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


def test_head_is_gathered_once_a_step_however_many_chunks(tmp_path: Path) -> None:
    """Three groups: two layers, and what is outside them. A layer is gathered for its forward and its backward pass,
    the rest once for both: 2 · 2 + 1. Each group's gradient is added up once. Chunks of one position change neither."""
    expected = {"all_gather_single": 5, "reduce_scatter_single": 3}
    assert collectives(tmp_path / "one", at_once=32) == expected
    assert collectives(tmp_path / "many", at_once=2**24) == expected


# Operations after one another between a token and its logits: a layer has two norms, the four products of attention,
# rotation, scores, softmax, the product with them, three products of the feed-forward, its gate, and two additions.
DEPTH = 2 * 16 + 3


@pytest.mark.parametrize(
    ("dtype", "roundoff"), [("fp32", 2.0**-24), pytest.param("bf16", 2.0**-9, marks=pytest.mark.long)]
)
def test_rounded_numbers_stay_within_what_rounding_explains(dtype: str, roundoff: float, tmp_path: Path) -> None:
    """A stock Llama in two processes against float64 in one.

    Each operation rounds by a relative error of at most u, independently, and on a normalised residual stream errors
    pass on as they are: a logit is off by √DEPTH · u · max|logit| in the standard deviation, a log-prob by √2 of that,
    a sum of T tokens by √T; a gradient, twice as deep, by √(2 DEPTH) · u of its norm.  Six deviations are allowed.
    Over a run of gradient descent the loss is off by what its log-probs are and by Σ rate · |g|² · (error of g).
    """
    steps, rate = 5, 5e-2
    settings = {"steps": steps, "batch": 8, "learning_rate": rate, "optimizer": "sgd", "schedule": "constant",
                "clip_norm": None, "beta": 0.5}  # fmt: skip
    given = {"train_rows": DATA, "eval_rows": HELD}
    exact = run(1, tmp_path / "exact", lambda: llama(dtype=torch.float64), settings | {"dtype": "fp64"}, **given)
    rounded = run(2, tmp_path / "rounded", llama, settings | {"dtype": dtype}, **given)
    assert not any(exact.codes + rounded.codes), (exact.said, rounded.said)
    with torch.no_grad():
        largest = llama(dtype=torch.float64)(torch.arange(32)[None]).logits.abs().max().item()
    tokens = max(len(side) for pair in DATA + HELD["held"] for side in (pair.chosen, pair.rejected))
    logp = 6 * math.sqrt(2 * DEPTH * tokens) * roundoff * largest
    gradient = 6 * math.sqrt(2 * DEPTH) * roundoff
    assert gradient < 0.25  # a wrong divisor is off by half and more
    rows = list(zip(rounded.history, exact.history, strict=True))
    start_of_it, first, last = rows[0], rows[1], rows[-2]
    for name in ("logps/chosen", "logps/rejected"):
        # Adding T numbers of size log V rounds too, in float32 always.
        sums = 6 * math.sqrt(tokens) * 2.0**-24 * tokens * math.log(32)
        assert abs(start_of_it[0][2][name] - start_of_it[1][2][name]) < logp + sums
    norm = first[1][2]["grad_norm"]
    assert abs(first[0][2]["grad_norm"] - norm) < gradient * norm
    drift = steps * rate * max(row[2]["grad_norm"] for row in exact.history if row[1] == "train") ** 2 * gradient
    assert abs(last[0][2]["loss"] - last[1][2]["loss"]) < 0.5 * 4 * (logp + sums) + drift
    assert abs(exact.history[-2][2]["loss"] - exact.history[0][2]["loss"]) > 1e-3  # the run went somewhere


def rows_of(tensor: Any) -> tuple[int, int]:
    """First and last row (excluded) that a checkpoint's plan gives this process of a tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


def lay_out(world: int, rank: int, shard: int | None, **sizes: int) -> dict[str, Any]:
    """What one process of `world` holds of a Llama of these sizes: nothing is allocated, nobody is asked."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    settings = transformers.LlamaConfig(**sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    crew = Processes(rank, world, torch.device("meta"))
    config = TrainConfig(dtype="bf16", shard=shard, batch=world)
    mesh = parallel.mesh_of(config, Processes(rank, world, torch.device("cpu")))
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parallel.spread(model, mesh, config, crew)
    parts = {name: rows_of(p) for name, p in model.named_parameters()}
    local = {name: p.to_local().shape[0] for name, p in model.named_parameters()}
    dist.destroy_process_group()
    return {"whole": whole, "parts": parts, "local": local}


LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip


@pytest.mark.parametrize(("world", "shard"), [(8, None), (6, None), (64, 8)])
def test_eight_billion_weights_are_shared_out_without_being_made(
    world: int, shard: int | None, tmp_path: Path
) -> None:
    """On the meta device, as each of the processes in turn: every row of every weight has one place in a group."""
    sizes = LLAMA_8B | {"num_hidden_layers": 2}
    ranks = [0, 1, world - 1]

    group = shard or world
    for rank in ranks:
        file = tmp_path / f"held-{rank}.json"

        def action(_: int, rank: int = rank, file: Path = file) -> None:
            file.write_text(json.dumps(lay_out(world, rank, shard, **sizes)))

        assert join(start(1, action, tmp_path)) == [0], (tmp_path / "said-0.txt").read_text()
        held = json.loads(file.read_text())
        for name, shape in held["whole"].items():
            size = -(-shape[0] // group)
            begin = min(shape[0], (rank % group) * size)
            end = min(shape[0], begin + size)
            assert held["parts"][name] == [begin, end]
            assert held["local"][name] == end - begin


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_layers_compute_the_same(world: int, tmp_path: Path) -> None:
    settings = {"steps": 4, "batch": 4, "dtype": "fp64", "learning_rate": 1e-2}
    plain = run(world, tmp_path / "plain", gpt2, settings, train_rows=DATA)
    quick = run(world, tmp_path / "quick", gpt2, settings | {"compile": True}, train_rows=DATA, seconds=1200)
    assert not any(plain.codes + quick.codes), (plain.said, quick.said)
    assert max((plain.weights[name] - tensor).abs().max().item() for name, tensor in quick.weights.items()) < 1e-12
