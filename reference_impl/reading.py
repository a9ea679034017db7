"""How does each of several processes read its own rows of a model's files?  So that none holds the whole model.

A model is made without its weights, remembers the folder that they are in, is laid over the processes, and then each
reads its part.  This is for files that hold the model's tensors under its own names; any other model is read whole by
the first process, through transformers' own loader, which converts them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reference_impl.logps import unwrapped
from reference_impl.processes import Processes
from reference_impl.shards import load_tensors, saved_tensors, stored_tensors

FOLDER = "weights_are_in"
"""Attribute of a model that has not read its weights yet: the folder of its files."""
FILES = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


def weights_folder(source: str) -> Path | None:
    """The folder of a model's safetensors files, downloaded where it is the hub's; None where there are no such files,
    or others beside them that hold the same names."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(snapshot_download(source, allow_patterns=FILES))
        except (OSError, HFValidationError):  # the model's own loader says what is wrong
            return None
    index = folder / "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return folder if {path.name for path in folder.glob("*.safetensors")} == wanted else None


def names_are_own(model: nn.Module) -> bool:
    """Whether a model's files hold its tensors as they are in it, under their names."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 there was no conversion
        return True
    there = {name: torch.empty(tensor.shape, device="meta") for name, tensor in saved_tensors(model).items()}
    written = revert_weight_conversion(unwrapped(model), dict(there))
    return written.keys() == there.keys() and all(written[name] is tensor for name, tensor in there.items())


def files_fit(model: nn.Module, folder: Path) -> bool:
    """Whether every tensor of a model can be read from a folder's files as it is."""
    try:
        stored = stored_tensors(folder)
    except SafetensorError:  # damaged: the model's own loader says so
        return False
    wanted = saved_tensors(model)
    fit = all(name in stored and stored[name].shape == tensor.shape for name, tensor in wanted.items())
    return fit and names_are_own(model)


def is_unread(model: nn.Module) -> bool:
    """Whether a model knows where its weights are but has not read them."""
    return hasattr(model, FOLDER)


def read_parts(model: nn.Module, crew: Processes) -> nn.Module:
    """The unread model, which lies over the processes, filled: each reads its own rows.

    Raises:
        OtherProcessError: a file that cannot be read; the same in all of them.
    """
    load_tensors(saved_tensors(model), getattr(model, FOLDER), crew)
    delattr(model, FOLDER)
    return model


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """name, tensor of a model's state, by name; of an unread model one after another from its files, as they would be
    in it."""
    state = sorted(model.state_dict(keep_vars=True).items())
    if not is_unread(model):
        yield from state
        return
    with contextlib.ExitStack() as stack:
        files = {}
        for file in getattr(model, FOLDER).glob("*.safetensors"):
            held = stack.enter_context(safe_open(file, "pt"))
            files |= dict.fromkeys(held.keys(), held)
        stored_as = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones the first
        for name, tensor in state:
            there = stored_as.get(id(tensor), name)
            yield name, files[there].get_tensor(there).to(tensor.dtype) if there in files else tensor


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made inside have no memory; buffers have: what is not in any file stays right."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        hook.remove()
