"""TRL 1.16 through `DPOTrainer.train` alone."""

from dpocheck.adapter import Says, TrainOut, Unsupported
from dpocheck.huggingface import FORCED, arguments, checkpoints, dataset, history, lora, resumed_from

DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
LOSSES = {kind: kind for kind in ("sigmoid", "robust", "hinge", "ipo")} | dict.fromkeys(DIVERGENCES, "sigmoid")


class Adapter:
    name = package = "trl"
    # DPOConfig and the DPO page of TRL's documentation: `ref_model`, "the loss is averaged over log-likelihoods" (IPO),
    # `truncation_mode` defaults to "keep_start"; label smoothing is named for "robust" and "exo_pair" alone.
    says = Says(eos="appended", truncation="keep_start", ipo="mean", reward_scale="beta", uneven_ranks="repeated",
                objectives=(*LOSSES, "sft"))  # fmt: skip
    forced = FORCED
    ranks = keeps_group = True  # transformers' Trainer finds torchrun's variables; accelerate keeps its process group

    def train(self, probe, rows, recipe, folder):
        from trl import DPOConfig, DPOTrainer

        asked = recipe.objective
        if asked.kind not in LOSSES or (asked.length_normalised and asked.kind != "sigmoid"):
            raise Unsupported(f"objective {asked.kind}{', length-normalised' if asked.length_normalised else ''}")
        losses = {"sigmoid_norm" if asked.length_normalised else LOSSES[asked.kind]: 1.0}
        losses |= {"sft": asked.sft_weight} if asked.sft_weight else {}
        limits = {} if recipe.defaults else {"max_length": recipe.max_length, "truncation_mode": recipe.truncation}
        config = DPOConfig(
            loss_type=list(losses), loss_weights=list(losses.values()), beta=asked.beta,
            label_smoothing=asked.label_smoothing, precompute_ref_log_probs=recipe.precompute_reference,
            f_divergence_type=asked.kind if asked.kind in DIVERGENCES else "reverse_kl",
            train_sampling_strategy="random" if recipe.shuffle else "sequential",
            f_alpha_divergence_coef=asked.alpha, **limits, **arguments(recipe, folder),
        )  # fmt: skip
        sets, adapter = {name: dataset(held) for name, held in rows.items()}, lora(recipe)
        trainer = DPOTrainer(
            model=probe.policy(), ref_model=probe.reference(), args=config, peft_config=adapter,
            train_dataset=sets.pop("train"), eval_dataset=sets or None, processing_class=probe.tokenizer(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumed_from(recipe, folder))
        if sets:
            trainer.evaluate()
        return TrainOut(trainer.model, history(trainer.state.log_history, sets), checkpoints(folder))
