"""Which pairs does each optimizer step see?  A pure function of the seed, the epoch and how many pairs came before.

No generator runs along with the training, so a run is continued from two numbers (epoch, pairs consumed), whatever the
size of its micro-batches and the number of its processes.  An optimizer step never takes pairs of two epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Position:
    """Where the data stands: pairs of `epoch` (from 0) that optimizer steps have consumed."""

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class Window:
    """The pairs of one optimizer step, as indices, and the position after it."""

    indices: tuple[int, ...]
    after: Position


@dataclass(frozen=True)
class Part:
    """What one process scores in one forward pass.

    idle: it has no pair left while others have, and scores one that counts nothing, since every process has to take
    part in every forward and backward pass.
    """

    indices: tuple[int, ...]
    idle: bool = False


def parts(indices: Sequence[int], size: int, rank: int = 0, world: int = 1) -> list[Part]:
    """One process's share of some pairs, in consecutive parts of at most `size`; the last may be smaller.

    The shares of the processes, by rank, are the indices in order, and differ by at most one pair.  Every process gets
    the same number of parts.
    """
    share = indices[len(indices) * rank // world : len(indices) * (rank + 1) // world]
    mine = [Part(tuple(share[start : start + size])) for start in range(0, len(share), size)]
    largest = -(-len(indices) // world)
    return mine + [Part((indices[0],), idle=True)] * (-(-largest // size) - len(mine))


def epoch_order(pairs: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The indices 0 … pairs − 1 in the order of one epoch."""
    if not shuffle:
        return list(range(pairs))
    # A seed of its own for each (seed, epoch): seed + epoch would give run 1's second epoch to run 2's first.
    digest = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(pairs, generator=generator).tolist()


def steps_per_epoch(pairs: int, pairs_per_step: int, last_step: str) -> int:
    """Optimizer steps in an epoch: rounded up where the short last one is kept, down where it is dropped."""
    return pairs // pairs_per_step if last_step == "drop" else -(-pairs // pairs_per_step)


def windows(
    pairs: int, pairs_per_step: int, *, seed: int, shuffle: bool, last_step: str, start: Position
) -> Iterator[Window]:
    """The optimizer steps from `start` on, epoch after epoch, without end.

    Raises:
        ValueError: an epoch would have no step at all.
    """
    if steps_per_epoch(pairs, pairs_per_step, last_step) == 0:
        raise ValueError(
            f"{pairs} pairs do not fill one optimizer step of {pairs_per_step}: "
            "set last_step=keep, or lower batch or accumulation"
        )
    epoch, consumed = start.epoch, start.consumed
    while True:
        order = epoch_order(pairs, seed, epoch, shuffle)
        end = pairs - pairs % pairs_per_step if last_step == "drop" else pairs
        while consumed < end:
            indices = tuple(order[consumed : min(consumed + pairs_per_step, end)])
            consumed += len(indices)
            done = consumed >= end
            yield Window(indices, Position(epoch + 1, 0) if done else Position(epoch, consumed))
        epoch, consumed = epoch + 1, 0
