"""What does the reference say about a pair?  Frozen log-probs, from a live model, whichever form it has."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reference_impl.data import TokenPair
from reference_impl.logps import pair_logps
from reference_impl.models import Policy, evaluating, is_peft
from reference_impl.reading import is_unread

FROZEN_ADAPTER = "dpo_reference"


class Reference(Protocol):
    """Log-probs of the reference for pairs of one data set, in the pairs' order."""

    def __call__(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """chosen (pair,) and rejected (pair,), nats, without gradient."""

    def close(self) -> None:
        """Gives back what was changed or held."""


@dataclass
class OnlineReference:
    """A frozen model of its own, scored in the policy's precision and with the policy's path.

    undo: calls that give a model of the caller back as it came.
    """

    model: nn.Module
    policy: Policy
    undo: list[Any] = field(default_factory=list)

    def __call__(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        with evaluating(self.model), self.policy.precision():
            return pair_logps(self.model, pairs, pad_id=self.policy.pad_id, path=self.policy.path)

    def close(self) -> None:
        while self.undo:
            self.undo.pop()()


@dataclass
class AdapterReference:
    """The policy's own base, its adapter switched off, or replaced by a frozen copy of what it was at the start.

    frozen: name of the frozen copy; None: the adapter is switched off.
    """

    policy: Policy
    frozen: str | None

    def __call__(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        model = self.policy.model
        with evaluating(model), self.policy.precision():
            if self.frozen is None:
                with model.disable_adapter():
                    return pair_logps(model, pairs, pad_id=self.policy.pad_id, path=self.policy.path)
            trained = model.active_adapter
            flags = {name: p.requires_grad for name, p in model.named_parameters()}
            model.set_adapter(self.frozen)
            try:
                return pair_logps(model, pairs, pad_id=self.policy.pad_id, path=self.policy.path)
            finally:
                model.set_adapter(trained)
                for name, parameter in model.named_parameters():  # set_adapter changes them
                    parameter.requires_grad_(flags[name])

    def close(self) -> None:
        if self.frozen is not None:
            self.policy.whole.delete_adapter(self.frozen)


def online_reference(policy: Policy, given: nn.Module | None) -> Reference:
    """The frozen reference of a run.

    given: a model of its own; None: the policy as it is now.  A policy with a fresh adapter needs no copy (adapter
    off); one with a trained adapter gets a frozen copy of the adapter; any other a frozen copy of the whole model.
    """
    if given is not None:
        return _frozen(given, policy)
    if not is_peft(policy.model):
        return _frozen(independent_copy(policy.model), policy)
    if adapter_changes_nothing(policy.model):
        return AdapterReference(policy, None)
    copy_adapter(policy.model, policy.model.active_adapter, FROZEN_ADAPTER)
    return AdapterReference(policy, FROZEN_ADAPTER)


def independent_copy(model: nn.Module) -> nn.Module:
    """A copy that nothing done to the original reaches.

    A function put in place of a module's forward may hold on to the original module, and the copy would then answer
    with the weights in training: such functions are left off the copy, which runs its class's own forward.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(vars(module).get("forward"), types.FunctionType):
            del module.forward
    return twin


def shares_weights(left: nn.Module, right: nn.Module) -> bool:
    """Whether training one would change the other."""
    mine = {p.untyped_storage().data_ptr() for p in left.parameters()}
    return any(p.untyped_storage().data_ptr() in mine for p in right.parameters())


def adapter_changes_nothing(model: nn.Module) -> bool:
    """Whether the model with its active adapter is exactly the model without: every B is 0, copies equal originals."""
    name = model.active_adapter
    for module in model.modules():
        pairs = [getattr(module, attribute, {}) for attribute in ("lora_B", "lora_embedding_B")]
        for held in pairs:
            if name in held:
                weight = held[name].weight if isinstance(held[name], nn.Module) else held[name]
                if not weight.is_meta and weight.any():  # without its weights: a fresh adapter of another process
                    return False
        saved = getattr(module, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict) and name in saved:
            original = module.original_module.state_dict()
            if any(not torch.equal(original[key], value) for key, value in saved[name].state_dict().items()):
                return False
    settings = model.peft_config[name]
    return not (getattr(settings, "use_dora", False) or getattr(settings, "bias", "none") != "none")


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Adds a frozen copy of an adapter under another name; the source stays active and trainable."""
    import peft

    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter(target, copy.deepcopy(model.peft_config[source]), autocast_adapter_dtype=False)
    weights = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, adapter_name=source).items()}
    loaded = peft.set_peft_model_state_dict(model, weights, adapter_name=target)
    if loaded.unexpected_keys:
        raise RuntimeError(f"the adapter {source!r} could not be copied: {loaded.unexpected_keys[:3]}")
    model.set_adapter(source)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, False))


def _frozen(model: nn.Module, policy: Policy) -> OnlineReference:
    wanted = next(policy.model.parameters())
    if next(model.parameters()).dtype != wanted.dtype or shares_weights(policy.model, model):
        model = independent_copy(model).to(wanted.dtype)
    if not is_unread(model):  # it has no weights to move yet, and its buffers stay
        model.to(wanted.device)
    reference = OnlineReference(model, policy)
    for parameter in model.parameters():
        if parameter.requires_grad:
            reference.undo.append(lambda p=parameter: p.requires_grad_(True))
            parameter.requires_grad_(False)
    return reference
