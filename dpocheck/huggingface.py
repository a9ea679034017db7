"""What adapters of trainers derived from `transformers.Trainer` share: arguments, history, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpocheck.adapter import Recipe, Unsupported

OPTIMIZERS = {"sgd": "sgd", "adamw": "adamw_torch"}
# What is switched off so that a check sees sharply; a run with `recipe.defaults` leaves it to the trainer.
FORCED = {"bf16": False, "gradient_checkpointing": False, "logging_nan_inf_filter": False, "use_cpu": True}


def arguments(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The keyword arguments of `TrainingArguments` that a recipe asks for."""
    if recipe.optimizer not in OPTIMIZERS:
        raise Unsupported(f"optimizer {recipe.optimizer}")
    asked = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "optim": OPTIMIZERS[recipe.optimizer], "learning_rate": recipe.learning_rate,
        "optim_args": f"momentum={recipe.momentum}" if recipe.optimizer == "sgd" and recipe.momentum else None,
        "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1], "adam_epsilon": recipe.epsilon,
        "weight_decay": recipe.weight_decay, "warmup_steps": recipe.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" and recipe.warmup_steps
        else recipe.schedule,
        "max_steps": recipe.steps or -1, "num_train_epochs": recipe.epochs or 1,
        "per_device_train_batch_size": recipe.batch, "gradient_accumulation_steps": recipe.accumulation,
        "per_device_eval_batch_size": recipe.eval_batch, "dataloader_drop_last": recipe.drop_last,
        "eval_strategy": "steps" if recipe.eval_every else "no", "eval_steps": recipe.eval_every,
        "save_strategy": "steps" if recipe.save_every else "no", "save_steps": recipe.save_every or 500,
        "seed": recipe.seed, "data_seed": recipe.seed,
    }  # fmt: skip
    if not recipe.defaults:
        asked |= {
            "bf16": recipe.dtype == "bfloat16", "gradient_checkpointing": False, "logging_nan_inf_filter": False,
            "max_grad_norm": recipe.clip_norm or 0.0,
        }  # fmt: skip
    return asked


def history(log: Iterable[Mapping[str, Any]], sets: Iterable[str]) -> list[dict[str, Any]]:
    """`trainer.state.log_history` by split: evaluation entries carry `eval_NAME_`, the last one is the summary."""
    names, entries = tuple(sets), []
    for line in log:
        split = next((name for name in names if any(key.startswith(f"eval_{name}_") for key in line)), None)
        prefix = f"eval_{split}_" if split else ""
        split = split or ("summary" if "train_runtime" in line else "train")
        metrics = {key.removeprefix(prefix).removeprefix("eval_"): value for key, value in line.items()}
        entries.append({"step": line.get("step", 0), "split": split, "metrics": metrics})
    return entries


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders that a run left: step -> path."""
    return {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}


def resumed_from(recipe: Recipe, folder: Path) -> str | None:
    return None if recipe.resume_from is None else str(folder / f"checkpoint-{recipe.resume_from}")


def dataset(rows: Any) -> Any:
    """A `datasets.Dataset` of rows in memory or of a JSONL file."""
    from datasets import Dataset

    return Dataset.from_list(rows) if isinstance(rows, list) else Dataset.from_json(str(rows))


def lora(recipe: Recipe) -> Any | None:
    """peft's configuration of the LoRA that a recipe asks for."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    asked = recipe.lora
    return LoraConfig(r=asked.rank, lora_alpha=asked.alpha, target_modules=list(asked.targets), lora_dropout=0.0)
