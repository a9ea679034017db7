"""Do several processes compute what one computes?  Losses, metrics, gradients, norms and weights, over 20 steps.

All numbers are float64, so that 1e-10 tells a wrong divisor, a pair counted twice or a missing one (each moves them by
a percent and more) from another order of addition: 20 steps add up some thousand roundings of 1e-16 to numbers below
30, 1e-12 where they all go one way.

Run alone: pytest tests/reference/test_ranks_equal.py
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_optimum import SCALE_OUT, STRENGTHS, preferences, table_model
from torch import nn
from trainer_ranks import Outcome, one_thread, run
from trainer_tiny import gpt2, llama, pairs

from dpocheck.experiment import Body, Table, Tokenizer
from dpocheck.probes import tables
from reference_impl import LoraSettings, TokenPair
from reference_impl.logps import pair_logps

BOUND = 1e-10
BASE = {"steps": 20, "batch": 2, "accumulation": 4, "dtype": "fp64", "learning_rate": 1e-2, "warmup_steps": 2,
        "eval_every": 10, "eval_batch": 3, "clip_norm": 0.5}  # fmt: skip
# A step has 8 pairs, an epoch 21: 8, 8 and 5.  Two processes have 4 and 4, then 2 and 3, in parts of at most 2.
DATA, HELD = pairs(21), {"held": pairs(7, 1)}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def wide_llama() -> Any:
    """A Llama whose norms stay in float64: transformers' own round to float32 inside."""
    model = llama(dtype=torch.float64)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(16, eps=1e-6, dtype=torch.float64))
    return model


def silent() -> Any:
    return table_model(torch.float64).requires_grad_(True)


def glass() -> Any:
    """An exact table with one layer that lets the attended tokens through."""
    import transformers

    body, words = Body("glass"), Tokenizer(tuple("abcdefghijkl"), 16)
    entries = tuple((c, t, ((37 * c + 11 * t) % 64 - 32) / 16) for c in range(16) for t in range(16))
    settings = tables.configuration(16, body, "float64", words)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(torch.float64)
    arrays = tables.weights(Table(16, entries=entries), 16, body, "float64")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model


def small(count: int, seed: int = 0) -> list[TokenPair]:
    """Pairs in a vocabulary of 16."""
    return [TokenPair(p.row, *(tuple(t % 16 for t in side) for side in (p.prompt, p.chosen, p.rejected)))
            for p in pairs(count, seed)]  # fmt: skip


def same(many: Outcome, one: Outcome, bound: float = BOUND) -> tuple[float, float]:
    """Greatest difference of a metric, in units of the larger of 1 and the number, and of a weight, in units of the
    largest of its tensor: the heads of the tables are small."""
    assert [code for code in many.codes if code] == [], many.said
    assert [row[:2] for row in many.history] == [row[:2] for row in one.history]
    metrics = max(_apart(left[2][name], value) for left, right in zip(many.history, one.history, strict=True)
                  for name, value in right[2].items())  # fmt: skip
    weights = max((many.weights[name] - tensor).abs().max().item() / (tensor.abs().max().item() or 1)
                  for name, tensor in one.weights.items())  # fmt: skip
    assert max(metrics, weights) < bound, (metrics, weights)
    return metrics, weights


def _apart(left: float, right: float) -> float:
    return 0.0 if left == right else abs(left - right) / max(1.0, abs(right))


def check(tmp_path: Path, worlds: tuple[int, ...], model: Callable[[], Any], **settings: Any) -> None:
    given = {"train_rows": settings.pop("rows", DATA), "eval_rows": settings.pop("held", HELD)}
    given |= {name: settings.pop(name) for name in ("reference",) if name in settings}
    one = run(1, tmp_path / "1", model, BASE | {k: v for k, v in settings.items() if k != "shard"}, **given)
    assert one.codes == [0], one.said
    held = [row[2]["logps/chosen"] for row in one.history if row[1] == "held"]
    assert abs(held[-1] - held[0]) > 1e-3  # something was trained
    for world in worlds:
        many = run(world, tmp_path / str(world), model, BASE | settings, **given)
        metrics, weights = same(many, one)
        print(f"{world} processes: metrics differ by {metrics:.1e}, weights by {weights:.1e}")


TABLE = {"optimizer": "sgd", "clip_norm": SCALE_OUT, "held": {"held": small(7, 1)}, "rows": small(21)}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gpt2, tied head": (gpt2, {}),
    "llama": (wide_llama, {}),
    "silent table": (silent, {**TABLE, "learning_rate": 4 / SCALE_OUT**2}),
    "glass table": (glass, {**TABLE, "learning_rate": 4 / 2.0**28, "clip_norm": 2.0**14}),
}


def adapted() -> Any:
    """A Llama with an adapter that has been trained: the reference is a frozen copy of it."""
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(wide_llama(), settings, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


WAYS: dict[str, dict[str, Any]] = {
    "adapter": {"lora": LoraSettings(rank=2, targets=("q_proj", "down_proj"), modules_to_save=("lm_head",))},
    "layers recomputed": {"gradient_checkpointing": True},
    "reference given": {"reference": lambda: wide_llama().apply(_halve)},
    "reference precomputed": {"reference_logps": "precomputed", "reference_batch": 3},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "full logits": {"logps": "full"},
    "ipo with an sft term": {"objective": "ipo", "sft_weight": 0.5},
    "simpo, no reference": {"objective": "simpo", "gamma": 0.3},
    "batches of one": {"batch": 1, "accumulation": 8},
    "one batch": {"batch": 8, "accumulation": 1},
}


def _halve(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data *= 0.5


def settled(way: str, tmp_path: Path) -> dict[str, Any]:
    precomputed = way == "reference precomputed"
    return WAYS[way] | ({"reference_cache": str(tmp_path / "cache")} if precomputed else {})


def test_two_processes_equal_one(tmp_path: Path) -> None:
    check(tmp_path, (2,), gpt2)


def test_an_adapter_in_two_processes_equals_it_in_one(tmp_path: Path) -> None:
    check(tmp_path, (2,), wide_llama, **WAYS["adapter"], gradient_checkpointing=True)


def test_process_without_a_pair_takes_part_and_counts_nothing(tmp_path: Path) -> None:
    """Steps of 2 pairs of 5: 2, 2 and 1. The second process has none in the last."""
    check(tmp_path, (2,), wide_llama, rows=pairs(5), batch=1, accumulation=2, held={"held": pairs(1, 1)})


def test_two_copies_equal_one(tmp_path: Path) -> None:
    """HSDP in its smallest form: two groups of one process, whose gradients are added up."""
    check(tmp_path, (2,), wide_llama, shard=1, steps=5)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_processes_equals_one(name: str, tmp_path: Path) -> None:
    model, settings = MODELS[name]
    check(tmp_path, (2, 3, 4), model, **settings)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_equals_one_process(way: str, tmp_path: Path) -> None:
    check(tmp_path, (2, 3), wide_llama, **settled(way, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("given", [None, wide_llama])
def test_a_trained_adapter_in_several_processes_equals_it_in_one(given: Any, tmp_path: Path) -> None:
    check(tmp_path, (2, 3), adapted, reference=given)


@pytest.mark.long
@pytest.mark.parametrize("shard", [1, 2])
def test_four_processes_in_groups_equal_one(shard: int, tmp_path: Path) -> None:
    """A step of 4 pairs of 9: 4, 4 and 1, so that three of four processes have none in the last."""
    check(tmp_path, (4,), wide_llama, shard=shard, rows=pairs(9), batch=1, accumulation=4)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_gradient_of_every_weight_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    """One step of plain gradient descent at rate 1: the weights move by the gradient of the mean over 7 pairs."""
    settings = {"steps": 1, "batch": 2, "accumulation": 4, "dtype": "fp64", "optimizer": "sgd", "learning_rate": 1.0,
                "schedule": "constant", "clip_norm": None, "beta": 5.0}  # fmt: skip
    start = wide_llama().state_dict()
    moved = [{name: start[name] - tensor for name, tensor in found.weights.items()} for found in (
        run(count, tmp_path / str(count), wide_llama, settings, train_rows=pairs(7)) for count in (1, world))]
    largest = max(tensor.abs().max().item() for tensor in moved[0].values())
    assert largest > 0.01
    assert all(tensor.abs().max() > 0 for name, tensor in moved[0].items() if "rotary" not in name)
    assert max((moved[1][name] - tensor).abs().max().item() for name, tensor in moved[0].items()) < 1e-12


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_recover_the_closed_form_optimum(world: int, tmp_path: Path) -> None:
    """The optimum of test_trainer_optimum.py, 36 pairs in steps of 36 by 2 or 4 processes."""
    beta, steps = 0.5, 120
    settings = {"beta": beta, "optimizer": "sgd", "learning_rate": 4 / beta**2 / SCALE_OUT**2, "schedule": "constant",
                "clip_norm": None, "dtype": "fp64", "steps": steps, "batch": 36, "seed": 1}  # fmt: skip
    found = run(world, tmp_path, lambda: table_model(torch.float64), settings, train_rows=preferences())
    assert not any(found.codes), found.said
    model = table_model(torch.float64)
    model.load_state_dict(found.weights)
    asked = [TokenPair(0, (3,), (a,), (b,)) for a in STRENGTHS for b in STRENGTHS if a < b]
    with torch.no_grad():
        margins = [w - l for w, l in (pair_logps(m, asked, pad_id=0) for m in (model, table_model(torch.float64)))]
    expected = [math.log(STRENGTHS[p.chosen[0]] / STRENGTHS[p.rejected[0]]) for p in asked]
    # Convergence is linear at a rate below 0.8 a step: 0.8^120 = 2e-12 of a way of 1.8.
    assert (beta * (margins[0] - margins[1]) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9
