"""How do many processes write and read one checkpoint?  Each some whole tensors; each only its own part of them.

A tensor that lies in parts over the processes is gathered and written whole by one of them, and all share the work.
The files are those of one process but for their number (the Hub's `-00001-of-00004`), so that anything loads them, and
a run goes on with any number of processes.  The folder is there whole or not at all: see files.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_impl.files import begin, digest, names, seal, sync, whole_folder, writing_folder
from reference_impl.processes import Processes


@contextlib.contextmanager
def shared_folder(target: Path, facts: dict[str, Any], crew: Processes) -> Iterator[Path]:
    """whole_folder for several processes, which have to see one disk: each writes files of its own inside.

    After an error in one process nothing is left, and all of them raise.
    """
    if crew.world == 1:
        with whole_folder(target, facts) as folder:
            yield folder
        return
    folder = writing_folder(target)
    crew.together(lambda: begin(target) and None if crew.first else None)
    try:
        yield folder
        digests = crew.ask(crew.together(lambda: _own_digests(folder, crew)))
        files = {name: found for mine in digests for name, found in mine.items()}
        crew.together(lambda: _seal(folder, target, facts, files) if crew.first else None)
    except BaseException:
        if crew.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _own_digests(folder: Path, crew: Processes) -> dict[str, Any]:
    mine = [name for name in names(folder) if _writer(name) == crew.rank]
    for name in mine:
        sync(folder / name)
    return {name: digest(folder / name) for name in mine}


def _seal(folder: Path, target: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
    if unseen := sorted(files.keys() - set(names(folder))):
        raise OSError(f"{unseen[0]} of another process cannot be seen here: output_dir has to be a disk that all share")
    seal(folder, target, facts, files)


def _writer(name: str) -> int:
    """The rank that wrote a file: it is in the name of those that each process writes."""
    found = re.search(r"-(\d{5})-of-\d{5}\.safetensors$", name)
    return int(found[1]) - 1 if found else 0


def save_tensors(tensors: dict[str, Tensor], folder: Path, stem: str, crew: Processes) -> None:
    """Writes `stem`-…-of-….safetensors: whole tensors, shared out by size; `stem`.safetensors for a process alone."""
    owner = _owners(tensors, crew.world)
    mine = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if owner[name] == crew.rank:
            mine[name] = whole.cpu().contiguous()
    file = folder / f"{stem}{'' if crew.world == 1 else f'-{crew.rank + 1:05d}-of-{crew.world:05d}'}.safetensors"
    crew.together(lambda: save_file(mine, file, metadata={"format": "pt"}) if mine else None)


def save_index(tensors: dict[str, Tensor], folder: Path, stem: str, crew: Processes) -> None:
    """The Hub's table of which file holds which tensor."""
    owner = _owners(tensors, crew.world)
    table = {name: f"{stem}-{rank + 1:05d}-of-{crew.world:05d}.safetensors" for name, rank in owner.items()}
    size = sum(_bytes(tensor) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_tensors(files: Iterable[Path], into: dict[str, Tensor]) -> None:
    """Fills tensors from files; of one that lies in parts over the processes each reads its own part.

    Raises:
        KeyError: a name that is not in both; RuntimeError: another shape.
    """
    missing = set(into)
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                fill(into[name], stored.get_slice(name))
                missing.discard(name)
    if missing:
        raise KeyError(f"{sorted(missing)[0]} is not in it")


@torch.no_grad()
def fill(tensor: Tensor, stored: Any) -> None:
    """Copies a stored tensor (safetensors' slice) into a live one, or this process's part of it."""
    if list(tensor.shape) != stored.get_shape():
        raise RuntimeError(f"a tensor has the shape {stored.get_shape()}, but should have {list(tensor.shape)}")
    if not hasattr(tensor, "full_tensor"):
        tensor.copy_(stored[:] if tensor.dim() else stored[...])
        return
    start, end = own_rows(tensor)
    if end > start:
        tensor.to_local().copy_(stored[start:end])


def own_rows(tensor: Any) -> tuple[int, int]:
    """First and last row (excluded) of a sharded tensor that this process holds: ⌈n/k⌉ of n rows in k parts, the last
    parts fewer, as torch.chunk cuts them."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    size = -(-rows // mesh.size(mesh.ndim - 1))
    start = min(rows, size * mesh.get_local_rank(mesh.ndim - 1))
    return start, min(rows, start + size)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that lies in parts over the processes, gathered; all of them have to ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model's file holds: parameters, each once even if tied, and the buffers that are kept."""
    state = model.state_dict()
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: tensor for name, tensor in state.items() if name not in every - once and name not in ignored}


def _owners(tensors: dict[str, Tensor], world: int) -> dict[str, int]:
    """name → rank of the process that writes it: consecutive tensors, about equal numbers of bytes."""
    total, done, owner = sum(_bytes(tensor) for tensor in tensors.values()), 0, {}
    for name, tensor in tensors.items():
        owner[name] = min(world - 1, (done + _bytes(tensor) // 2) * world // max(1, total))
        done += _bytes(tensor)
    return owner


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
