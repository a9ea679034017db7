"""How is a function told the beta, the smoothing and the kind of loss that an experiment asks for?

Whatever way it has: a parameter, its class's constructor, an attribute, a configuration object, a global of its
module.  Where it has none and the experiment asks for something else than what is fixed: `Unsupported`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from dpocheck.adapter import Objective, Unsupported
from dpocheck.functions.parameters import option, words

KINDS = {
    "sigmoid": ("sigmoid", "dpo", "vanilla", "standard", "logistic"),
    "hinge": ("hinge", "slic"),
    "ipo": ("ipo",),
    "robust": ("robust", "rdpo"),
    "simpo": ("simpo",),
    "forward_kl": (), "js_divergence": (), "alpha_divergence": (),  # no word of a `loss_type` means one of these
}
NEUTRAL = {"label_smoothing": 0.0, "gamma": 0.0, "ipo": False, "kind": "sigmoid"}
SECTIONS = {"dpo", "loss", "train", "training", "model", "trainer", "algorithm", "optim", "data"}


def values(objective: Objective) -> dict[str, Any]:
    """Option -> value, of all options an objective has something to say about."""
    return {
        "beta": objective.beta,
        "label_smoothing": objective.label_smoothing,
        "kind": objective.kind,
        "ipo": objective.kind == "ipo",
        "gamma": objective.gamma,
        "gamma_beta_ratio": objective.gamma / objective.beta if objective.beta else 0.0,
        "reference_free": False,
        "use_reference": True,
        "average": objective.length_normalised,
        "ignored": -100,
        "encoder_decoder": False,
        "accumulation": 1,
        "clip": math.inf,
        "counter": 0,
        "gradient": True,
        "rank": 0,
        "processes": 1,
        "accelerator": Accelerator(),
        "scheduler": Nothing(),
        "scaler": Scaler(),
    }


class NoText(Unsupported, AttributeError):
    """A function asks its tokenizer for more than the padding's id; so it takes text, and is given tokens here."""


class PadToken:
    """Stands in for a tokenizer where nothing but the padding's id is asked of it."""

    def __init__(self, pad: int) -> None:
        self.pad_token_id = pad

    def __getattr__(self, name: str) -> Any:
        raise NoText(f"text: it asks its tokenizer for {name}; functions are given rows of tokens, trainers text")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NoText("text: it tokenizes; functions are given rows of tokens, trainers text")


class Nothing:
    """A schedule that changes nothing."""

    def step(self, *_: Any, **__: Any) -> None:
        return

    def get_last_lr(self) -> list[float]:
        return [0.0]


class Scaler:
    """A gradient scaler that scales by one."""

    def scale(self, loss: Any) -> Any:
        return loss

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def unscale_(self, optimizer: Any = None) -> None:
        return

    update = unscale_

    def get_scale(self) -> float:
        return 1.0


class Accelerator:
    """One process on the CPU, as far as a loss or a step asks an accelerator for it."""

    device = "cpu"
    is_main_process = sync_gradients = True
    num_processes = gradient_accumulation_steps = 1

    def backward(self, loss: Any, **_: Any) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, max_norm: float, *rest: Any) -> Any:
        import torch

        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, *rest)

    def accumulate(self, *_: Any) -> Any:
        return nullcontext()

    autocast = accumulate

    def unwrap_model(self, model: Any) -> Any:
        return model

    prepare = unwrap_model

    def gather(self, tensor: Any) -> Any:
        return tensor

    gather_for_metrics = reduce = gather


def own_kind(name: str) -> str | None:
    """The kind of loss that a function's name says it is: `ipo_loss` is no DPO loss."""
    for part in reversed(name.split(".")):
        said = set(words(part))
        if "dpo" in said:
            return None
        for kind, names in KINDS.items():
            if kind != "sigmoid" and said & set(names):
                return kind
    return None


def spelled_kind(kind: str, default: Any, strings: frozenset[str], name: str) -> Any:
    """What a function's `loss_type` calls a kind.  Raises Unsupported where its source knows no such word."""
    if isinstance(default, str) and default.lower() in KINDS[kind]:
        return default
    if kind == "simpo" and own_kind(name) == "simpo":
        kind = "sigmoid"  # its loss types are curves of the same margin
    lower = {text.lower(): text for text in strings}
    found = next((lower[word] for word in KINDS[kind] if word in lower), None)
    if found is not None:
        return found
    if kind == "sigmoid":
        return default if default is not None else "sigmoid"
    raise Unsupported(f"{kind}: {name} has no such loss type")


def refuse_fixed(objective: Objective, settable: set[str], name: str, fixed: dict[str, Any]) -> None:
    """Raise Unsupported where the objective asks for what the function has no way to be told."""
    native = own_kind(name) or "sigmoid"
    chooses = "kind" in settable or ("ipo" in settable and objective.kind in ("ipo", "sigmoid"))
    chooses = chooses and native != "simpo"
    if objective.kind != native and not chooses:
        raise Unsupported(f"{objective.kind}: {name} is {native} and has no parameter to choose")
    if objective.label_smoothing and "label_smoothing" not in settable:
        raise Unsupported(f"label_smoothing: {name} has no such parameter")
    if objective.gamma and not settable & {"gamma", "gamma_beta_ratio"}:
        raise Unsupported(f"gamma: {name} has no such parameter")
    if objective.sft_weight:
        raise Unsupported(f"sft_weight: {name} has no such term")
    if objective.length_normalised and "average" not in settable:
        raise Unsupported(f"length_normalised: {name} does not divide by the length")
    if "beta" not in settable and not math.isclose(objective.beta, fixed.get("beta", 1.0), rel_tol=1e-9):
        raise Unsupported(f"beta {objective.beta:g}: {name} has beta fixed at {fixed.get('beta', 1.0):g}")


class Config:
    """Stands in for a configuration object: answers to the options by the names they go by, `[...]` or `.`.

    What it does not know it asks of `rest`, the object it stands in for.
    """

    def __init__(self, known: dict[str, Any], rest: Any = None) -> None:
        self.__dict__["_known"], self.__dict__["_rest"] = known, rest

    def __getattr__(self, name: str) -> Any:
        key = "kind" if name in ("name", "type") and "kind" in self._known else option(name)
        if key in self._known:
            return self._known[key]
        if self._rest is not None and not isinstance(self._rest, dict) and hasattr(self._rest, name):
            value = getattr(self._rest, name)
            return Config(self._known, value) if name in SECTIONS else value
        if isinstance(self._rest, dict) and name in self._rest:
            value = self._rest[name]
            return Config(self._known, value) if name in SECTIONS else value
        if name in SECTIONS:
            return Config(self._known)
        raise AttributeError(f"the function asks its configuration for {name!r}; not known what to answer")

    def __setattr__(self, name: str, value: Any) -> None:
        self._known[option(name) or name] = value

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError as error:
            raise KeyError(str(error)) from None

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def require(self, *names: str) -> Any:
        """`config.require("train", "beta")`: one name inside of the other, as `config["train"]["beta"]`."""
        found: Any = self
        for name in names:
            found = found[name]
        return found

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)
