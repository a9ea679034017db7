"""How are token rows scored?  Parts: forward, logps, reference, loss.

Choices that the sources leave open: IPO compares sums; implicit rewards are beta times the log-ratio that the loss
compares, so that they do without the reference, or by length, or by a divergence's f'(u), where the loss does.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax, logsigmoid, relu

from dpocheck.adapter import LossOut, TokenBatch, Unsupported
from dpocheck.experiment import DIVERGENCES, Objective, Recipe
from dpocheck.miniature.parts import Parts
from dpocheck.miniature.ranks import here, wait
from dpocheck.miniature.rows import Batch, Example, batches_of


@dataclass(frozen=True)
class Scored:
    """Per pair: summed log-probs of policy and reference, losses, implicit rewards."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    losses: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor

    def detached(self) -> Scored:
        return Scored(*(getattr(self, f.name).detach() for f in fields(self)))


def forward(model: Any, batch: TokenBatch) -> torch.Tensor:
    """(row, token, vocabulary) logits, without dropout; positions count attended tokens, whatever the padding side."""
    mask = batch.attention_mask.to(model.device)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = {}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        positions["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    training = model.training
    model.eval()  # evaluation mode, and not a probability of zero, also silences functional dropout
    try:
        ids = batch.input_ids.to(model.device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    finally:
        model.train(training)


def logps(logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """(row,) log pi(completion given prompt): the logits at t score the token at t + 1, in float32 or better.

    Positions that do not count are left out before the softmax: multiplied by zero, a NaN there would survive.
    """
    counted = batch.completion_mask[:, 1:].to(logits.device).bool()
    labels = batch.input_ids[:, 1:].to(logits.device)[counted]
    scores = logits[:, :-1][counted]
    scores = log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    tokens = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return tokens.new_zeros(counted.shape).masked_scatter(counted, tokens).sum(1)


def reference(
    trainer: Parts, policy: Any, given: Any, recipe: Recipe, examples: Sequence[Example], folder: Path | None
) -> Callable[[Batch], torch.Tensor]:
    """A function from a batch to the reference's (row,) log-probs, without a graph.

    The reference is the model that was given, else the policy as it was passed: its frozen copy, or the policy with
    its adapter switched off.  With `precompute_reference` all `examples` are scored before training, and the numbers
    are kept under a name that depends on everything they depend on.
    """
    adapter = given is None and hasattr(policy, "disable_adapter")
    model = given if given is not None else policy if adapter else frozen_copy(policy)

    def online(batch: TokenBatch) -> torch.Tensor:
        with torch.no_grad(), policy.disable_adapter() if adapter else nullcontext():
            return trainer.logps(trainer.forward(model, batch), batch)

    if not recipe.precompute_reference:
        return online
    rows = [(e.row, e.chosen.ids, e.chosen.start, e.rejected.ids, e.rejected.start) for e in examples]
    path = Path(folder) / f"reference-{fingerprint(model, rows, recipe.dtype)}.safetensors"
    if here()[0] == 0 and not path.exists():  # one rank writes it, all read it
        table = torch.zeros(max(example.row for example in examples) + 1, 2, dtype=torch.float64)
        for chunk in batches_of(examples, recipe.batch):
            table[[example.row for example in chunk]] = online(trainer.collate(chunk, 0)).double().view(2, -1).T.cpu()
        save_file({"logps": table}, path)
    wait()
    table = load_file(path)["logps"]
    return lambda batch: table[list(batch.rows)].T.reshape(-1)


def fingerprint(model: Any, *settings: Any) -> str:
    """sha256 of all weights and of the settings' JSON."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_copy(model: Any) -> Any:
    """An independent copy that no optimizer can move."""
    return copy.deepcopy(model).requires_grad_(False)


def loss(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor, *, objective: Objective, lengths: Any = None,
) -> LossOut:  # fmt: skip
    """Per-pair losses and implicit rewards, by the sources that `Objective` names.

    `lengths`: the completion tokens of chosen and of rejected, (pair,) each.
    """
    kind, beta, smoothing = objective.kind, objective.beta, objective.label_smoothing
    check(objective, lengths)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        logps.to(torch.promote_types(logps.dtype, torch.float32))
        for logps in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    )
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if kind == "simpo":
        chosen, rejected = policy_chosen, policy_rejected
    if kind == "simpo" or objective.length_normalised:
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    if kind in DIVERGENCES:
        chosen, rejected = divergence(chosen, objective), divergence(rejected, objective)
    h = chosen - rejected
    margin = beta * h
    if kind == "hinge":
        losses = relu(1 - margin)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        losses = -logsigmoid(margin - objective.gamma)
    elif smoothing == 0:  # under a divergence too
        losses = -logsigmoid(margin)
    elif kind == "sigmoid":
        losses = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    else:
        losses = (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)
    if objective.sft_weight:
        losses = losses - objective.sft_weight * policy_chosen / lengths[0]
    return LossOut(losses, (beta * chosen).detach(), (beta * rejected).detach())


def divergence(ratio: torch.Tensor, objective: Objective) -> torch.Tensor:
    """f'(u) - f'(1) at u = exp(ratio), ratio = log(pi/ref), of the objective's divergence: 0 where they are equal."""
    if objective.kind == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    alpha = 1.0 if objective.kind == "forward_kl" else objective.alpha
    return -torch.expm1(-alpha * ratio) / alpha


def check(objective: Objective, lengths: Any) -> None:
    """Refuses what would otherwise be ignored or be no number."""
    kind, smoothing = objective.kind, objective.label_smoothing
    if smoothing and kind not in ("sigmoid", "robust"):
        raise Unsupported(f"label_smoothing with {kind}: only sigmoid and robust have it")
    if objective.gamma and kind != "simpo":
        raise Unsupported(f"gamma with {kind}: only simpo has it")
    if (kind == "robust" and smoothing >= 0.5) or (kind == "ipo" and objective.beta == 0):
        raise Unsupported(f"{objective}: robust needs label_smoothing < 0.5, ipo needs beta > 0")
    if lengths is None and (kind == "simpo" or objective.length_normalised or objective.sft_weight):
        raise ValueError(f"{objective} needs the completions' lengths: pass lengths=(chosen, rejected), (pair,) each")
