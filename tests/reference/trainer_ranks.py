"""How do the tests start several processes?  As forks, with what torchrun sets: no import is paid twice.

What a process of a run leaves behind is on the disk: its result as safetensors and JSON, its last words as text.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported here, before the forks, since every process needs them.
import scipy.stats  # noqa: F401
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainer_tiny import gpt2, llama, numbers

from reference_impl import TrainConfig, train

STORES: list[torch.distributed.TCPStore] = []
gpt2(), llama()  # their classes are imported when first asked for

@dataclass(frozen=True)
class Outcome:
    """What is left of a run: exit codes by rank, and of the first process its numbers and weights."""

    codes: list[int]
    history: list[Any]
    weights: dict[str, torch.Tensor]
    said: list[str]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A fork of a process with a pool of threads would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(world: int, action: Callable[[int], None], folder: Path) -> list[int]:
    """Forks `world` processes that run action(rank); returns their ids.  What they print goes to said-<rank>.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    # torchrun keeps the store through which processes meet, so that it outlives each of them; here this process does.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (folder / f"said-{rank}.txt").open("w", buffering=1) as said:
                    sys.stdout = sys.stderr = said
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True",
                    }  # fmt: skip
                    try:
                        action(rank)
                        code = 0
                    except SystemExit as end:
                        code = end.code
                    except BaseException:
                        traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def join(children: list[int], seconds: float = 240) -> list[int]:
    """Exit codes, negative for signals; what still runs after `seconds` is killed and counts as -9."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, 9)
        time.sleep(0.005)
    return [codes[child] for child in children]


def run(world: int, folder: Path, model: Callable[[], Any], config: dict[str, Any], **given: Any) -> Outcome:
    """Trains in `world` processes, 1 for a process alone; the model is made in each of them.  given: train's other
    arguments; a reference is a function that makes it; seconds: how long it may take."""
    make_reference, seconds = given.pop("reference", None), given.pop("seconds", 240)

    def action(rank: int) -> None:
        settings = TrainConfig(**{"device": "cpu", **config})
        result = train(settings, model=model(), reference=make_reference and make_reference(), **given)
        weights = {name: tensor.detach().clone() for name, tensor in result.model.state_dict().items()}
        save_file(weights, folder / f"weights-{rank}.safetensors")
        (folder / f"history-{rank}.json").write_text(json.dumps(numbers(result.history)))

    codes = join(start(world, action, folder), seconds)
    said = [(folder / f"said-{rank}.txt").read_text() for rank in range(world)]
    if any(codes):
        return Outcome(codes, [], {}, said)
    histories = [json.loads((folder / f"history-{rank}.json").read_text()) for rank in range(world)]
    every = [load_file(folder / f"weights-{rank}.safetensors") for rank in range(world)]
    for rank in range(1, world):  # what the processes of one run hold is one thing
        assert histories[rank] == histories[0]
        assert all(torch.equal(every[rank][name], tensor) for name, tensor in every[0].items())
    return Outcome(codes, histories[0], every[0], said)


def put_together(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files that may hold parts of them: by what the files' headers say, without torch's
    reader.  Every number has to be there exactly once."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in files:
        with safe_open(file, "pt") as held:
            places = json.loads((held.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in held.keys():  # noqa: SIM118 (not a dict)
                tensor = held.get_tensor(name)
                begin = places[name]["saved_offsets"] if places else [0] * tensor.dim()
                parts.setdefault(name, []).append((begin, tensor))
    wholes = {}
    for name, found in parts.items():
        shape = [max(b[d] + t.shape[d] for b, t in found) for d in range(found[0][1].dim())]
        whole, times = found[0][1].new_zeros(shape), torch.zeros(shape)
        for begin, tensor in found:
            place = tuple(slice(b, b + size) for b, size in zip(begin, tensor.shape, strict=True))
            whole[place], times[place] = tensor, times[place] + 1
        assert (times == 1).all(), name
        wholes[name] = whole
    return wholes
