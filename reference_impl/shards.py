"""How do many processes write and read one checkpoint?  By torch's distributed checkpoint: each its own rows.

The files are safetensors whose headers say where a part belongs, so that a run goes on with any number of processes.
A process alone writes whole tensors and reads with the same reader.  What the processes plan goes between them as torch
sends objects; no file is a pickle.  The folder is there whole or not at all: see files.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_impl.files import begin, digest, names, seal, sync, whole_folder, writing_folder
from reference_impl.processes import OtherProcessError, Processes

ALONE_FILE = "whole.safetensors"
FILE_BYTES, PART_BYTES = 5 * 10**9, 10**9
"""Of a file of a whole model, and of a process's file of its rows: about as much is in memory besides, at a time."""


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
    found = re.fullmatch(r"shard-(\d{5})-.*\.safetensors", Path(name).name)
    return int(found[1]) - 1 if found else 0


def save_tensors(tensors: dict[str, Tensor], folder: Path, crew: Processes) -> None:
    """Writes tensors into a folder, each process its own rows; what all of them hold is written by one.

    Raises:
        OtherProcessError: one of several processes cannot write; the same in all of them.
    """
    if not tensors:
        return
    if crew.world == 1:
        folder.mkdir()
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / ALONE_FILE)
        return
    import torch.distributed.checkpoint as dcp

    files = _in_files(tensors, PART_BYTES * crew.world).filename_to_tensors.values()
    number = {name: index for index, held in enumerate(files, start=1) for name in held}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=number, save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer)


def load_tensors(tensors: dict[str, Tensor], folder: Path, crew: Processes) -> None:
    """Fills tensors from a folder's safetensors files; of one that lies in parts each process reads its own rows.

    The files may hold whole tensors or parts, from any number of processes, and other tensors besides.

    Raises:
        OtherProcessError: a tensor that is not in the files or has another shape there, or a file that cannot be read;
            the same in all processes.
    """
    if not tensors:
        return
    import torch.distributed.checkpoint as dcp

    with _plain_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # what a process alone asks for
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=crew.world == 1)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """What a folder's safetensors files hold, whole or in parts: shapes and dtypes, on the meta device."""
    if not folder.is_dir():
        return {}
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    held = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for name, t in sorted(held.items())}


def save_files(
    tensors: dict[str, Tensor], whole: Callable[[list[str]], dict[str, Tensor]], folder: Path, crew: Processes
) -> None:
    """Writes model.safetensors as everybody loads it, in the Hub's several files where it is large.

    tensors: shapes and dtypes; whole: names → the whole tensors, asked for those of one file at a time, in every
    process.  The first one writes.
    """
    split = _in_files(tensors, FILE_BYTES)
    for file, held in split.filename_to_tensors.items():
        _first_writes(functools.partial(save_file, whole(held), folder / file, metadata={"format": "pt"}), crew)
    if split.is_sharded:
        index = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2) + "\n"
        _first_writes(lambda: (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8"), crew)


def _in_files(tensors: dict[str, Tensor], most: int) -> StateDictSplit:
    """The Hub's way of sharing out tensors over files of at most so many bytes."""
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )


def _first_writes(action: Callable[[], Any], crew: Processes) -> None:
    crew.together(lambda: action() if crew.first else None)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What failed in one process, as an error with one line; torch's is a table of tracebacks, and no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (problem, _) = min(error.failures.items())
        raise OtherProcessError(f"process {rank}: {' '.join(str(problem).split())}") from None


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
