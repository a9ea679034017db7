"""How do several processes train as one?  Parts: share, exchange; `gather` is in `step`.

`torchrun`, or whoever starts the processes, says in the environment which of how many each is; they talk through
torch.distributed (gloo).  A run asks for `recipe.world_size` of them.  Alone, every part is the identity.

The rule that makes N ranks equal one: each loss is divided by the pairs of *all* ranks, and the gradients are added.
Frameworks average gradients instead, so that `reduce` multiplies by the number of ranks; the mean takes it back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed


def here() -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) where it is alone."""
    joined = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)


@contextmanager
def together(ranks: int) -> Iterator[None]:
    """Join the other processes of a run, and leave them at its end.

    Raises ValueError where this process was not started as one of so many.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and started != ranks:
        raise ValueError(
            f"the recipe asks for {ranks} processes and this is one of {started}: "
            f"start it with torchrun --nproc-per-node {ranks}"
        )
    if ranks == 1:
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Go on once every rank is here."""
    if here()[1] > 1:
        distributed.barrier()


def added(number: int) -> int:
    """The sum of the ranks' numbers."""
    total = torch.tensor(number)
    if here()[1] > 1:
        distributed.all_reduce(total)
    return int(total)


def share(rows: Sequence[Any], size: int) -> Sequence[Any]:
    """This rank's part of a batch over all ranks: `size` consecutive rows, fewer or none where the batch is short."""
    rank, _ = here()
    return rows[rank * size : (rank + 1) * size]


def exchange(parameters: Sequence[torch.Tensor]) -> None:
    """Each gradient becomes the mean of the ranks' gradients.  A rank that had no pair adds zeros."""
    _, ranks = here()
    if ranks == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= ranks
