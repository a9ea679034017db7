"""How does a gradient become a step?  Optimizer, learning rate as a function of the step, clipping, and its state."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from reference_impl.config import TrainConfig
from reference_impl.processes import Processes
from reference_impl.shards import load_tensors, stored_tensors


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD over every parameter that requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of optimizer step `step`, 0 … total − 1.

    A function of the step alone: a run that is continued needs no state for it.  With w warm-up steps, step k < w has
    (k + 1)/(w + 1) of the peak, so that no step is wasted on a rate of 0 (warmup_first=zero: k/w).  After it
    linear: (T − k)/(T − w); cosine: ½(1 + cos π(k − w)/(T − w)), both reaching 0 one step after the last.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    if step < warmup:
        return peak * (step + 1) / (warmup + 1) if config.warmup_first == "positive" else peak * step / warmup
    if config.schedule == "constant":
        return peak
    done = (step - warmup) / (total - warmup)
    return peak * (1 - done) if config.schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradient(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> float:
    """Scales the whole accumulated gradient to a global norm of at most clip_norm; returns the norm before.

    A gradient that is not finite is left as it is: the caller stops on the norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):  # each process knows the norm of its part
        norm = norm.full_tensor()
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm.item()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as 'parameter name::state name': no order of parameters to rely on, nothing pickled."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}::{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, crew: Processes) -> None:
    """The inverse of optimizer_state, from the folder that save_tensors wrote its tensors into.

    Raises:
        KeyError: a state of a parameter that the model does not train; OtherProcessError: one of another shape.
    """

    def empty() -> dict[str, Tensor]:
        trained, made = {name: p for name, p in model.named_parameters() if p.requires_grad}, {}
        for full_name, stored in stored_tensors(folder).items():
            name, key = full_name.rsplit("::", 1)
            # Torch keeps AdamW's step count on the CPU, everything else beside the parameter.
            like = torch.empty(stored.shape, dtype=stored.dtype) if key == "step" else trained[name].detach()
            made[full_name] = optimizer.state[trained[name]][key] = torch.empty_like(like)
        return made

    load_tensors(crew.together(empty), folder, crew)
