"""TRL 1.16 through `DPOTrainer.train` alone."""

from __future__ import annotations

from dpocheck.adapter import Says, TrainOut, Unsupported

LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "hinge": "hinge", "ipo": "ipo"}


class Adapter:
    name = "trl"
    package = "trl"
    says = Says(
        eos="appended", truncation="keep_start", ipo="mean", reward_scale="beta",
        objectives=("sigmoid", "robust", "hinge", "ipo", "sft"),
        options=("label_smoothing", "max_length", "truncation", "precompute_reference", "clip_norm"),
    )  # fmt: skip
    forced = {"bf16": False, "gradient_checkpointing": False, "logging_nan_inf_filter": False, "use_cpu": True}

    def train(self, probe, rows, recipe, folder):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        asked = recipe.objective
        if asked.kind not in LOSSES:
            raise Unsupported(f"objective {asked.kind}")
        main = "sigmoid_norm" if asked.length_normalised and asked.kind == "sigmoid" else LOSSES[asked.kind]
        losses, weights = [main], [1.0]
        if asked.sft_weight:
            losses, weights = [main, "sft"], [1.0, asked.sft_weight]
        exact = {} if recipe.defaults else dict(
            bf16=recipe.dtype == "bfloat16", gradient_checkpointing=False, max_length=recipe.max_length,
            max_grad_norm=recipe.clip_norm or 0.0, logging_nan_inf_filter=False,
        )  # fmt: skip
        peft = None
        if recipe.lora:
            from peft import LoraConfig

            peft = LoraConfig(
                r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=list(recipe.lora.targets),
                lora_dropout=0.0,
            )  # fmt: skip
        config = DPOConfig(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
            loss_type=losses, loss_weights=weights, beta=asked.beta, label_smoothing=asked.label_smoothing,
            optim={"sgd": "sgd", "adamw": "adamw_torch"}[recipe.optimizer], learning_rate=recipe.learning_rate,
            optim_args=f"momentum={recipe.momentum}" if recipe.optimizer == "sgd" and recipe.momentum else None,
            adam_beta1=recipe.betas[0], adam_beta2=recipe.betas[1], adam_epsilon=recipe.epsilon,
            weight_decay=recipe.weight_decay, lr_scheduler_type=recipe.schedule, warmup_steps=recipe.warmup_steps,
            max_steps=recipe.steps or -1, num_train_epochs=recipe.epochs or 1,
            per_device_train_batch_size=recipe.batch, gradient_accumulation_steps=recipe.accumulation,
            per_device_eval_batch_size=recipe.eval_batch, dataloader_drop_last=recipe.drop_last,
            eval_strategy="steps" if recipe.eval_every else "no", eval_steps=recipe.eval_every,
            save_strategy="steps" if recipe.save_every else "no", save_steps=recipe.save_every or 500,
            seed=recipe.seed, data_seed=recipe.seed, truncation_mode=recipe.truncation,
            train_sampling_strategy="random" if recipe.shuffle else "sequential",
            precompute_ref_log_probs=recipe.precompute_reference, **exact,
        )  # fmt: skip
        sets = {
            name: Dataset.from_list(held) if isinstance(held, list) else Dataset.from_json(str(held))
            for name, held in rows.items()
        }
        trainer = DPOTrainer(
            model=probe.policy(), ref_model=None if peft else probe.reference(), args=config,
            train_dataset=sets.pop("train"), eval_dataset=sets or None, processing_class=probe.tokenizer(),
            peft_config=peft,
        )  # fmt: skip
        resumed = None if recipe.resume_from is None else str(folder / f"checkpoint-{recipe.resume_from}")
        trainer.train(resume_from_checkpoint=resumed)
        if sets:
            trainer.evaluate()
        saved = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
        return TrainOut(trainer.model, history(trainer.state.log_history, sets), saved)


def history(log, sets):
    """log_history by split: evaluation entries carry `eval_NAME_`, the last entry is the summary."""
    entries = []
    for line in log:
        split = "summary" if "train_runtime" in line else "train"
        prefix = ""
        for name in sets:
            if any(key.startswith(f"eval_{name}_") for key in line):
                split, prefix = name, f"eval_{name}_"
        metrics = {key.removeprefix(prefix).removeprefix("eval_"): value for key, value in line.items()}
        entries.append({"step": line.get("step", 0), "split": split, "metrics": metrics})
    return entries
