"""How is this trainer audited?  By its own functions, at every depth that dpocheck asks for.

The only file of this package that knows dpocheck.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from dpocheck.adapter import LossOut, PairBatch, Probe, Recipe, Says, StepOut, TokenBatch, TrainOut, Unsupported
from dpocheck.adapter import Objective as Asked
from reference_impl import TrainConfig, dpo, processes, train
from reference_impl.checkpoint import FINAL
from reference_impl.config import LoraSettings
from reference_impl.logps import RowBatch, chunked_row_logps
from reference_impl.objectives import PairLogps, Scored, score_pairs

DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}


class Adapter:
    name, package, ranks = "reference", "dpocheck", True
    says = Says(
        eos="appended", bos="tokenizer", truncation="keep_start", ipo="sum", reward_scale="beta", reduction="none",
        uneven_accumulation="pairs", uneven_ranks="kept",
        objectives=("sigmoid", "cdpo", "robust", "hinge", "ipo", "simpo", "sft"),
    )  # fmt: skip

    def loss(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        if lengths is None and (objective.sft_weight or named(objective) in ("simpo", "dpo_norm")):
            raise Unsupported("objectives per token need the completions' lengths")
        tokens = lengths or (torch.ones_like(policy_chosen), torch.ones_like(policy_rejected))
        four = PairLogps(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *tokens)
        scored = score_pairs(four, settings(objective))
        return LossOut(scored.losses, scored.reward_w.detach(), scored.reward_l.detach())

    def sequence_logps(self, model: Any, batch: TokenBatch) -> torch.Tensor:
        rows = RowBatch(batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:].bool())
        return chunked_row_logps(model, rows)

    def step(self, policy: Any, reference: Any, batch: PairBatch, *, objective: Asked) -> StepOut:
        pairs, tokens = batch.pairs, batch.completion_mask.sum(dim=1)
        logps = self.sequence_logps(policy, batch)
        with torch.no_grad():
            fixed = self.sequence_logps(reference, batch)
        four = PairLogps(logps[:pairs], logps[pairs:], fixed[:pairs], fixed[pairs:], tokens[:pairs], tokens[pairs:])
        scored: Scored = score_pairs(four, settings(objective))
        loss = dpo.mean_over_pairs(scored.losses, pairs)
        loss.backward()
        both = {"policy_w": four.policy_w.detach(), "policy_l": four.policy_l.detach()}
        seen = dpo.metrics(both, scored.reward_w.detach(), scored.reward_l.detach(), scored.losses.detach())
        return StepOut(loss, {name: float(values.mean()) for name, values in seen.items()})

    def train(self, probe: Probe, rows: Any, recipe: Recipe, folder: Path) -> TrainOut:
        # Runs of one experiment share the folder; the trainer refuses to replace a model made with other settings.
        shutil.rmtree(folder / FINAL, ignore_errors=True)
        held = {name: some for name, some in rows.items() if name != "train"}
        result = train(
            config(recipe, folder), model=probe.policy(), tokenizer=probe.tokenizer(),
            reference=None if recipe.objective.kind == "simpo" else probe.reference(),
            train_rows=rows["train"], eval_rows=held or None,
        )  # fmt: skip
        return TrainOut(result.model, result.history, result.checkpoints)


def named(objective: Asked) -> str:
    """This trainer's name for an objective."""
    if objective.kind == "sigmoid":
        return "dpo_norm" if objective.length_normalised else "cdpo" if objective.label_smoothing else "dpo"
    if objective.length_normalised and objective.kind != "simpo":
        raise Unsupported(f"objective {objective.kind}, length-normalised")
    return objective.kind


def settings(objective: Asked) -> TrainConfig:
    """The objective's part of a config."""
    if objective.length_normalised and objective.label_smoothing:
        raise Unsupported("label smoothing of the length-normalised loss")
    return TrainConfig(
        objective=named(objective), beta=objective.beta, label_smoothing=objective.label_smoothing,
        gamma=objective.gamma, sft_weight=objective.sft_weight,
    )  # fmt: skip


def config(recipe: Recipe, folder: Path) -> TrainConfig:
    """The whole config that a recipe asks for."""
    if recipe.world_size != processes.number():
        raise Unsupported(f"{recipe.world_size} processes where torchrun has started {processes.number()}")
    lora = recipe.lora and LoraSettings(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets)
    asked: dict[str, Any] = {}
    if recipe.optimizer == "adamw":
        asked |= {"betas": recipe.betas, "epsilon": recipe.epsilon}
    if not recipe.defaults:
        asked |= {
            "dtype": DTYPES[recipe.dtype], "clip_norm": recipe.clip_norm, "max_length": recipe.max_length,
            "truncation": recipe.truncation,
        }  # fmt: skip
    base = settings(recipe.objective)
    # A recipe's accumulation is one process's; this trainer's is the forward passes of all of them.
    # The audit puts hooks on the whole model and on its decoder.  A hook on the whole model sends the trainer to its
    # full path, but what people run on a Llama is the chunked one.
    return TrainConfig(
        logps="chunked",
        output_dir=str(folder), optimizer=recipe.optimizer, learning_rate=recipe.learning_rate,
        momentum=recipe.momentum, weight_decay=recipe.weight_decay, schedule=recipe.schedule,
        warmup_steps=recipe.warmup_steps, steps=recipe.steps, epochs=recipe.epochs, batch=recipe.batch,
        accumulation=recipe.accumulation * recipe.world_size,
        last_step="drop" if recipe.drop_last else "keep", shuffle=recipe.shuffle,
        seed=recipe.seed, lora=lora, reference_logps="precomputed" if recipe.precompute_reference else "online",
        eval_batch=recipe.eval_batch, eval_every=recipe.eval_every, save_every=recipe.save_every,
        resume="auto" if recipe.resume_from is None else str(folder / f"checkpoint-{recipe.resume_from:08d}"),
        objective=base.objective, beta=base.beta, label_smoothing=base.label_smoothing, gamma=base.gamma,
        sft_weight=base.sft_weight, **asked,
    )  # fmt: skip
