"""What did the trainer do with the models it was given?  Hooks around policy and reference, in the worker.

A spy changes nothing: it looks at the grad mode, at whether random numbers were drawn inside a forward (dropout, the
attention's too), and at the weights before and after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Spy:
    """What one model went through."""

    model: Any
    forwards: int = 0
    graph: int = 0  # forwards whose output carried a graph
    drawn: int = 0  # forwards that consumed random numbers
    training: int = 0  # forwards in train mode
    before: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        import torch

        changed, gradient = [], 0.0
        with torch.no_grad():
            now = dict(self.model.state_dict())
            for name, old in self.before.items():
                if name not in now:
                    continue
                new = now[name].cpu()
                # A model that was cast has not moved; what the coarser dtype does is for the checks of numbers to say.
                if old.shape != new.shape or not torch.equal(old.to(new.dtype), new):
                    changed.append(name)
            for parameter in self.model.parameters():
                if parameter.grad is not None and parameter.grad.numel():
                    gradient = max(gradient, float(parameter.grad.abs().max()))
        return {
            "forwards": self.forwards, "graph": self.graph, "drawn": self.drawn, "training": self.training,
            "changed": changed, "gradient": gradient,
        }  # fmt: skip


def watch(model: Any) -> Spy:
    """Put a spy on a model.  The hooks stay; the model belongs to one experiment."""
    import torch

    spy = Spy(model, before={name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})
    states: list[Any] = []

    def enter(module: Any, args: Any, kwargs: Any = None) -> None:
        spy.forwards += 1
        spy.training += bool(module.training)
        states.append(torch.random.get_rng_state())

    def leave(module: Any, args: Any, output: Any) -> None:
        if states and not torch.equal(states.pop(), torch.random.get_rng_state()):
            spy.drawn += 1
        if _has_graph(output):
            spy.graph += 1

    # the decoder too: a trainer may call it and the head apart
    for module in {id(m): m for m in (model, getattr(model, "model", model))}.values():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return spy


def _has_graph(output: Any) -> bool:
    if hasattr(output, "requires_grad"):
        return bool(output.requires_grad)
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return any(_has_graph(value) for value in values)
