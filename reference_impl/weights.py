"""How do a policy's weights go to files and come back?  As `from_pretrained` knows them, from one process or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reference_impl.logps import unwrapped
from reference_impl.models import Policy, dtype_argument, is_peft
from reference_impl.processes import Processes
from reference_impl.shards import load_tensors, save_index, save_tensors, saved_tensors, whole_tensor

STEM, ADAPTER = "model", "adapter_model.safetensors"


def save_policy(policy: Policy, folder: Path, crew: Processes) -> None:
    """Model and tokenizer as from_pretrained loads them, the config's own dropout settings included."""
    if crew.world == 1:
        _save_alone(policy, policy.model, folder, None)
    elif is_peft(policy.model):
        adapter = {name: whole_tensor(tensor).cpu() for name, tensor in _adapter_by_own_name(policy.model).items()}
        crew.together(lambda: _save_alone(policy, policy.model, folder, adapter) if crew.first else None)
    elif _names_are_own(policy.model, crew):
        tensors = saved_tensors(policy.model)
        save_tensors(tensors, folder, STEM, crew)
        crew.together(lambda: _save_beside(policy, tensors, folder, crew) if crew.first else None)
    else:  # names or shapes change on the way to the file, and transformers does that for the whole model at once
        state = {name: whole_tensor(tensor).cpu() for name, tensor in policy.model.state_dict().items()}
        crew.together(lambda: _save_alone(policy, policy.model, folder, state) if crew.first else None)


def load_policy(policy: Policy, folder: Path, crew: Processes) -> None:
    """Copies the weights of a checkpoint into the live model."""
    model = policy.model
    if crew.world > 1:
        _load_parts(model, folder, crew)
        return
    if is_peft(model):
        import peft

        weights = load_file(folder / ADAPTER)
        peft.set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)
        return
    # Through the model's own loader: it undoes what save_pretrained did to names and shapes.
    saved = type(model).from_pretrained(folder, **dtype_argument(next(model.parameters()).dtype))
    model.load_state_dict(saved.state_dict())


def _save_alone(policy: Policy, model: nn.Module, folder: Path, state: dict[str, Tensor] | None) -> None:
    given: dict[str, Any] = {} if state is None else {"state_dict": state}
    if is_peft(model):
        model.save_pretrained(folder, selected_adapters=[model.active_adapter], **given)
    else:
        model.save_pretrained(folder, **given)
        _own_dropout(policy, folder)
    _save_tokenizer(policy, folder)


def _save_beside(policy: Policy, tensors: dict[str, Tensor], folder: Path, crew: Processes) -> None:
    """What lies beside the weights' files."""
    model = policy.model
    save_index(tensors, folder, STEM, crew)
    model.config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
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


def _load_parts(model: nn.Module, folder: Path, crew: Processes) -> None:
    if is_peft(model):
        crew.together(lambda: load_tensors([folder / ADAPTER], _adapter_by_saved_name(model)))
    elif _names_are_own(model, crew):
        files = sorted(folder.glob(f"{STEM}*.safetensors"))
        crew.together(lambda: load_tensors(files, saved_tensors(model)))
    else:
        _send_out(model, folder, crew)


@torch.no_grad()
def _send_out(model: nn.Module, folder: Path, crew: Processes) -> None:
    """The first process reads the whole model, and each gets its part."""
    from torch.distributed.tensor import distribute_tensor

    kind = next(base for base in type(model).__mro__ if not base.__name__.startswith("FSDP"))
    loaded = crew.together(lambda: kind.from_pretrained(folder).state_dict() if crew.first else {})
    for name, tensor in saved_tensors(model).items():
        whole = loaded[name].to(tensor) if crew.first else torch.empty(tensor.shape, dtype=tensor.dtype)
        if hasattr(tensor, "full_tensor"):
            tensor.copy_(distribute_tensor(whole.to(crew.device), tensor.device_mesh, tensor.placements))
        else:
            torch.distributed.broadcast(whole, 0)
            tensor.copy_(whole)


def _names_are_own(model: nn.Module, crew: Processes) -> bool:
    """Whether a model's files call its tensors by the names they have in it, and keep their shapes."""

    def kept() -> bool | None:
        if not crew.first:
            return None
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # before transformers 5 there was no conversion
            return True
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in saved_tensors(model).items()}
        changed = revert_weight_conversion(unwrapped(model), dict(shapes))
        return changed.keys() == shapes.keys() and all(changed[n].shape == t.shape for n, t in shapes.items())

    return crew.tell(crew.together(kept))


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
