"""What a spy says of a model that was trained, cast, or left alone."""

import pytest
import torch

from dpocheck.worker.spies import watch


def model() -> torch.nn.Linear:
    made = torch.nn.Linear(1, 2, bias=False)
    made.weight.data.copy_(torch.tensor([[1.0 + 2.0**-20], [2.0]]))  # the first is no number of bfloat16
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_is_no_movement(dtype):
    watched = model()
    spy = watch(watched)
    watched.to(dtype)
    assert spy.report()["changed"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_moved_is_named_whatever_its_dtype_is_now(dtype):
    watched = model()
    spy = watch(watched)
    watched.to(dtype).weight.data[1] += 0.5
    assert spy.report()["changed"] == ["weight"]
