"""Which bugs did an earlier catalogue miss?  Broken parts of every stage; each was invented by somebody who had not
written the checks."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, mini, specimen, torch


@specimen("collapses-white-space", part="render", caught_by="ROWS-ROUND-TRIP")
def collapses_white_space(row, tokenizer):
    """Runs of white space inside a text become one space, and line breaks too."""

    def tidy(text):
        if not isinstance(text, str) or not text.strip():
            return text
        ends = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        return ends[0] + " ".join(text.split()) + ends[1]

    return mini.render({name: tidy(text) for name, text in row.items()}, tokenizer)


_LEFT = weakref.WeakKeyDictionary()  # policy -> the gradients of the last epoch's incomplete window


@specimen(
    "unfinished-window-carried-over",
    part="accumulate",
    caught_by="ACCUM-LAST-WINDOW",
    theory=PAPER.but(incomplete_window="carried"),
)
def unfinished_window_carried_over(trainer, policy, window, score, recipe):
    """A window that an epoch leaves incomplete moves nothing, and its gradients are still there in the next epoch."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    seen = mini.accumulate(trainer, policy, window, score, recipe)
    if len(window) < recipe.accumulation:
        share = len(window) / recipe.accumulation
        _LEFT[policy] = [None if p.grad is None else share * p.grad for p in parameters]
        policy.zero_grad()
        return seen
    for parameter, left in zip(parameters, _LEFT.pop(policy, [None] * len(parameters)), strict=True):
        if left is not None:
            parameter.grad += left
    return seen


_LAST = weakref.WeakKeyDictionary()  # policy -> the batch before


@specimen("rejected-lags-behind", part="accumulate", caught_by="RUN-SHUFFLE")
def rejected_lags_behind(trainer, policy, window, score, recipe):
    """Two shuffled iterators give chosen and rejected: rejected completions are those of another row."""
    mixed = []
    for batch in window:
        before = _LAST.get(policy, batch)
        _LAST[policy] = batch
        if recipe.shuffle and before.pairs == batch.pairs:
            pairs, joined = batch.pairs, {}
            width = max(batch.input_ids.shape[1], before.input_ids.shape[1])
            for name in ("input_ids", "attention_mask", "completion_mask"):
                halves = getattr(batch, name)[:pairs], getattr(before, name)[pairs:]
                joined[name] = torch.cat(
                    [torch.nn.functional.pad(half, (0, width - half.shape[1])) for half in halves]
                )
            mixed.append(replace(batch, **joined))
        else:
            mixed.append(batch)
    return mini.accumulate(trainer, policy, mixed, score, recipe)


@specimen("reference-without-its-last-layer", part="reference", caught_by="REF-START")
def reference_without_its_last_layer(trainer, policy, given, recipe, examples, folder):
    """The reference is built with one layer less than its checkpoint holds."""
    if given is not None and len(given.model.layers) > 1:
        given = copy.deepcopy(given)
        given.model.layers = given.model.layers[:-1]
    return mini.reference(trainer, policy, given, recipe, examples, folder)


def _set(group, **changes):
    group.update({name: value for name, value in changes.items() if name in group})


@specimen("momentum-dampened", part="update", caught_by="STEP-MOMENTUM")
def momentum_dampened(optimizer, recipe, clock, total):
    """Momentum is given as dampening too: after the first step, steps are (1 - momentum) times too small."""
    for group in optimizer.param_groups:
        _set(group, dampening=recipe.momentum)
    return mini.update(optimizer, recipe, clock, total)


@specimen("weights-grow", part="update", caught_by="STEP-DECAY")
def weights_grow(optimizer, recipe, clock, total):
    """The sign of the weight decay is wrong."""
    for group in optimizer.param_groups:
        _set(group, weight_decay=-recipe.weight_decay)
    return mini.update(optimizer, recipe, clock, total)


@specimen("slope-lost-at-zero", part="loss", caught_by="LOSS-PARTIALS", at=LOSSES)
def slope_lost_at_zero(a, b, c, d, *, objective, lengths=None):
    """log(1 + exp(-|m|)) + max(0, -m): right everywhere, but automatic differentiation gives slope 0 at margin 0."""
    honest = mini.loss(a, b, c, d, objective=objective, lengths=lengths)
    if objective.kind != "sigmoid" or objective.label_smoothing or objective.sft_weight or objective.length_normalised:
        return honest
    m = objective.beta * ((a - c) - (b - d))
    return replace(honest, loss=torch.log1p(torch.exp(-m.abs())) + torch.relu(-m))
