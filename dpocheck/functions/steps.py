"""How does a hand-written training step become the capability `step`?"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpocheck.adapter import Objective, PairBatch, StepOut
from dpocheck.functions import options
from dpocheck.functions.batches import pair_batch
from dpocheck.functions.losses import unpack
from dpocheck.functions.models import outside, speaking
from dpocheck.functions.parameters import concept, words
from dpocheck.functions.target import Target, constructor


class Step:
    """Calls a step, or a loss of a batch and then its backward; the gradients are those of the optimizer's step."""

    def __init__(self, target: Target) -> None:
        self.target = target
        names = {*target.facts.attributes, *(p.name for p in constructor(target.owner))}
        holds = any(concept(name).what == "optimizer" for name in names)
        self.clears_gradients = bool(target.match.role("optimizer")) or holds
        self.labels = "ignored"
        self.left: tuple[Any, dict[Any, Any]] = (None, {})

    def __call__(self, policy: Any, reference: Any, batch: PairBatch, *, objective: Objective) -> StepOut:
        options.refuse_fixed(objective, self.target.settable() | {"beta"}, self.target.name, self.target.fixed)
        self._refuse_beta(objective)
        self._refuse_left_padding(batch)
        optimizer = recording(policy) if self.clears_gradients else None
        self._put_back(policy)
        ran: list[bool] = []
        handles = [p.register_post_accumulate_grad_hook(lambda _: ran.append(True)) for p in policy.parameters()]
        models = {"policy": policy, "reference": reference}
        if optimizer is not None:
            models["optimizer"] = optimizer
        try:
            spoken = speaking(self.target.facts, policy, reference, pad=batch.pad_token_id)
            with spoken, clipping_logits(policy, self.target):
                out = self._ask(batch, objective, models)
            if not ran:
                loss = unpack(out).loss
                if hasattr(loss, "requires_grad") and loss.requires_grad:
                    (loss.mean() if loss.ndim else loss).backward()
        finally:
            for handle in handles:
                handle.remove()
        self._keep(policy, optimizer)
        return StepOut(number(unpack(out).loss), metrics(out))

    def _ask(self, batch: PairBatch, objective: Objective, models: dict[str, Any]) -> Any:
        """Call it; labels that it cannot take are given again as plain token ids."""
        for labels in [self.labels] if self.labels == "ids" else ["ignored", "ids"]:
            filled = pair_batch(batch, self.target.facts, models["policy"], models["reference"], labels)
            given = models | {"batch": filled, "keys": filled.by_name}
            if self.target.match.shape == "logits":
                given |= self._said(batch, filled.by_name, models)
            given["settings"] = {"pad": batch.pad_token_id, "device": batch.input_ids.device, "pairs": batch.pairs}
            given["settings"]["tokenizer"] = options.PadToken(batch.pad_token_id)
            try:
                out = self.target.call(given, objective, models)
            except (IndexError, RuntimeError) as error:
                if labels == "ids" or not outside(error) or self.target.facts.ignores:
                    raise
                continue
            self.labels = labels
            return out
        raise AssertionError("one of the two was returned or raised")

    def _said(self, batch: PairBatch, keys: Any, models: dict[str, Any]) -> dict[str, Any]:
        """What the models say about both completions, for a step that is given logits.

        Where it does not move logits and labels by one itself, they are handed over moved.
        """
        moved = not self.target.facts.shifts
        given: dict[str, Any] = {"keys": (lambda name: _moved(keys(name))) if moved else keys}
        for who in ("policy", "reference"):
            with contextlib.nullcontext() if who == "policy" else _no_gradient():
                said = models[who](input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            logits = getattr(said, "logits", said)
            halves = logits[: batch.pairs], logits[batch.pairs :]
            for which, half in zip(("chosen", "rejected"), halves, strict=True):
                given[f"{who}_{which}_logits"] = half[:, :-1] if moved else half
        return given

    def _refuse_beta(self, objective: Objective) -> None:
        """A step without any way to be told beta has it fixed; what it is, only its source can say."""
        target = self.target
        if "beta" in target.settable() or not target.facts.known:
            return
        fixed = target.fixed.get("beta")
        if fixed is not None and abs(fixed - objective.beta) > 1e-9:
            raise options.Unsupported(f"beta {objective.beta:g}: {target.name} has beta fixed at {fixed:g}")

    def _refuse_left_padding(self, batch: PairBatch) -> None:
        """A step that takes no attention mask is written for rows padded on the right, where none is needed."""
        facts, habits = self.target.facts, self.target.facts.habits
        names = facts.strings | facts.fields | {p.name for p in self.target.parameters}
        told = not facts.known or facts.nested or habits.hands_attention or facts.attention_keys
        if told or any(concept(name).what == "attention" for name in names):
            return
        if not bool(batch.attention_mask[:, 0].all()):
            raise options.Unsupported(f"left padding: {self.target.name} takes no attention mask")

    def _put_back(self, policy: Any) -> None:
        """Gradients as the last call left them, before they were replaced by those of the optimizer's step."""
        owner, left = self.left
        if owner is policy:
            for parameter in policy.parameters():
                parameter.grad = left.get(parameter)

    def _keep(self, policy: Any, optimizer: Any) -> None:
        if optimizer is None:
            return
        self.left = (policy, {p: p.grad for p in policy.parameters()})
        if optimizer.taken is not None:
            for parameter in policy.parameters():
                parameter.grad = optimizer.taken.get(parameter)


def _moved(tensor: Any) -> Any:
    """Labels and masks one place on; numbers that belong to whole rows as they are."""
    return tensor[:, 1:] if tensor.ndim == 2 else tensor


def _no_gradient() -> Any:
    import torch

    return torch.no_grad()


def unit(policy: Any) -> float:
    """How much larger a gradient of the head is than that of a logit: k of a table model, 1 of any other.

    The final norm of a table is k/sqrt(H) where the token stands (`probes.tables`).
    """
    try:
        weight = policy.model.norm.weight
        k = weight[0].item() * math.sqrt(weight.numel())
    except AttributeError:
        return 1.0
    return k if k > 100 else 1.0


@contextmanager
def clipping_logits(policy: Any, target: Target) -> Iterator[None]:
    """A norm that the function clips at is meant for gradients of ordinary size; here it is one of logits.

    Without this, a hard-coded clipping at 1 would act on every table, whose head has gradients k times larger.
    """
    import torch

    scale, whole = unit(policy), torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, max_norm: float, *rest: Any, **named: Any) -> Any:
        return whole(parameters, max_norm * scale, *rest, **named)

    space = getattr(inspect.unwrap(target.function), "__globals__", {})
    names = [name for name, value in space.items() if value is whole]
    torch.nn.utils.clip_grad_norm_ = clip
    space.update(dict.fromkeys(names, clip))
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = whole
        space.update(dict.fromkeys(names, whole))


def recording(policy: Any) -> Any:
    """An optimizer that moves nothing and remembers the gradients it was stepped with."""
    import torch

    class Recording(torch.optim.SGD):
        taken: dict[Any, Any] | None = None

        def step(self, closure: Any = None) -> Any:
            loss = closure() if closure is not None else None
            kept = [p for group in self.param_groups for p in group["params"]]
            self.taken = {p: None if p.grad is None else p.grad.detach().clone() for p in kept}
            return loss

    return Recording(policy.parameters(), lr=0.0)


def number(loss: Any) -> float:
    """The loss as a number: a tensor's or a list's mean, or a number as it is."""
    if isinstance(loss, list | tuple):
        return sum(map(float, loss)) / len(loss)
    return float(loss.detach().double().mean()) if hasattr(loss, "detach") else float(loss)


def metrics(out: Any) -> dict[str, float]:
    """Numbers that came back beside the loss, by TRL's names where their own names are clear."""
    parts = list(out) if isinstance(out, tuple | list) else [out]
    found: dict[str, float] = {}
    for part in parts:
        if not hasattr(part, "items"):
            continue
        for name, value in part.items():
            known = trl_name(str(name))
            if known:
                try:
                    found[known] = number(value)
                except (TypeError, ValueError, RuntimeError, ZeroDivisionError):
                    continue
    return found


def trl_name(name: str) -> str | None:
    """`chosen_reward` -> `rewards/chosen`.  A bare `margin` may be with or without beta: it is left out."""
    said, found = concept(name), set(words(name))
    if found & {"accuracy", "accuracies", "acc"}:
        return "rewards/accuracies"
    if said.what == "reward" and found & {"margin", "margins"}:
        return "rewards/margins"
    if said.which and said.who != "reference" and said.what in ("reward", "logp"):
        return f"{'rewards' if said.what == 'reward' else 'logps'}/{said.which}"
    return None
