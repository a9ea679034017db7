"""How do a policy's weights go to files and come back?  As `from_pretrained` knows them, or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.models import Policy, dtype_argument, is_peft
from reference_impl.processes import Processes
from reference_impl.reading import files_fit, names_are_own
from reference_impl.shards import load_tensors, save_files, save_tensors, saved_tensors, whole_tensor

PARTS = "weights"
"""Folder in a checkpoint of several processes: tensors in parts, under the names that they have in the live model."""


def save_policy(policy: Policy, folder: Path, crew: Processes) -> None:
    """Model and tokenizer as from_pretrained loads them, the config's own dropout settings included.  Several processes
    gather tensor after tensor, and the first one writes."""
    model = policy.model
    if crew.world == 1:
        _save_alone(policy, folder, None)
    elif not is_peft(model) and crew.tell(crew.together(lambda: crew.first and names_are_own(model))):
        tensors = saved_tensors(model)
        save_files(tensors, lambda held: _gathered({name: tensors[name] for name in held}, crew), folder, crew)
        crew.together(lambda: _save_beside(policy, folder) if crew.first else None)
    else:  # an adapter; or names or shapes change on the way to the file, which transformers does for a whole model
        state = _gathered(_adapter_by_own_name(model) if is_peft(model) else model.state_dict(), crew)
        crew.together(lambda: _save_alone(policy, folder, state) if crew.first else None)


def save_policy_to_go_on(policy: Policy, folder: Path, crew: Processes) -> None:
    """For a checkpoint: as save_policy, but each of several processes writes its own rows; an adapter is gathered."""
    if crew.world == 1 or is_peft(policy.model):
        save_policy(policy, folder, crew)
        return
    save_tensors(saved_tensors(policy.model), folder / PARTS, crew)
    crew.together(lambda: _save_beside(policy, folder) if crew.first else None)


def load_policy(policy: Policy, folder: Path, crew: Processes) -> None:
    """Copies the weights of a checkpoint, from one process or several, into the live model."""
    model = policy.model
    if is_peft(model):
        load_tensors(_adapter_by_saved_name(model), folder, crew)
    elif (folder / PARTS).is_dir():
        load_tensors(saved_tensors(model), folder / PARTS, crew)
    elif crew.tell(crew.together(lambda: crew.first and files_fit(model, folder))):
        load_tensors(saved_tensors(model), folder, crew)
    else:
        _load_converted(model, folder, crew)


def _gathered(tensors: dict[str, Tensor], crew: Processes) -> dict[str, Tensor]:
    """The whole tensors, in the first process; all have to ask."""
    found = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if crew.first:
            found[name] = whole.cpu()
    return found


def _save_alone(policy: Policy, folder: Path, state: dict[str, Tensor] | None) -> None:
    model = policy.model
    given: dict[str, Any] = {} if state is None else {"state_dict": state}
    if is_peft(model):
        model.save_pretrained(folder, selected_adapters=[model.active_adapter], **given)
    else:
        model.save_pretrained(folder, **given)
        _own_dropout(policy, folder)
    _save_tokenizer(policy, folder)


def _save_beside(policy: Policy, folder: Path) -> None:
    """What lies beside the weights' files."""
    model = policy.model
    model.config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    _own_dropout(policy, folder)
    _save_tokenizer(policy, folder)


def _own_dropout(policy: Policy, folder: Path) -> None:
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {name: value for name, value in policy.config_dropout.items() if name in settings}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_tokenizer(policy: Policy, folder: Path) -> None:
    if policy.tokenizer is not None and hasattr(policy.tokenizer, "save_pretrained"):
        policy.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _load_converted(model: nn.Module, folder: Path, crew: Processes) -> None:
    """Through the model's own loader, which undoes what save_pretrained did to names and shapes.  The first process
    reads the whole model, and each gets its part."""
    from torch.distributed.tensor import distribute_tensor

    kind = next(base for base in type(model).__mro__ if not base.__name__.startswith("FSDP"))
    dtype = dtype_argument(next(model.parameters()).dtype)
    loaded = crew.together(lambda: kind.from_pretrained(folder, **dtype).state_dict() if crew.first else {})
    for name, tensor in saved_tensors(model).items():
        whole = loaded[name].to(tensor) if crew.first else torch.empty(tensor.shape, dtype=tensor.dtype)
        if hasattr(tensor, "full_tensor"):
            tensor.copy_(distribute_tensor(whole.to(crew.device), tensor.device_mesh, tensor.placements))
            continue
        if crew.world > 1:
            torch.distributed.broadcast(whole, 0)
        tensor.copy_(whole)


def _adapter_by_saved_name(model: nn.Module) -> dict[str, Tensor]:
    """name in the adapter's file → the live tensor."""
    import peft

    return peft.get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name=model.active_adapter)


def _adapter_by_own_name(model: nn.Module) -> dict[str, Tensor]:
    """name in the model → the live tensor, of those that are in the adapter's file."""
    import peft

    state = model.state_dict()
    saved = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=model.active_adapter)
    kept = {id(tensor) for tensor in saved.values()}
    return {name: tensor for name, tensor in state.items() if id(tensor) in kept}
