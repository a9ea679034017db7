"""How do scored pairs move the policy, and what is logged?

Parts: reduce, accumulate, clip, update, order, gather, metrics, evaluate.

Choices that the sources leave open: every pair of a window weighs the same, in the gradient and in what is logged; a
short last batch and a short last window are kept; warm-up starts at 1/w of the rate, so that the first step moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import distributed

from dpocheck.adapter import Unsupported
from dpocheck.experiment import Recipe
from dpocheck.miniature.parts import Parts
from dpocheck.miniature.ranks import added, here
from dpocheck.miniature.rows import Batch, batches_of
from dpocheck.miniature.scores import Scored


def reduce(losses: torch.Tensor, pairs: int, ranks: int) -> torch.Tensor:
    """The share of (pair,) losses in the mean over a window of `pairs` on all ranks, times `ranks`: `exchange` takes
    the mean of the ranks' gradients, and their sum is due."""
    return losses.sum() * ranks / pairs


def accumulate(
    trainer: Parts, policy: Any, window: Sequence[Batch], score: Callable[[Batch], Scored], recipe: Recipe
) -> list[Scored]:
    """Backward over this rank's micro-batches of a window.  Every pair weighs 1 / (pairs of the window on all ranks):
    the shares add up."""
    pairs = added(sum(batch.pairs for batch in window))
    seen = []
    for batch in window:
        scored = score(batch)
        trainer.reduce(scored.losses, pairs, recipe.world_size).backward()
        seen.append(scored.detached())
    return seen


def clip(parameters: Sequence[torch.Tensor], limit: float | None) -> float:
    """The global norm of the gradient before it is scaled down to `limit`, if there is one."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))


def factor(recipe: Recipe, clock: int, total: int) -> float:
    """What the learning rate is multiplied by at step `clock`, counted from 0: the first step already moves."""
    warmup = recipe.warmup_steps
    if clock < warmup:
        return (clock + 1) / warmup
    done = (clock - warmup) / max(1, total - warmup)
    shapes = {"constant": lambda: 1.0, "linear": lambda: 1 - done, "cosine": lambda: (1 + math.cos(math.pi * done)) / 2}
    if recipe.schedule not in shapes:
        raise Unsupported(f"schedule {recipe.schedule!r}")
    return shapes[recipe.schedule]()


def update(optimizer: torch.optim.Optimizer, recipe: Recipe, clock: int, total: int) -> float:
    """One optimizer step at the scheduled rate, which is returned; the gradients are cleared."""
    rate = recipe.learning_rate * factor(recipe, clock, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return rate


def order(rows: int, recipe: Recipe, epoch: int) -> list[list[list[int]]]:
    """An epoch's windows of micro-batches of row indices, over all ranks: a function of seed and epoch alone."""
    indices = list(range(rows))
    if recipe.shuffle:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        indices = torch.randperm(rows, generator=generator).tolist()
    size = recipe.batch * recipe.world_size
    micro_batches = [batch for batch in batches_of(indices, size) if len(batch) == size or not recipe.drop_last]
    return batches_of(micro_batches, recipe.accumulation)


def gather(seen: Sequence[Scored]) -> list[Scored]:
    """What was scored on all ranks, in the order of the ranks."""
    _, ranks = here()
    if ranks == 1:
        return list(seen)
    names = [field.name for field in fields(Scored)]
    own = [torch.cat([getattr(s, name) for s in seen]).double() if seen else torch.zeros(0).double() for name in names]
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(own[0])]))
    longest = max(int(count) for count in counts)
    padded = torch.zeros(len(names), longest, dtype=torch.float64)
    padded[:, : len(own[0])] = torch.stack(own)
    everyone = [torch.zeros_like(padded) for _ in range(ranks)]
    distributed.all_gather(everyone, padded)
    return [Scored(*table[:, : int(count)]) for table, count in zip(everyone, counts, strict=True) if int(count)]


def metrics(seen: Sequence[Scored]) -> dict[str, float]:
    """Means over the pairs of a window or of an evaluation set; every pair weighs the same."""
    all_pairs = Scored(*(torch.cat([getattr(s, f.name) for s in seen]) for f in fields(Scored)))
    chosen, rejected = all_pairs.rewards_chosen, all_pairs.rewards_rejected
    per_pair = {
        "loss": all_pairs.losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": all_pairs.policy_chosen,
        "logps/rejected": all_pairs.policy_rejected,
    }
    return {name: values.double().mean().item() for name, values in per_pair.items()}


def evaluate(
    trainer: Parts, policy: Any, score: Callable[[Batch], Scored], batches: Sequence[Batch]
) -> dict[str, float]:
    """The metrics of an evaluation set; nothing of the training state is touched."""
    with torch.no_grad():
        return trainer.metrics(trainer.gather([score(batch) for batch in batches]))
