"""Which faults are planted in copies of the trainer's functions, and which check has to find each?

A fault is an edit of a function's source: every old text must be there exactly once, so a table that has gone stale
fails instead of planting nothing.
"""

from __future__ import annotations

import inspect
import pkgutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

import reference_impl
from reference_impl import logps


@dataclass(frozen=True)
class Fault:
    """place: 'module.function' or 'module.Class.method' of reference_impl.  checks: each of them must fail.

    through_train: the trainer is asked by whole runs alone, since its adapter has another way to the finer answers.
    """

    place: str
    edits: tuple[tuple[str, str], ...]
    checks: tuple[str, ...]
    through_train: bool = False


def fault(
    place: str, old: str, new: str, *checks: str, also: tuple[str, str] | None = None, train: bool = False
) -> Fault:
    return Fault(place, ((old, new), *([also] if also else [])), checks, train)


def faulty_copy(planted: Fault) -> tuple[Any, str, Callable[..., Any], Callable[..., Any]]:
    """Owner, name, the right function, and its copy with the fault."""
    module_name, *inner = planted.place.split(".")
    module = import_module(f"reference_impl.{module_name}")
    owner: Any = module
    for name in inner[:-1]:
        owner = getattr(owner, name)
    right = getattr(owner, inner[-1])
    source = textwrap.dedent(inspect.getsource(right))
    for old, new in planted.edits:
        assert source.count(old) == 1, f"{planted.place} has {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile(f"from __future__ import annotations\n{source}", f"<fault in {planted.place}>", "exec"),
         vars(module), made)  # fmt: skip
    return owner, inner[-1], right, made[inner[-1]]


def plant(planted: Fault, patch: pytest.MonkeyPatch) -> None:
    """Puts the faulty copy wherever the right function stands, under whatever name it was imported."""
    owner, name, right, wrong = faulty_copy(planted)
    patch.setattr(owner, name, wrong)
    for info in pkgutil.iter_modules(reference_impl.__path__):
        if info.name.startswith("__") or info.ispkg:
            continue
        module = import_module(f"reference_impl.{info.name}")
        for alias, value in list(vars(module).items()):
            if value is right:
                patch.setattr(module, alias, wrong)
    for path, function in list(logps.PATHS.items()):
        if function is right:
            patch.setitem(logps.PATHS, path, wrong)


# fmt: off
FAULTS: dict[str, Fault] = {
    # dpo.py
    "normaliser is the largest logit": fault(
        "dpo.token_logps", "wide.logsumexp(-1)", "wide.max(-1).values", "LOGP-VALUE"),
    "log-softmax in bfloat16": fault(
        "dpo.token_logps", "wide = logits if logits.dtype == torch.float64 else logits.float()",
        "wide = logits.bfloat16()", "LOGP-VALUE"),
    "mean of token log-probs": fault(
        "dpo.sequence_logp", ".sum(-1)", ".sum(-1) / is_completion.sum(-1)", "LOGP-VALUE", "GRAD-RAGGED"),
    "every position is summed": fault(
        "dpo.sequence_logp", "torch.where(is_completion, logps, torch.zeros_like(logps)).sum(-1)",
        "logps.sum(-1) - logps.detach().amin(-1)", "LOGP-VALUE"),
    "reference left out": fault(
        "dpo.implicit_reward", "beta * (policy_logp - reference_logp)", "beta * policy_logp", "REF-START",
        "LOSS-VALUE"),
    "beta on the policy alone": fault(
        "dpo.implicit_reward", "beta * (policy_logp - reference_logp)", "beta * policy_logp - reference_logp",
        "LOSS-ARGUMENTS"),
    "chosen and rejected swapped": fault(
        "dpo.preference_logit", "reward_w - reward_l", "reward_l - reward_w", "LOSS-VALUE", "GRAD-IDENTITY"),
    "log of sigmoid": fault("dpo.dpo_loss", "-logsigmoid(logit)", "-logit.sigmoid().log()", "LOSS-EXTREME"),
    "loss of a detached margin": fault(
        "dpo.dpo_loss", "-logsigmoid(logit)", "-logsigmoid(logit.detach()) - 0.5 * (logit - logit.detach())",
        "LOSS-VALUE-GRADIENT"),
    "mean of the micro-batches' sums": fault("dpo.mean_over_pairs", "/ pairs_in_step", "/ len(losses)", "ACCUM-EVEN"),
    "sum over pairs": fault("dpo.mean_over_pairs", "losses.sum() / pairs_in_step", "losses.sum()", "GRAD-IDENTITY"),
    "accuracy of log-probs": fault(
        "dpo.metrics", "(reward_w > reward_l)", '(logps["policy_w"] > logps["policy_l"])', "METRIC-ACCURACY"),
    "margin without sign": fault(
        "dpo.metrics", "preference_logit(reward_w, reward_l)", "preference_logit(reward_w, reward_l).abs()",
        "METRIC-MARGIN"),
    "reference's log-probs are logged": fault(
        "dpo.metrics", '"logps/chosen": logps["policy_w"]', '"logps/chosen": logps["reference_w"]', "METRIC-LOGPS",
        train=True),
    # objectives.py
    "smoothing subtracted": fault(
        "objectives.cdpo_loss", "+ label_smoothing", "- label_smoothing", "LOSS-SMOOTHING"),
    "robust without its divisor": fault("objectives.robust_loss", "/ (1 - 2 * label_smoothing)", "", "LOSS-ROBUST"),
    "IPO's target doubled": fault("objectives.ipo_loss", "1 / (2 * tau)", "1 / tau", "LOSS-IPO"),
    "hinge without its margin": fault("objectives.hinge_loss", "1 - logit", "-logit", "LOSS-HINGE"),
    "SimPO's margin added": fault("objectives.simpo_loss", "logit - gamma", "logit + gamma", "LOSS-SIMPO"),
    "SFT term not per token": fault("objectives.sft_loss", "/ tokens_w", "", "LOSS-SFT"),
    # logps.py
    "first completion token not scored": fault(
        "logps.collate", "len(prompt) - 1 : length - 1", "len(prompt) : length - 1", "RUN-GRADIENT", train=True),
    "EOS not scored": fault(
        "logps.collate", "len(prompt) - 1 : length - 1", "len(prompt) - 1 : length - 2", "RUN-GRADIENT", train=True),
    "last prompt token scored": fault(
        "logps.collate", "len(prompt) - 1 : length - 1", "max(0, len(prompt) - 2) : length - 1", "METRIC-LOGPS",
        train=True),  # it is scored in both completions and cancels in the gradient
    "targets not shifted": fault(
        "logps.chunked_row_logps", "batch.input_ids[:, 1:]", "batch.input_ids[:, :-1]", "LOGP-VALUE"),
    "last position of a chunk lost": fault(
        "logps.chunked_row_logps", "dpo.token_logps(rule(head(hidden_chunk)), target_chunk)",
        "torch.nn.functional.pad(dpo.token_logps(rule(head(hidden_chunk[:-1])), target_chunk[:-1]), (0, 1))",
        "LOGP-TOKENS"),
    "gradient lost in the chunks": fault(
        "logps.chunked_row_logps", "checkpoint(head_logps, part, part_targets",
        "checkpoint(head_logps, part.detach(), part_targets", "STEP-ALL-PARAMETERS"),
    "positions all alike": fault(
        "logps._inputs", "torch.arange(token, device=batch.input_ids.device)", "torch.zeros(token, dtype=torch.long)",
        "GRAD-ATTENTION"),
    # rows
    "EOS twice": fault("tokens.end_once", "return (*ids, eos)", "return (*ids, eos, eos)", "ROWS-EOS"),
    "EOS never": fault("tokens.end_once", "return (*ids, eos)", "return tuple(ids)", "ROWS-EOS"),
    "a second EOS after a chat": fault(
        "tokens.end_once", "(*ids[: first + 1], *after)", "(*ids[: first + 1], *after, eos)", "ROWS-CHAT-EOS"),
    "prompt ends inside a merged token": fault(
        "tokens._split", "min(common_prefix_length(alone, chosen), common_prefix_length(alone, rejected))",
        "len(alone)", "ROWS-BOUNDARY"),
    "BOS in front of the completion": fault(
        "tokens._split", "end_once(side[shared:], special.eos, decode)",
        "end_once([*prefix, *side[shared:]], special.eos, decode)", "ROWS-BOS"),
    "no generation prompt": fault("render.render", "text(pair.prompt, True)", "text(pair.prompt, False)", "ROWS-CHAT"),
    "truncation keeps the end of completions": fault(
        "truncate.fit", "Fit(prompt, chosen[:room], rejected[:room],", "Fit(prompt, chosen[-room:], rejected[-room:],",
        "ROWS-TRUNCATION"),
    "columns swapped": fault(
        "data._fit", "fitted.prompt, fitted.chosen, fitted.rejected", "fitted.prompt, fitted.rejected, fitted.chosen",
        "ROWS-COLUMNS"),
    # reference
    "the reference is the policy in training": fault(
        "reference.OnlineReference.__call__", "pair_logps(self.model", "pair_logps(self.policy.model", "RUN-GRADIENT"),
    "adapter left on in the reference": fault(
        "reference.AdapterReference.__call__", "with model.disable_adapter():", "if True:", "LORA-REFERENCE"),
    "cache key without the reference": fault(
        "refcache.cache_key", '"reference": reference_hash,', "", "REF-CACHE-FRESH"),
    "cache off by one row": fault(
        "refcache.CachedReference.__call__", "self.place[pair.row]", "self.place[pair.row] - 1", "REF-PRECOMPUTED"),
    # models
    "dropout left on": fault("models.prepare_policy", "_dropout_off(policy)", "pass", "POLICY-NO-DROPOUT"),
    "dropout left on in the reference": fault("models.evaluating", "model.eval()", "model.train()", "REF-NO-DROPOUT"),
    "base trained beside the adapter": fault(
        "models.add_adapter", "return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)",
        "return peft.get_peft_model(model, lora, autocast_adapter_dtype=False).requires_grad_(True)", "LORA-BASE"),
    # training and optimize
    "normalised by the micro-batch": fault(
        "training.optimizer_step", "dpo.mean_over_pairs(losses, pairs_in_step)",
        "dpo.mean_over_pairs(losses, len(losses))", "ACCUM-EVEN"),
    "gradient not cleared": fault(
        "training.optimizer_step", "run.optimizer.zero_grad(set_to_none=True)", "pass", "STEP-TWO"),
    "clipped in each micro-batch": fault(
        "training.optimizer_step", "        sums.add(values)",
        "        clip_gradient(run.optimizer, config.clip_norm)\n        sums.add(values)", "CLIP-NORM"),
    "clipped by value": fault(
        "optimize.clip_gradient", "torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)",
        "torch.nn.utils.clip_grad_value_(parameters, clip_norm)", "CLIP-NORM"),
    "scaled up to the threshold": fault(
        "optimize.clip_gradient", "torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)",
        "[p.grad.mul_(clip_norm / norm) for p in parameters]", "CLIP-INACTIVE"),
    "rate never set": fault("training.optimizer_step", 'group["lr"] = rate', "pass", "STEP-SCHEDULE"),
    "schedule does not know the warm-up": fault(
        "optimize.learning_rate", "(step - warmup) / (total - warmup)", "step / total", "STEP-SCHEDULE"),
    "betas of AdamW not handed on": fault(
        "optimize.build_optimizer", "betas=tuple(config.betas)", "betas=(0.9, 0.999)", "STEP-ADAM"),
    "weight decay that nobody asked for": fault(
        "optimize.build_optimizer", "momentum=config.momentum, weight_decay=config.weight_decay",
        "momentum=config.momentum, weight_decay=0.01", "STEP-NOTHING-HIDDEN"),
    # metrics and evaluation
    "mean of the micro-batches' means": fault(
        "metrics.PairSums.add", "self.pairs += len(next(iter(values.values())))", "self.pairs += 1", "EVAL-BATCH",
        also=("value.detach().double().sum()", "value.detach().double().mean()")),
    "short last batch not evaluated": fault(
        "evaluate.evaluate", "range(len(pairs)), size", "range(len(pairs) - len(pairs) % size), size", "EVAL-BATCH"),
    "evaluation against another reference": fault(
        "evaluate.judge", "reference(pairs)\n",
        "reference(pairs) if policy_w.requires_grad else (policy_w, policy_l)\n",
        "EVAL-VALUE"),
    # checkpoint and order
    "moments not restored": fault(
        "checkpoint.load_checkpoint",
        "load_optimizer_state(run.policy.model, run.optimizer, path / TRAINER / OPTIMIZER, crew)", "pass",
        "RUN-RESUME"),
    "weights not restored": fault(
        "checkpoint.load_checkpoint", "load_policy(run.policy, path, crew)", "pass", "RUN-RESUME"),
    "order restarted": fault(
        "checkpoint.load_checkpoint", 'Position(**facts["position"])', "Position()", "RUN-RESUME"),
    "epoch restarted": fault(
        "checkpoint.load_checkpoint", 'Position(**facts["position"])', 'Position(0, facts["position"]["consumed"])',
        "RUN-RESUME-EPOCH"),
    "seed ignored": fault("order.epoch_order", '"order {seed} {epoch}"', '"order {epoch}"', "RUN-SHUFFLE"),
    "the same order in each epoch": fault(
        "order.epoch_order", '"order {seed} {epoch}"', '"order {seed}"', "RUN-SHUFFLE"),
    "a pair drawn twice": fault(
        "order.windows", "order = epoch_order(pairs, seed, epoch, shuffle)",
        "order = epoch_order(pairs, seed, epoch, shuffle); order[-1] = order[0]", "RUN-COVERAGE"),
}
# fmt: on

QUICK = (
    "log of sigmoid", "last position of a chunk lost", "EOS twice", "the reference is the policy in training",
    "normalised by the micro-batch", "short last batch not evaluated", "order restarted",
)  # fmt: skip
