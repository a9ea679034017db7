"""Where does randomness come from, and how is it put back?  The generators of torch, NumPy and Python, as tensors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The state of every generator a model might draw from; name → integer tensor."""
    version, words, _ = random.getstate()
    _kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    states = {
        "torch.cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy.keys": torch.from_numpy(keys.astype(numpy.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"torch.cuda.{i}": torch.cuda.get_rng_state(device) for i, device in enumerate(_own_gpus())}
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Puts captured states back; a device that is not here any more is left out."""
    torch.set_rng_state(states["torch.cpu"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy.keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))
    if torch.cuda.is_available():
        for i, device in enumerate(_own_gpus()):
            if f"torch.cuda.{i}" in states:
                torch.cuda.set_rng_state(states[f"torch.cuda.{i}"], device)


def _own_gpus() -> list[int]:
    """Of several processes each has one: to ask for another's generator would open that GPU here too."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [torch.cuda.current_device()]
    return list(range(torch.cuda.device_count()))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators seeded inside, and as they were afterwards: a run does not disturb its caller."""
    before = capture()
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        with _deterministic_gpu():
            yield
    finally:
        restore(before)


@contextlib.contextmanager
def _deterministic_gpu() -> Iterator[None]:
    # On a CPU every operation used here is deterministic already; on a GPU some have a faster kernel that is not.
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
