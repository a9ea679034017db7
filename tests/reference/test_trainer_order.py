"""Is the order of data a function of seed and epoch alone, and the learning rate one of the step alone?

Run alone: pytest tests/reference/test_trainer_order.py
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_tiny import llama

from reference_impl.config import TrainConfig
from reference_impl.evaluate import mean_interval, proportion_interval
from reference_impl.metrics import PairSums
from reference_impl.optimize import build_optimizer, learning_rate, load_optimizer_state, optimizer_state
from reference_impl.order import Position, epoch_order, parts, steps_per_epoch, windows
from reference_impl.processes import ALONE
from reference_impl.shards import save_tensors

sizes = st.integers(1, 40)


@given(st.integers(0, 60), st.integers(0, 2**40), st.integers(0, 50))
def test_epoch_has_each_pair_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(count, seed, epoch, True)) == list(range(count))
    assert epoch_order(count, seed, epoch, False) == list(range(count))


def test_order_differs_between_epochs_and_seeds_and_no_seed_repeats_anothers_epochs() -> None:
    orders = {(seed, epoch): tuple(epoch_order(30, seed, epoch, True)) for seed in range(8) for epoch in range(8)}
    assert len(set(orders.values())) == 64
    assert orders[3, 2] == tuple(epoch_order(30, 3, 2, True))


def test_order_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = epoch_order(30, 0, 0, True)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert epoch_order(30, 0, 0, True) == first
    assert torch.equal(before, torch.get_rng_state())


@given(sizes, sizes, st.sampled_from(["keep", "drop"]), st.integers(0, 12))
def test_continuing_anywhere_gives_the_same_windows(count: int, per_step: int, last_step: str, step: int) -> None:
    """The windows after any position are those of the run from the beginning; epochs never mix."""
    if steps_per_epoch(count, per_step, last_step) == 0:
        with pytest.raises(ValueError, match="do not fill one optimizer step"):
            next(windows(count, per_step, seed=1, shuffle=True, last_step=last_step, start=Position()))
        return
    settings = {"seed": 1, "shuffle": True, "last_step": last_step}
    whole = list(itertools.islice(windows(count, per_step, start=Position(), **settings), step + 6 + count))
    start = whole[step - 1].after if step else Position()
    assert list(itertools.islice(windows(count, per_step, start=start, **settings), 6)) == whole[step : step + 6]
    per_epoch = steps_per_epoch(count, per_step, last_step)
    seen = [index for window in whole[:per_epoch] for index in window.indices]
    assert len(seen) == len(set(seen)) == (count if last_step == "keep" else count - count % per_step)


@given(sizes, sizes)
def test_parts_are_the_window_in_order(count: int, size: int) -> None:
    window = next(windows(count, count, seed=0, shuffle=True, last_step="keep", start=Position()))
    cut = [part.indices for part in parts(window.indices, size)]
    assert tuple(itertools.chain(*cut)) == window.indices
    assert all(len(part) == size for part in cut[:-1])
    assert 1 <= len(cut[-1]) <= size


@given(sizes, sizes, st.integers(1, 9))
def test_processes_share_a_window_without_loss_or_repetition(count: int, size: int, world: int) -> None:
    """In order by rank, shares at most one pair apart, and as many forward passes in each process as in the others."""
    window = next(windows(count, count, seed=0, shuffle=True, last_step="keep", start=Position()))
    shares = [parts(window.indices, size, rank, world) for rank in range(world)]
    counted = [[index for part in share if not part.idle for index in part.indices] for share in shares]
    assert tuple(itertools.chain(*counted)) == window.indices
    assert max(map(len, counted)) - min(map(len, counted)) <= 1
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(part.indices) <= size for share in shares for part in share)


def rates(total: int, **settings: object) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_schedules_by_hand() -> None:
    # 4 steps: linear (4 − k)/4; cosine ½(1 + cos πk/4); with two warm-up steps (k+1)/3, then (4 − k)/2.
    assert rates(4, schedule="constant") == [1, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2], rel=1e-15)
    assert rates(4, schedule="linear", warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.5], rel=1e-15)
    assert rates(4, schedule="linear", warmup_steps=2, warmup_first="zero") == [0, 0.5, 1, 0.5]


@given(st.integers(1, 60), st.data(), st.sampled_from(["constant", "linear", "cosine"]))
def test_no_rate_is_zero_or_above_the_peak(total: int, data: st.DataObject, kind: str) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    found = rates(total, schedule=kind, warmup_steps=warmup)
    assert all(0 < rate <= 1 for rate in found)
    assert found[warmup] == 1.0
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_state_goes_through_a_file_and_back(kind: str, tmp_path: Path) -> None:
    config = TrainConfig(optimizer=kind, **({"momentum": 0.9} if kind == "sgd" else {}))
    left, right = llama(), llama()
    optimizers = [build_optimizer(model, config) for model in (left, right)]
    for model in (left, right):
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizers[0].step()
    saved = optimizer_state(left, optimizers[0])
    save_tensors(saved, tmp_path / "optimizer", ALONE)
    load_optimizer_state(right, optimizers[1], tmp_path / "optimizer", ALONE)
    again = optimizer_state(right, optimizers[1])
    assert saved.keys() == again.keys()
    assert len(saved) >= len(list(left.parameters()))
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_sums_over_uneven_batches_are_exact() -> None:
    sums = PairSums()
    for part in ([1.0, 2.0], [3.0], [4.0, 5.0, 9.0]):
        sums.add({"x": torch.tensor(part)})
    assert sums.pairs == 6
    assert sums.means() == {"x": 4.0}  # 24 / 6; the mean of the means 1.5, 3, 6 would be 3.5


def test_many_float32_values_do_not_lose_digits() -> None:
    # 2²⁴ + 1 is not a float32: adding ones to 2²⁴ in float32 would stay there.
    sums = PairSums()
    sums.add({"x": torch.tensor([2.0**24])})
    for _ in range(3):
        sums.add({"x": torch.tensor([1.0])})
    assert sums.means()["x"] == (2**24 + 3) / 4


def test_intervals_by_hand() -> None:
    # 0 of n: Clopper-Pearson's upper end is 1 − (α/2)^(1/n).
    assert proportion_interval(0, 10, 0.95) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)), rel=1e-9)
    # Two values a, b: mean ± t₀.₉₇₅(1) · |a−b|/2 with t = 12.7062047.
    low, high = mean_interval(torch.tensor([1.0, 3.0], dtype=torch.float64), 0.95)
    assert (low, high) == pytest.approx((2 - 12.7062047362, 2 + 12.7062047362), rel=1e-9)
    assert mean_interval(torch.tensor([1.0], dtype=torch.float64), 0.95) == (-math.inf, math.inf)


def test_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    # 2000 samples of 8 normal values: coverage 0.9 ± 4 standard errors of √(0.9·0.1/2000) = 0.0067.
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    covered = sum(low <= 0 <= high for low, high in (mean_interval(sample, 0.9) for sample in samples))
    assert abs(covered / 2000 - 0.9) < 4 * 0.0067
