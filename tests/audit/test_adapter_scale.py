"""Do two steps of an adapter tell what its product is multiplied by?  The arithmetic of LORA-SCALE, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from dpocheck.checks.lora import _second_step

RATE, RANK = 256.0, 4
DRAWN = np.random.default_rng(7)
GRADIENT = DRAWN.normal(size=(12, 16)) / 8
START = DRAWN.uniform(-0.25, 0.25, size=(RANK, 16))


def changes(scale: float, *, second: np.ndarray = GRADIENT) -> tuple[np.ndarray, np.ndarray]:
    """scale * B A less its start, after one and after two steps of SGD."""
    a, b, found = START.copy(), np.zeros((12, RANK)), []
    for gradient in (GRADIENT, second):
        of_b, of_a = scale * gradient @ a.T, scale * b.T @ gradient
        b, a = b - RATE * of_b, a - RATE * of_a
        found.append(scale * b @ a)
    return found[0], found[1]


@pytest.mark.parametrize("scale", [2.0**-9, 2.0**-8, 2.0**-7])
def test_the_scale_is_found_exactly_where_the_gradient_stands_still(scale):
    told = _second_step(GRADIENT, *changes(scale), RANK, 2.0**-53)
    assert told.eta == pytest.approx(RATE * scale, rel=1e-8)
    assert max(told.rest, told.open_) < 1e-8


def test_a_gradient_that_drifts_moves_the_scale_by_less_than_it_leaves_open():
    for share in (0.002, 0.01, 0.02):
        second = GRADIENT + share * np.linalg.norm(GRADIENT) / 14 * DRAWN.normal(size=GRADIENT.shape)
        told = _second_step(GRADIENT, *changes(2.0**-8, second=second), RANK, 2.0**-53)
        assert 0.0 < abs(told.eta / RATE * 2.0**8 - 1.0) < told.open_ < 0.25
        assert told.rest < told.open_


def test_another_gradient_than_the_models_is_not_taken_for_a_scale():
    """A fit that leaves what turned is no finding: such two steps stay undecided."""
    other = DRAWN.normal(size=GRADIENT.shape) / 8
    told = _second_step(other, *changes(2.0**-8), RANK, 2.0**-53)
    assert told.open_ > 0.25 or told.rest > told.open_
