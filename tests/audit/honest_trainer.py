"""DPO as people write it on top of `transformers.Trainer`: a collator, `compute_loss`, and a log of means."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from honest_runs import Own, lines, refuse, split
from torch.nn.utils.rnn import pad_sequence

from dpocheck.adapter import Says, TrainOut
from dpocheck.huggingface import arguments, checkpoints, history


class TrainerSubclass:
    """`Trainer` divides by the number of micro-batches, so that these weigh the same."""

    says = Says(eos="appended", reward_scale="beta", uneven_accumulation="micro-batches",
                objectives=("sigmoid", "cdpo"))  # fmt: skip

    def train(self, probe, rows, recipe, folder):
        refuse(recipe)
        tokenizer, policy, reference = probe.tokenizer(), probe.policy(), probe.reference()
        reference = (copy.deepcopy(policy) if reference is None else reference).eval().requires_grad_(False)
        policy.config.attention_dropout = 0.0
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.0
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sets = {name: [pair(split(tokenizer, row)) for row in lines(held)] for name, held in rows.items()}
        if recipe.precompute_reference:
            with torch.no_grad():
                for held in sets.values():
                    for one in held:
                        one["reference"] = scores(reference, collate([one], pad))
        trainer = subclass()(
            model=policy, args=given(recipe, folder), train_dataset=sets.pop("train"), eval_dataset=sets or None,
            data_collator=lambda examples: collate(examples, pad),
        )  # fmt: skip
        trainer.reference, trainer.objective, trainer.told = reference, recipe.objective, []
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        if sets and not recipe.eval_every:
            trainer.evaluate()
        return TrainOut(trainer.model, history(trainer.state.log_history, sets), checkpoints(folder))


def given(recipe: Any, folder: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        **arguments(recipe, folder), remove_unused_columns=False, label_names=["scored"],
        train_sampling_strategy="random" if recipe.shuffle else "sequential",
    )  # fmt: skip


def pair(parts: tuple[list[int], list[int], list[int]]) -> dict[str, Any]:
    prompt, *sides = parts
    return {"rows": [(torch.tensor(prompt + side), max(1, len(prompt))) for side in sides]}


def collate(examples: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rows lie side by side: chosen, rejected, chosen, rejected."""
    rows = [row for example in examples for row in example["rows"]]
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad)
    real = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    scored = pad_sequence([(torch.arange(len(ids)) >= start).long() for ids, start in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": real, "scored": scored}
    if "reference" in examples[0]:
        batch["reference"] = torch.cat([example["reference"] for example in examples])
    return batch


def scores(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(pair, 2)"""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = -F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return (each.view(logits.shape[:2]) * batch["scored"][:, 1:]).sum(-1).view(-1, 2)


def subclass() -> type:
    from transformers import Trainer

    class DPO(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            own = scores(model, inputs)
            with torch.no_grad():
                ref = inputs["reference"] if "reference" in inputs else scores(self.reference, inputs)
            rewards = self.objective.beta * (own - ref)
            margin, eps = rewards[:, 0] - rewards[:, 1], self.objective.label_smoothing
            losses = -F.logsigmoid(margin) * (1 - eps) - F.logsigmoid(-margin) * eps
            self.told.append(Own.told(losses, rewards.T, own.T))
            return (losses.mean(), {"losses": losses}) if return_outputs else losses.mean()

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                return self.compute_loss(model, inputs), None, None

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            held = self.eval_dataset if eval_dataset is None else eval_dataset
            if isinstance(held, dict):
                return [self.evaluate(rows, ignore_keys, f"eval_{name}") for name, rows in held.items()]
            before, self.told, self.prefix = self.told, [], metric_key_prefix
            metrics = super().evaluate(held, ignore_keys, metric_key_prefix)
            self.told = before
            return metrics

        def means(self):
            """Over pairs in an evaluation; over micro-batches in training, as the loss that `Trainer` logs."""
            told = self.told
            if self.model.training:
                told = [{name: value.mean().view(1) for name, value in one.items()} for one in told]
            return Own.mean(told)

        def log(self, logs, *rest):
            if any(key.endswith("loss") for key in logs) and self.told and "train_runtime" not in logs:
                prefix = "" if "loss" in logs else f"{self.prefix}_"
                logs |= {f"{prefix}{name}": value for name, value in self.means().items() if name != "loss"}
                self.told = []
            super().log(logs, *rest)

    return DPO
