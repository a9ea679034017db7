"""How does a model lie over several processes?  FSDP2, layer by layer, put on from outside: nothing else knows of it.

Each process keeps its part of every weight, gradient and optimizer moment.  A decoder layer's weights are gathered when
the layer runs, and again for its backward pass; what is outside the layers, the head too, once for a forward and
backward pass, however many chunks the head is applied to.  Gradients are *summed* over the processes: a loss is divided
by the pairs of all of them already (dpo.mean_over_pairs).

Under bf16 the parts are float32, the layers' weights are gathered in bfloat16, and their gradients are added up in
float32.  What is outside the layers is gathered in float32, so that the head's gradients add up over the chunks without
being rounded to bfloat16.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reference_impl.config import ConfigError, TrainConfig
from reference_impl.logps import PATHS, RowBatch, choose_path, unwrapped
from reference_impl.models import check_finite
from reference_impl.processes import Processes
from reference_impl.reading import is_unread, read_parts
from reference_impl.reference import OnlineReference, Reference
from reference_impl.shards import whole_tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from reference_impl.models import Policy


def mesh_of(config: TrainConfig, crew: Processes) -> DeviceMesh:
    """The processes in a line, or, with `shard` fewer than all, as rows of copies and columns of parts (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh

    shard = config.shard or crew.world
    if shard == crew.world:
        return init_device_mesh(crew.device.type, (crew.world,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(crew.device.type, (crew.world // shard, shard), mesh_dim_names=names)


def spread_run(
    policy: Policy, source: Reference | None, given: nn.Module | None, config: TrainConfig, crew: Processes, live: bool
) -> None:
    """Lays the policy and its reference over the processes.

    A live model that was passed stays as it is, and copies are laid out: bring_back fills the policy's.
    """
    mesh = mesh_of(config, crew)
    if live:
        policy.model = copy.deepcopy(policy.whole)
    spread(policy.model, mesh, config, crew)
    if isinstance(source, OnlineReference):
        if source.model is policy.whole:
            source.model = policy.model
        else:
            if source.model is given and config.reference is None:
                source.model = copy.deepcopy(given)
            spread(source.model, mesh, config, crew)
    online = {"reference": source.model} if isinstance(source, OnlineReference) else {}
    for role, model in {"policy": policy.model, **online}.items():
        if is_unread(model):
            crew.together(functools.partial(check_finite, read_parts(model, crew), role))
    policy.device = crew.device
    policy.path = functools.partial(score_in_parts, crew.device)


def spread(model: nn.Module, mesh: DeviceMesh, config: TrainConfig, crew: Processes) -> None:
    """Lays a model over the processes, with the first one's weights: the others need none (the meta device).  An unread
    model gets its memory only."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )  # fmt: skip

    path = choose_path(model)[0] if config.logps == "auto" else config.logps
    shared: dict[str, Any] = {
        "mesh": mesh, "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }  # fmt: skip
    low = MixedPrecisionPolicy()
    if config.dtype == "bf16":
        # Inputs are left alone: between the layers there is float32, as in one process.
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    layers, fill = layers_of(model), _allocate if is_unread(model) else _send
    for layer in layers:
        fill(layer, [layer], crew)
        fully_shard(layer, mp_policy=low, reshard_after_forward=True, **shared)
    inside = {module for layer in layers for module in layer.modules()}
    fill(model, [module for module in model.modules() if module not in inside], crew, recurse=False)
    fully_shard(model, reshard_after_forward=False, **shared)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has sums only
    model.score_rows = functools.partial(PATHS[path], model)
    if path != "full":  # a full forward is the model's own, which FSDP knows
        register_fsdp_forward_method(model, "score_rows")


def score_in_parts(device: torch.device, model: nn.Module, batch: RowBatch) -> Tensor:
    """With its first argument given, a path of logps.pair_logps for models that were spread.

    device: where they compute; their parts may be kept elsewhere.
    """
    logps = model.score_rows(RowBatch(*(getattr(batch, name).to(device) for name in RowBatch.__dataclass_fields__)))
    if not torch.is_grad_enabled():  # no backward pass will give up what was gathered
        model.reshard()
    return logps


def compile_layers(policy: Policy) -> None:
    """torch.compile of each decoder layer, in place; the first steps, and steps of new shapes, take longer."""
    for layer in layers_of(policy.model):
        layer.compile()
        policy.undo.append(functools.partial(setattr, layer, "_compiled_call_impl", None))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, as the architecture names them; without names, the longest list of modules.

    Raises:
        ConfigError: there is no such list.
    """
    named = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in named]
    if found:
        return found
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigError(f"{type(unwrapped(model)).__name__} has no list of layers to share: use one process")
    return list(max(lists, key=len))


def bring_back(policy: Policy) -> None:
    """Puts the trained weights into the live model that was passed, in every process."""
    if policy.whole is policy.model:
        return
    wholes = dict(policy.whole.named_parameters())
    with torch.no_grad():
        for name, part in policy.model.named_parameters():
            wholes[name].copy_(whole_tensor(part))


def _allocate(owner: nn.Module, modules: list[nn.Module], crew: Processes, recurse: bool = True) -> None:
    """Memory for what has none, and everything on the device that it is computed on."""
    empty = any(tensor.is_meta for module in modules for tensor in _tensors(module, recurse))
    for module in modules:
        module._apply(
            lambda tensor: torch.empty_like(tensor, device=crew.device) if tensor.is_meta else tensor.to(crew.device),
            recurse=recurse,
        )
    if empty and hasattr(unwrapped(owner), "tie_weights"):
        unwrapped(owner).tie_weights()  # each of two tied weights was made anew


def _send(owner: nn.Module, modules: list[nn.Module], crew: Processes, recurse: bool = True) -> None:
    """Weights and buffers of the first process into modules of all of them, on the device they compute on."""
    import torch.distributed as dist

    _allocate(owner, modules, crew, recurse)
    sent: set[int] = set()
    for module in modules:
        for tensor in _tensors(module, recurse):
            if id(tensor) not in sent:
                sent.add(id(tensor))
                words = tensor.data.contiguous()
                dist.broadcast(words.flatten().view(torch.uint8), 0)  # bytes: gloo does not know every dtype
                tensor.data.copy_(words)


def _tensors(module: nn.Module, recurse: bool) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]
