"""TRL 0.7 to 1.16 through `DPOTrainer.train` alone: one adapter for every shape that its API has had.

Settings moved from the constructor to `DPOConfig` (0.9.3), names changed, losses came and went.  All that a recipe asks
for is gathered first; what the installed release does not know is then left out where it asks for nothing, and refused
where it does.
"""

import inspect
from dataclasses import fields
from importlib.metadata import version

from dpocheck.adapter import Says, TrainOut, Unsupported
from dpocheck.huggingface import FORCED, arguments, checkpoints, dataset, history, lora, resumed_from

NAMES = {"eval_strategy": "evaluation_strategy", "processing_class": "tokenizer"}  # new: old
LOSSES = {"sigmoid": (0, 0), "hinge": (0, 7, 5), "ipo": (0, 7, 5), "robust": (0, 9, 3)}  # since
RENDERS_CHAT = (0, 12)  # and takes rows without a prompt
SEVERAL_LOSSES = (0, 20)
CUTS_WHOLE_ROWS = (0, 12)  # before, `truncation_mode` is documented for the prompt, and completions keep their start
STARTS_KEPT = (0, 29)  # the documented default


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:3] if part.isdigit())


class Adapter:
    name = package = "trl"
    forced = FORCED
    ranks = keeps_group = True  # transformers' Trainer finds torchrun's variables; accelerate keeps its process group

    def __init__(self):
        self.release = now = release("trl")
        offered = [name for name, since in LOSSES.items() if now >= since]
        offered += ["sft"] if now >= (0, 9, 3) else []
        offered += ["cdpo"] if (0, 7, 5) <= now < (0, 29) else []  # `label_smoothing` is documented for "sigmoid"
        self.says = Says(
            # Accelerator, which transformers asks: `even_batches`, default True, "Duplicate samples".
            eos="appended", reward_scale="beta", objectives=tuple(offered), uneven_ranks="repeated",
            truncation="keep_start" if now >= STARTS_KEPT else "keep_end" if now >= CUTS_WHOLE_ROWS else None,
            ipo="mean" if now >= (0, 7, 11) else None,
        )  # fmt: skip

    def train(self, probe, rows, recipe, folder):
        import trl
        from transformers import TrainingArguments

        sets = {name: dataset(held) for name, held in rows.items()}
        self.refuse(recipe, sets)
        limits = {} if recipe.defaults else {"max_length": recipe.max_length, "truncation_mode": recipe.truncation}
        asked = {
            **self.losses(recipe.objective), "beta": recipe.objective.beta,
            "label_smoothing": recipe.objective.label_smoothing, **limits,
            "precompute_ref_log_probs": recipe.precompute_reference,
        }  # fmt: skip
        if recipe.lora and probe.reference_path and (0, 7, 5) <= self.release < (0, 29):
            asked["force_use_ref_model"] = True  # else a reference beside an adapter is refused; before 0.8 always
        base = getattr(trl, "DPOConfig", TrainingArguments)
        known = {field.name for field in fields(base)}
        told = {NAMES.get(name, name) if name not in known else name: value
                for name, value in arguments(recipe, folder).items()}  # fmt: skip
        if base is TrainingArguments:
            config, more = base(**told, remove_unused_columns=False), asked
        else:
            config, more = base(**told, **{name: value for name, value in asked.items() if name in known}), {}
            self.missing(asked, known)
        train, held = sets.pop("train"), next(iter(sets), None)
        more |= {"processing_class": probe.tokenizer(), "peft_config": lora(recipe)}
        trainer = self.made(
            trl.DPOTrainer, recipe.shuffle, more, model=probe.policy(), ref_model=probe.reference(), args=config,
            train_dataset=train, eval_dataset=sets.get(held),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumed_from(recipe, folder))
        if held:
            trainer.evaluate()
        log = [{key.replace("eval_", f"eval_{held}_"): value for key, value in line.items()}
               for line in trainer.state.log_history]  # fmt: skip
        rounded = {"loss": 4} if release("transformers") < (5,) else {}
        return TrainOut(trainer.model, history(log, sets), checkpoints(folder), rounded)

    def refuse(self, recipe, sets):
        """What this release does not offer, by its documentation."""
        row = next(iter(sets["train"]))
        if self.release < RENDERS_CHAT and not isinstance(row["chosen"], str):
            raise Unsupported("chat rows: this release takes text, rendered by its user")
        if self.release < RENDERS_CHAT and "prompt" not in row:
            raise Unsupported("rows without a prompt")
        if recipe.max_length and self.release < CUTS_WHOLE_ROWS:
            raise Unsupported("a limit of whole rows: this release cuts the prompt first, then the completion's end")
        if len(sets) > 2:
            raise Unsupported("several evaluation sets")
        if recipe.momentum and release("transformers") < (5,):
            raise Unsupported("momentum: transformers before 5 has no setting for that of SGD")

    def losses(self, asked):
        if asked.kind not in LOSSES or self.release < LOSSES[asked.kind]:
            raise Unsupported(f"the loss {asked.kind}")
        if asked.length_normalised and (asked.kind != "sigmoid" or self.release < (1, 4)):
            raise Unsupported(f"the loss {asked.kind}, length-normalised")
        kind = "sigmoid_norm" if asked.length_normalised else asked.kind
        if self.release >= SEVERAL_LOSSES:
            also = {"sft": asked.sft_weight} if asked.sft_weight else {}
            return {"loss_type": [kind, *also], "loss_weights": [1.0, *also.values()]}
        alone = {"loss_type": kind} if self.release >= (0, 7, 5) else {}
        return alone | ({"rpo_alpha": asked.sft_weight} if asked.sft_weight else {})

    def made(self, trainer, shuffle, more, **given):
        """The trainer, with rows in their order unless they are to be shuffled."""
        known = inspect.signature(trainer.__init__).parameters
        more = {NAMES.get(name, name) if name not in known else name: value for name, value in more.items()}
        self.missing(more, known)

        class Ordered(trainer):
            def _get_train_sampler(self, *rest):
                if shuffle:
                    return super()._get_train_sampler(*rest)
                from torch.utils.data import SequentialSampler

                return SequentialSampler(self.train_dataset)

        return Ordered(**given, **{name: value for name, value in more.items() if name in known})

    def missing(self, asked, known):
        for name, value in asked.items():
            if name not in known and value:
                raise Unsupported(f"{name}: this release has no such setting")
