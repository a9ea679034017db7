"""How does a hand-written loss of log-probs become the capability `loss`?"""

from __future__ import annotations

import dis
import inspect
import math
from contextlib import suppress
from typing import Any

from dpocheck.adapter import LossOut, Objective, Unsupported
from dpocheck.functions import options
from dpocheck.functions.parameters import FOUR, concept
from dpocheck.functions.target import Target

NUMBERWISE = ("four", "ratios", "margins", "records", "policy", "margin")  # shapes that a single pair can have
TOKENS = (2, 4)  # tokens of chosen and rejected completions, where a loss is given log-probs token by token
ONE_NUMBER = (
    "only one element tensors", "only 0-dimensional arrays", "only length-1 arrays", "only size-1 arrays",
    "cannot be converted to Scalar", "Boolean value of Tensor with more than one value",
    "truth value of an array with more than one element",
)  # fmt: skip
LIBRARIES = ("torch", "numpy", "builtins")
HOLDERS = ("loss", "losses", "value")  # attributes of a result that hold the loss


class Loss:
    """Calls a loss with the four vectors, in the form it takes them."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.library = library(target)
        self.one_pair = self.library == "numbers"  # it is called once a pair
        self.wide = False  # of the shape halves: log-probs token by token
        self.listed = False  # of the shape halves: a list of tensors of one element
        if "beta" not in target.settable() and "beta" not in target.fixed:
            target.fixed["beta"] = self._measured_beta()
        self._settle()

    def __call__(
        self, policy_chosen: Any, policy_rejected: Any, reference_chosen: Any, reference_rejected: Any, *,
        objective: Objective, lengths: Any = None,
    ) -> Any:  # fmt: skip
        options.refuse_fixed(objective, self.target.settable(), self.target.name, self.target.fixed)
        four = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        return self._answer(four, objective, lengths)

    def _answer(self, four: tuple[Any, ...], objective: Objective, lengths: Any) -> Any:
        """Call it with all pairs at once; one that turns out to be written for one pair is called once a pair."""
        if self.one_pair:
            return self._pair_by_pair(four, objective)
        try:
            return self._whole(four, objective, lengths)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            if self.target.match.shape == "halves" and not self.listed and "tuple of Tensors" in str(error):
                self.listed = True
                return self._answer(four, objective, lengths)
            if self.target.match.shape == "halves" and not self.wide and _wants_tokens(error):
                self.wide = True
                return self._answer(four, objective, lengths)
            if self.target.match.shape not in NUMBERWISE or not _wants_one(error):
                raise
            self.one_pair = True
            return self._pair_by_pair(four, objective)

    def _whole(self, four: tuple[Any, ...], objective: Objective, lengths: Any) -> Any:
        if self.library == "numpy":
            four = tuple(_array(vector) for vector in four)
        shape = "wide" if self.wide else self.target.match.shape
        if shape == "halves" and self.target.facts.paired:
            shape = "pairs"
        if shape in ("halves", "wide", "pairs") and self.target.facts.habits.first == "rejected":
            four = (four[1], four[0], four[3], four[2])
        given = arrange(shape, four, lengths, alternates=self.target.facts.alternates)
        if self.listed:
            given = {role: list(rows.split(1)) for role, rows in given.items()}
        given["settings"] = {"pairs": len(four[0])}
        given |= self._lengths(four, lengths)
        per_token = shape == "two" or (shape == "four" and options.own_kind(self.target.name) == "simpo")
        if per_token and lengths is not None and self.target.match.role("chosen_length") is None:
            for side in ("chosen", "rejected"):  # SimPO is given log-probs per token
                given[f"policy_{side}"] = given[f"policy_{side}"] / given[f"{side}_length"]
        out = self.target.call(given, objective)
        pairs = len(four[0])
        if self.target.match.shape == "rows" and isinstance(out, tuple) and _rows(out[-1], 2 * pairs):
            return LossOut(_tensor(out[0]), out[-1][:pairs], out[-1][pairs:])
        return unpack(out)

    def _lengths(self, four: tuple[Any, ...], lengths: Any) -> dict[str, Any]:
        """Completion tokens of chosen and of rejected; one each where the experiment says nothing of lengths."""
        import torch

        chosen, rejected = lengths if lengths is not None else (torch.ones(len(four[0]), dtype=torch.long),) * 2
        if self.library == "numpy":
            chosen, rejected = chosen.numpy(), rejected.numpy()
        return {"chosen_length": chosen, "rejected_length": rejected}

    def _pair_by_pair(self, four: tuple[Any, ...], objective: Objective) -> LossOut:
        """The losses of single pairs; those of a function of plain numbers have no slopes."""
        outs = []
        for pair in range(len(four[0])):
            one = tuple(vector[pair] for vector in four)
            if self.library != "torch":
                one = tuple(value.item() for value in one)
            if self.library == "numpy":
                one = tuple(map(_numpy_number, one))
            outs.append(unpack(self.target.call(arrange(self.target.match.shape, one), objective)))
        columns = zip(*((out.loss, out.rewards_chosen, out.rewards_rejected) for out in outs), strict=True)
        return LossOut(*map(_column, columns))

    def _settle(self) -> None:
        """Ask once, for how it wants to be asked."""
        import torch

        two = torch.tensor([-1.0, -2.0], dtype=torch.float64)
        objective = Objective(options.own_kind(self.target.name) or "sigmoid", beta=self.target.fixed.get("beta", 1.0))
        with suppress(Exception):  # it will fail again, and be reported, when it is asked in earnest
            self._answer((two, two - 1, two, two), objective, None)
            self.target.gamma_is_ratio = objective.kind == "simpo" and self._takes_ratio(two * 0)

    def _takes_ratio(self, zero: Any) -> bool:
        """Is SimPO's gamma given as a ratio to beta, as its authors' code has it?  At h = 0 the loss tells.

        It is softplus(gamma), or softplus(beta gamma) of a ratio.
        """
        out = unpack(self._answer((zero,) * 4, Objective("simpo", beta=2.0, gamma=0.5), None))
        loss = float(out.loss.mean())
        return math.isclose(loss, math.log1p(math.exp(1.0)), rel_tol=1e-6)

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
        roots |= {str(i.argval).split(".")[0] for i in dis.get_instructions(current) if i.opname == "IMPORT_NAME"}
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


def arrange(shape: str, four: tuple[Any, ...], lengths: Any = None, *, alternates: bool = False) -> dict[str, Any]:
    """The four log-probs in the shape that a loss takes them, by role.

    `lengths`: how many tokens a log-prob is the sum of, chosen and rejected, where the loss sums them itself.
    `alternates`: chosen and rejected rows take turns.
    """
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
    if shape == "margin":
        return {"margin": policy_chosen - policy_rejected - reference_chosen + reference_rejected}
    if shape == "pairs":
        return {
            "policy_rows": (policy_chosen, policy_rejected),
            "reference_rows": (reference_chosen, reference_rejected),
        }
    if shape == "records":
        return {
            "policy_record": Record(policy_chosen, policy_rejected),
            "reference_record": Record(reference_chosen, reference_rejected),
        }
    if shape == "halves":
        return {
            "policy_rows": _joined(policy_chosen, policy_rejected, alternates),
            "reference_rows": _joined(reference_chosen, reference_rejected, alternates),
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
    if shape in ("sides", "tokens", "wide"):
        counts = TOKENS if lengths is None else tuple(int(column[0]) for column in lengths)
        return _by_token(shape, four, counts, alternates)
    return dict(zip(FOUR, four, strict=True))


def _by_token(shape: str, four: tuple[Any, ...], counts: tuple[int, ...], alternates: bool) -> dict[str, Any]:
    """Log-probs of tokens, for a loss that sums them: a mask for each side, or one for rows of both."""
    chosen, rejected = _masks(four[0], counts)
    if shape == "sides":
        policy, reference = (_all_spread(sides, counts, -1.0) for sides in (four[:2], four[2:]))
        masks = {"chosen_mask": chosen, "rejected_mask": rejected}
        return dict(zip(FOUR, (*policy, *reference), strict=True)) | masks
    outside = -1.0 if shape == "tokens" else 0.0  # a mask that is handed over has to be used
    return {
        "policy_rows": _joined(*_all_spread(four[:2], counts, outside), alternates),
        "reference_rows": _joined(*_all_spread(four[2:], counts, outside), alternates),
        "token_mask": _joined(chosen, rejected, alternates),
    }


def _all_spread(sides: tuple[Any, ...], counts: tuple[int, ...], outside: float) -> list[Any]:
    """(pair, longest + 2) each: a log-prob over its tokens, in halves of halves, so that their sum is it to the bit."""
    import torch

    found = []
    for logps, count in zip(sides, counts, strict=True):
        parts = [logps / 2 ** min(place + 1, count - 1) for place in range(count)]
        apart = torch.full_like(logps, outside)
        found.append(torch.stack([apart, *parts, *[apart] * (max(counts) - count + 1)], dim=1))
    return found


def _masks(logps: Any, counts: tuple[int, ...]) -> list[Any]:
    """(pair, longest + 2) each: 1 at the tokens that `_all_spread` gives a log-prob."""
    import torch

    places = torch.arange(max(counts) + 2)
    ones = [((places > 0) & (places <= count)).to(logps.dtype) for count in counts]
    return [row.repeat(len(logps), 1) for row in ones]


def _joined(chosen: Any, rejected: Any, alternates: bool) -> Any:
    """Chosen rows and then rejected ones, or one after the other in turns."""
    import torch

    return torch.stack([chosen, rejected], dim=1).flatten(0, 1) if alternates else torch.cat([chosen, rejected])


class Record:
    """What one model said about both completions, by any name: `.chosen_logps`, `["rejected_logps"]`."""

    def __init__(self, chosen: Any, rejected: Any) -> None:
        self.__dict__["sides"] = {"chosen": chosen, "rejected": rejected}

    def __getattr__(self, name: str) -> Any:
        said = concept(name)
        if said.what not in ("logp", "", "side") or said.which not in self.sides:
            raise AttributeError(f"a record of log-probs has no {name!r}; known are names like chosen_logps")
        return self.sides[said.which]

    __getitem__ = __getattr__


def _wants_tokens(error: Exception) -> bool:
    return isinstance(error, IndexError) or "dimension" in str(error).lower()


def _wants_one(error: Exception) -> bool:
    """Was one number wanted where several were given?"""
    return any(text in str(error) for text in ONE_NUMBER)


def _array(vector: Any) -> Any:
    """A vector for a function of numpy.  Raises Unsupported for a type of number that numpy has not."""
    try:
        return vector.detach().numpy().copy()
    except TypeError:
        raise Unsupported(f"{str(vector.dtype).removeprefix('torch.')}: numpy has no such numbers") from None


def _numpy_number(value: float) -> Any:
    import numpy

    return numpy.float64(value)


def _column(values: tuple[Any, ...]) -> Any:
    """One vector of the values of single pairs; None where none of them is a number."""
    import torch

    if all(value is None for value in values):
        return None
    values = tuple(math.nan if value is None else value for value in values)
    if any(torch.is_tensor(value) and value.requires_grad for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).reshape(()) for value in values])
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError):
        return None


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
    elif type(out).__module__.split(".")[0] not in LIBRARIES and any(hasattr(out, name) for name in HOLDERS):
        out = vars(out) | {"loss": next(getattr(out, name) for name in HOLDERS if hasattr(out, name))}
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
    """numpy's arrays and plain numbers as tensors; everything else as it is."""
    if type(value).__module__ == "numpy" or type(value) is float:
        import torch

        return torch.as_tensor(value, dtype=torch.float64 if type(value) is float else None)
    return value


__all__ = ["Loss", "Unsupported", "unpack"]
