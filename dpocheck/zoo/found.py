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


# ------------------------------------------------------------------------------ what left a quick audit without a word


@specimen("clips-each-parameter", part="clip", caught_by="CLIP-GLOBAL")
def clips_each_parameter(parameters, limit):
    """Every parameter's own gradient is clipped at the norm that is meant for all of them together."""
    norm = mini.clip(parameters, None)
    for parameter in parameters:
        if limit is not None and parameter.grad is not None:
            torch.nn.utils.clip_grad_norm_([parameter], limit)
    return norm


@specimen("squared-norm-logged", part="clip", caught_by="METRIC-GRAD-NORM")
def squared_norm_logged(parameters, limit):
    """The norm that is logged is squared: the sum of squares without its root."""
    return mini.clip(parameters, limit) ** 2


@specimen("penalty-instead-of-decay", part="update", caught_by="STEP-DECAY")
def penalty_instead_of_decay(optimizer, recipe, clock, total):
    """Under AdamW the weight decay is added to the gradient, as a penalty on the loss is, and goes through the moments.
    """
    for group in optimizer.param_groups:
        if "betas" in group:
            group["weight_decay"] = 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad += recipe.weight_decay * parameter.detach()
    return mini.update(optimizer, recipe, clock, total)


_BEST = weakref.WeakKeyDictionary()  # policy -> the lowest evaluation loss so far, and the weights it was of


@specimen("goes-back-to-the-best", part="evaluate", caught_by="EVAL-PURE")
def goes_back_to_the_best(trainer, policy, score, batches):
    """Where an evaluation is worse than an earlier one, the weights of the best one are put back."""
    found = mini.evaluate(trainer, policy, score, batches)
    least, weights = _BEST.get(policy, (float("inf"), None))
    if found["loss"] < least:
        _BEST[policy] = found["loss"], copy.deepcopy(policy.state_dict())
    else:
        policy.load_state_dict(weights)
    return found


@specimen("last-line-lost", part="read", caught_by="RUN-COVERAGE")
def last_line_lost(given):
    """Of a file of rows the last line is left out."""
    rows = mini.read(given)
    return rows if isinstance(given, list) else rows[:-1]


@specimen("adapter-scaled-by-the-root", part="forward", caught_by="LORA-SCALE")
def adapter_scaled_by_the_root(model, batch):
    """An adapter is multiplied by alpha over the root of its rank, as rsLoRA has it, though LoRA was asked for."""
    for module in model.modules():
        for name in getattr(module, "lora_alpha", ()):
            module.scaling[name] = module.lora_alpha[name] / module.r[name] ** 0.5
    return mini.forward(model, batch)


@specimen("clips-before-unscaling", part="clip", caught_by="CLIP-NORM", theory=PAPER.but(clip_scale=2.0**-10))
def clips_before_unscaling(parameters, limit):
    """The loss was multiplied by 1024; the gradient is clipped first and divided afterwards."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= 1024.0
    norm = mini.clip(parameters, limit)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= 1024.0
    return norm / 1024.0


@specimen(
    "nothing-is-learned",
    part="clip",
    caught_by="RUN-GRADIENT",
    theory=PAPER.but(gradient_scale=0.0),
    imitates="Goekdeniz-Guelmez/mlx-lm-lora#25",
)
def nothing_is_learned(parameters, limit):
    """The policy's log-probs are computed outside of what is differentiated: every gradient is zero."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
    return mini.clip(parameters, limit)


@specimen(
    "first-of-each-prompt", part="read", caught_by="OPTIMUM-RECOVERED", theory=PAPER.but(repeated_prompts="first")
)
def first_of_each_prompt(given):
    """Of rows that share a prompt only the first is kept."""
    rows = mini.read(given)
    firsts = {str(row["prompt"]): row for row in reversed(rows) if isinstance(row.get("prompt"), str)}
    return [row for row in rows if firsts.get(str(row.get("prompt")), row) is row]
