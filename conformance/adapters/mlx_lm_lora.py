"""mlx-lm-lora through its `train_dpo`, on Apple's MLX: no torch, no transformers model."""

import json
import math
import os
from pathlib import Path

from dpocheck.adapter import Says, TrainOut, Unsupported

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")  # a step would be compiled by a C++ compiler for 20 seconds
NAMES = {"train_loss": "loss", "train_chosen_reward": "rewards/chosen", "train_rejected_reward": "rewards/rejected",
         "train_margins": "rewards/margins", "train_accuracies": "rewards/accuracies"}  # fmt: skip
# Every row goes through a chat template; where the tokenizer has none, mlx-lm would put its own words around the text.
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and not m['content'].endswith(eos_token) %}{{ eos_token }}{% endif %}{% endfor %}"
)
FORCED = {"optimizer": "MLX's plain SGD", "chat_template": "the texts alone, where the tokenizer has none"}


class Reports(list):
    """The trainer's callback: its reports as they come."""

    def on_train_loss_report(self, report):
        self.append(report)

    def on_val_loss_report(self, report):
        pass


def unsupported(rows, recipe):
    """What `train_dpo` does not offer, in words."""
    asked, chat = recipe.objective, any(not isinstance(text, str) for row in rows for text in row.values())
    reasons = {
        "a reference computed ahead": recipe.precompute_reference, "clipping": recipe.clip_norm is not None,
        "rows without a prompt": any(row.get("prompt") is None for row in rows), "chat rows": chat,
        f"objective {asked.kind}": asked.kind not in ("sigmoid", "hinge", "ipo"), "LoRA": recipe.lora is not None,
        "label smoothing": asked.label_smoothing, "an SFT term": asked.sft_weight, "resuming": recipe.resume_from,
        "a mean over tokens": asked.length_normalised, "bias-corrected AdamW": recipe.optimizer != "sgd",
        "a schedule": recipe.schedule != "constant" or recipe.warmup_steps, "float64": recipe.dtype == "float64",
        "rows in their order: each batch is drawn anew": not recipe.shuffle and len(rows) != recipe.batch,
        "truncation that keeps the end": recipe.max_length and recipe.truncation != "keep_start",
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


class Adapter:
    name = package = "mlx-lm-lora"
    # README: "--dpo-cpo-loss-type: Loss function - sigmoid, hinge, ipo, or dpop".
    says = Says(objectives=("sigmoid", "hinge", "ipo"))
    forced = FORCED

    def train(self, probe, rows, recipe, folder):
        import mlx.core as mx
        import numpy as np
        from mlx.optimizers import SGD
        from mlx.utils import tree_flatten
        from mlx_lm import load
        from mlx_lm_lora.trainer.datasets import DPODataset
        from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

        mx.set_wired_limit = lambda *_: 0  # two questions about an Apple GPU, where there is none
        mx.device_info = getattr(mx, "metal", mx).device_info = lambda *_: {"max_recommended_working_set_size": 0}
        held = rows["train"]
        held = held if isinstance(held, list) else [json.loads(line) for line in Path(held).read_text().splitlines()]
        if reason := unsupported(held, recipe) or ("an evaluation set of its own batch" if len(rows) > 1 else None):
            raise Unsupported(reason)
        policy, tokenizer = load(str(probe.policy_path))
        reference, _ = load(str(probe.reference_path or probe.policy_path))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN
        passes = (recipe.epochs or 1) * math.ceil(len(held) / recipe.batch)
        args = DPOTrainingArgs(
            batch_size=recipe.batch, iters=recipe.steps * recipe.accumulation if recipe.steps else passes,
            gradient_accumulation_steps=recipe.accumulation, steps_per_report=recipe.accumulation,
            steps_per_eval=10**6, steps_per_save=10**6, max_seq_length=recipe.max_length or 2048, val_batches=1,
            adapter_file=str(folder / "adapters.safetensors"), beta=recipe.objective.beta,
            loss_type=recipe.objective.kind,
        )  # fmt: skip
        mx.random.seed(recipe.seed)
        np.random.seed(recipe.seed)
        data, reports = DPODataset(held, tokenizer), Reports()
        sgd = SGD(recipe.learning_rate, recipe.momentum, recipe.weight_decay)
        train_dpo(policy, reference.freeze(), sgd, data, data, args, training_callback=reports)
        trained = folder / "trained"
        trained.mkdir(exist_ok=True)
        mx.save_safetensors(str(trained / "model.safetensors"), dict(tree_flatten(policy.parameters())))
        history = [
            {"step": -(-one["iteration"] // recipe.accumulation), "split": "train",
             "metrics": {name: one[key] for key, name in NAMES.items() if key in one}}
            for one in reports
        ]  # fmt: skip
        return TrainOut(policy=trained, history=history)
