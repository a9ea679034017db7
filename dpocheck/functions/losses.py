"""How does a hand-written loss of log-probs become the capability `loss`?"""

from __future__ import annotations

import inspect
import math
from typing import Any

from dpocheck.adapter import LossOut, Objective, Unsupported
from dpocheck.functions import options
from dpocheck.functions.target import Target


class Loss:
    """Calls a loss with the four vectors, in the form it takes them."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.library = library(target)
        if "beta" not in target.settable() and "beta" not in target.fixed:
            target.fixed["beta"] = self._measured_beta()

    def __call__(
        self, policy_chosen: Any, policy_rejected: Any, reference_chosen: Any, reference_rejected: Any, *,
        objective: Objective, lengths: Any = None,
    ) -> Any:  # fmt: skip
        options.refuse_fixed(objective, self.target.settable(), self.target.name, self.target.fixed)
        four = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        return self._answer(four, objective, lengths)

    def _answer(self, four: tuple[Any, ...], objective: Objective, lengths: Any) -> Any:
        if self.library == "numbers":
            return self._number_by_number(four, objective, lengths)
        if self.library == "numpy":
            four = tuple(vector.detach().numpy().copy() for vector in four)
        given = arrange(self.target.match.shape, four)
        if lengths is not None:
            given |= {"chosen_length": lengths[0], "rejected_length": lengths[1]}
            if self.target.match.shape == "two":  # SimPO is given log-probs per token
                given["policy_chosen"] = given["policy_chosen"] / lengths[0]
                given["policy_rejected"] = given["policy_rejected"] / lengths[1]
        out = self.target.call(given, objective)
        pairs = len(four[0])
        if self.target.match.shape == "rows" and isinstance(out, tuple) and _rows(out[-1], 2 * pairs):
            return LossOut(_tensor(out[0]), out[-1][:pairs], out[-1][pairs:])
        return unpack(out)

    def _number_by_number(self, four: tuple[Any, ...], objective: Objective, lengths: Any) -> LossOut:
        """A loss of plain numbers is called once a pair; it has no slopes."""
        import torch

        outs = []
        for pair in range(len(four[0])):
            given = arrange(self.target.match.shape, tuple(vector[pair].item() for vector in four))
            outs.append(unpack(self.target.call(given, objective)))
        loss = torch.tensor([float(out.loss) for out in outs], dtype=torch.float64)
        rewards = [
            torch.tensor([float(value) for value in column], dtype=torch.float64)
            if all(isinstance(value, int | float) for value in column)
            else None
            for column in zip(*((out.rewards_chosen, out.rewards_rejected) for out in outs), strict=True)
        ]
        return LossOut(loss, *rewards)

    def _measured_beta(self) -> float:
        """The fixed beta of a function whose source names none or several: from its value at h = 1.

        -log sigma(beta) = L gives beta = -log(exp(L) - 1).  Of the numbers that the function or its object holds, and
        1, the nearest in size is taken, so that a wrong function is not asked for what only its fault makes of beta.
        """
        import torch

        held = [value for value in vars(self.target.holder or object).values() if type(value) is float]
        candidates = [*self.target.facts.numbers, *held, 1.0]
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        try:
            loss = float(self._answer((one, zero, zero, zero), Objective(beta=1.0), None).loss)
            beta = abs(math.log(math.expm1(loss)))
        except Exception:  # it will fail again, and be reported, when it is asked in earnest
            return candidates[0]
        return min(candidates, key=lambda number: abs(number - beta))


def library(target: Target) -> str:
    """torch, numpy or numbers: what the function computes with, from the modules it names."""
    function = inspect.unwrap(target.function)
    code, space = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None:
        return "torch"
    roots, todo, seen = set(), [code], set()
    while todo:
        current = todo.pop()
        todo += [inner for inner in current.co_consts if hasattr(inner, "co_names")]
        for name in current.co_names:
            value = space.get(name)
            if inspect.ismodule(value):
                roots.add(value.__name__.split(".")[0])
            elif inspect.isfunction(value) and value not in seen and value.__globals__ is space:
                seen.add(value)
                todo.append(value.__code__)
            elif value is not None:
                roots.add((getattr(value, "__module__", "") or "").split(".")[0])
    if "torch" in roots:
        return "torch"
    if roots & {"numpy", "scipy"}:
        return "numpy"
    return "numbers" if "math" in roots else "torch"


def arrange(shape: str, four: tuple[Any, ...]) -> dict[str, Any]:
    """The four log-probs in the shape that a loss takes them, by role."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = four
    if shape == "ratios":
        return {
            "policy_ratio": policy_chosen - policy_rejected,
            "reference_ratio": reference_chosen - reference_rejected,
        }
    if shape == "margins":
        return {
            "chosen_ratio": policy_chosen - reference_chosen,
            "rejected_ratio": policy_rejected - reference_rejected,
        }
    if shape == "rows":
        import torch

        pairs = len(policy_chosen)
        return {
            "policy_rows": torch.cat([policy_chosen, policy_rejected]),
            "reference_rows": torch.cat([reference_chosen, reference_rejected]),
            "chosen_index": torch.arange(pairs),
            "rejected_index": torch.arange(pairs, 2 * pairs),
        }
    if shape == "tokens":  # each on the middle one of three tokens, chosen rows first
        import torch

        pad = torch.nn.functional.pad
        policy = torch.cat([policy_chosen, policy_rejected])
        reference = torch.cat([reference_chosen, reference_rejected])
        return {
            "policy_rows": pad(policy[:, None], (1, 1), value=-1.0),
            "reference_rows": pad(reference[:, None], (1, 1), value=-1.0),
            "token_mask": pad(torch.ones_like(policy)[:, None], (1, 1)),
        }
    return {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }


def _rows(value: Any, count: int) -> bool:
    return hasattr(value, "shape") and tuple(value.shape) == (count,)


def unpack(out: Any) -> LossOut:
    """The loss and the rewards among what came back: a tensor, a tuple, a dict or a record."""
    if isinstance(out, LossOut):
        return out
    if hasattr(out, "_asdict"):
        out = out._asdict()
    elif hasattr(out, "__dataclass_fields__"):
        out = {name: getattr(out, name) for name in out.__dataclass_fields__}
    if hasattr(out, "items"):
        named = {str(name).lower(): value for name, value in out.items()}
        loss = next((named[name] for name in named if name in ("loss", "losses", "dpo_loss")), None)
        if loss is None:
            loss = next((value for name, value in named.items() if "loss" in name), None)
        return LossOut(_tensor(loss), *(_tensor(_reward(named, side)) for side in ("chosen", "rejected")))
    if isinstance(out, tuple | list) and out:
        second = out[1] if len(out) > 1 else None
        if hasattr(second, "items"):
            named = {str(name).lower(): value for name, value in second.items()}
            return LossOut(_tensor(out[0]), *(_tensor(_reward(named, side)) for side in ("chosen", "rejected")))
        if len(out) == 3:  # the usual (losses, chosen_rewards, rejected_rewards)
            return LossOut(_tensor(out[0]), _tensor(out[1]), _tensor(out[2]))
        return LossOut(_tensor(out[0]))
    return LossOut(_tensor(out))


def _reward(named: dict[str, Any], side: str) -> Any:
    return next((value for name, value in named.items() if side in name and "reward" in name), None)


def _tensor(value: Any) -> Any:
    """numpy's arrays as tensors; everything else as it is."""
    if type(value).__module__ == "numpy":
        import torch

        return torch.as_tensor(value)
    return value


__all__ = ["Loss", "Unsupported", "unpack"]
