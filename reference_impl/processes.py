"""Which processes train this model together, and how do they agree?  torch.distributed, asked in plain words.

What they say to each other is JSON and tensors, never a pickle.  A process alone answers the same questions without
torch.distributed: `ALONE` is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from reference_impl.config import ConfigError

if TYPE_CHECKING:
    from reference_impl.config import TrainConfig

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another that is alive but silent; one that has died is noticed at once."""
MARK = "dpo-train/said"

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached; says what to do."""


class OtherProcessError(RuntimeError):
    """Another process of the run failed in a way that has no name here."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    rank: 0 … world − 1; device: where this one computes, None for a process alone (its model says).
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def ask(self, value: Any) -> list[Any]:
        """What every process says, by rank; JSON values."""
        if self.world == 1:
            return [value]
        return [json.loads(bytes(words.tolist())) for words in self.gather(_words(value))]

    def tell(self, value: Any) -> Any:
        """What the first process says."""
        return self.ask(value if self.first else None)[0]

    def any(self, flag: bool) -> bool:
        return flag if self.world == 1 else any(self.ask(flag))

    def gather(self, values: Tensor) -> list[Tensor]:
        """The vector of every process, by rank; one dtype, any lengths."""
        if self.world == 1:
            return [values]
        import torch.distributed as dist

        values = values.detach().cpu().contiguous()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(values)]))
        width = max(int(size) for size in sizes)
        padded = [values.new_zeros(width) for _ in range(self.world)]
        dist.all_gather(padded, torch.cat([values, values.new_zeros(width - len(values))]))
        return [vector[: int(size)] for vector, size in zip(padded, sizes, strict=True)]

    def add(self, values: Tensor) -> Tensor:
        """The sum over processes of a vector, in the order of the ranks: the same bits on all of them, each time."""
        total, *rest = self.gather(values)
        for other in rest:
            total = total + other
        return total

    def together(self, action: Callable[[], T]) -> T:
        """The action's result, where it succeeds in every process; where it fails in one, its error in all of them.

        The action must not talk to other processes.  Of several errors all raise the lowest rank's.
        """
        if self.world == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        said = self.ask(None if error is None else [type(error).__module__, type(error).__qualname__, str(error)])
        rank, problem = next(((r, p) for r, p in enumerate(said) if p is not None), (None, None))
        if problem is None:
            return result  # type: ignore[return-value]
        if rank == self.rank:
            raise error  # type: ignore[misc]
        raise _rebuilt(rank, *problem)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self.ask(None)


ALONE = Processes()


def number() -> int:
    """How many processes a launcher has started; 1 without one.

    Raises:
        ConfigError: WORLD_SIZE is not a number.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdigit() or int(said) < 1:
        raise ConfigError(f"WORLD_SIZE is {said!r}, but should be a number of processes: start them with torchrun")
    return int(said)


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Processes]:
    """The processes of a run, from its first line to its last.  They are torchrun's; without it there is one.

    Raises:
        ConfigError: settings that these processes cannot have, or that differ between them; the same in all of them.
    """
    world = number()
    check(config, world)
    if world == 1:
        yield ALONE
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    device = _device(config)
    if ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Both: what processes say is on the CPU, and so is what cpu_offload keeps there.
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{world} processes were started (WORLD_SIZE={world}), but cannot find each other "
                f"({_first_line(error)}): start them with torchrun"
            ) from error
    elif "gloo" not in str(dist.get_backend_config()):
        raise ConfigError("the process group that was there has no gloo: init_process_group('cpu:gloo,cuda:nccl')")
    crew = Processes(dist.get_rank(), dist.get_world_size(), device)
    try:
        _same_settings(config, crew)
        yield crew
    except BaseException as error:
        if is_loss(error):
            raise LostProcessError(
                f"process {crew.rank} of {crew.world} can no longer reach another one, which has ended "
                f"({_reason(error)}): its own message says why; the same command goes on from the last checkpoint"
            ) from error
        if ours and isinstance(error, Exception):
            _leave(crew, timedelta(seconds=5))  # all of them are here, unless this one failed alone
        raise
    if ours:
        _leave(crew, PATIENCE)


def check(config: TrainConfig, world: int) -> None:
    """Raises ConfigError for settings that so many processes cannot have."""
    if world == 1:
        for name in ("shard", "cpu_offload"):
            if getattr(config, name):
                raise ConfigError(f"{name}={getattr(config, name)} has no effect: there is one process, not started by "
                                  "torchrun with several")  # fmt: skip
        return
    if world > config.pairs_per_step:
        raise ConfigError(
            f"{world} processes were started, but an optimizer step has batch × accumulation = "
            f"{config.pairs_per_step} pairs: start at most {config.pairs_per_step}, or raise batch or accumulation"
        )
    if config.shard is not None and world % config.shard:
        good = [str(size) for size in range(1, world + 1) if world % size == 0]
        raise ConfigError(
            f"shard is {config.shard}, which does not divide {world} processes: allowed are {', '.join(good)}"
        )


def is_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other side has gone away."""
    if not isinstance(error, RuntimeError) or isinstance(error, LostProcessError):
        return False
    import torch.distributed as dist

    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def speaks_first() -> bool:
    """Whether no other process of the run has asked this before: of several that fail, one tells the person."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add(MARK, 1) == 1
    except RuntimeError:  # the store has gone with the process that kept it
        return True


def _leave(crew: Processes, patience: timedelta) -> None:
    """Ends the group after every process has come here: one that ends sooner can abort another's last words.

    The first one ends last, since it may be the one that keeps the store through which they meet.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    end = time.monotonic() + patience.total_seconds()

    def all_others(key: str) -> None:
        while store.add(key, 0) < crew.world - 1:
            if time.monotonic() > end:
                raise RuntimeError(f"not all processes have come to {key}")
            time.sleep(0.005)

    with contextlib.suppress(RuntimeError):
        if crew.first:
            all_others("dpo-train/here")
            store.set("dpo-train/all here", "1")
            all_others("dpo-train/gone")
        else:
            store.add("dpo-train/here", 1)
            store.wait(["dpo-train/all here"], patience)
            store.add("dpo-train/gone", 1)
        dist.destroy_process_group()


def _device(config: TrainConfig) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if config.cpu_offload:
            raise ConfigError("cpu_offload=True has no effect on a CPU: the weights are in its memory already")
        return torch.device("cpu")
    if kind != "cuda":
        raise ConfigError(f"device is {kind!r}, but each of {number()} processes has its own: set auto, cuda or cpu")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(f"device is cuda, but this machine has {there} GPUs for {local + 1} processes or more")
    return torch.device("cuda", local)


def _same_settings(config: TrainConfig, crew: Processes) -> None:
    said = crew.ask(dataclasses.asdict(config))
    for rank, other in enumerate(said):
        if changed := [name for name in said[0] if other[name] != said[0][name]]:
            name = changed[0]
            raise ConfigError(
                f"the processes have different settings: {name} is {said[0][name]} in process 0 and {other[name]} in "
                f"process {rank}: start all with one command"
            )


def _rebuilt(rank: int, module: str, name: str, text: str) -> Exception:
    """Another process's error, of its own class where that is one of this package's."""
    if module.startswith("reference_impl."):
        kind = getattr(importlib.import_module(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            error = kind.__new__(kind)
            error.args = (text,)
            return error
    return OtherProcessError(f"process {rank} failed: {name}: {text}")


def _words(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _reason(error: BaseException) -> str:
    """Without the place in torch's sources, and without its advice."""
    return re.sub(r"^\[[^]]*\] ", "", _first_line(error)).split(". ")[0]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
