"""How does torchtune's `full_dpo_distributed`, its recipe of full training, run on a CPU?"""

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path

NAMES = {"lr": "learning_rate", "log_probs/chosen": "logps/chosen", "log_probs/rejected": "logps/rejected"}
KNOWN = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", *NAMES)
COSINE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
FORCED = {"process_group": "gloo", "accelerator": "its memory is not asked about",
          "lr_scheduler": "none where the rate is constant"}  # fmt: skip


def recipe():
    """Its class, from a file that is installed and belongs to no package."""
    import torchtune

    name = "full_dpo_distributed"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(torchtune.__file__).parents[1] / f"recipes/{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for question in ("get_memory_stats", "log_memory_stats", "cleanup_before_training"):  # refused on a CPU
            setattr(module.training, question, lambda *_, **__: {})
    return sys.modules[name].FullDPORecipeDistributed


def tokenizer(path, max_seq_len):
    """A tokenizer of any tokenizer.json, put together from torchtune's own parts as its Llama 2 tokenizer is."""
    from torchtune.modules.transforms import tokenizers as parts

    class Tokenizer(parts.HuggingFaceBaseTokenizer):
        def encode(self, text, add_bos=True, add_eos=True, trim_leading_whitespace=False):
            return super().encode(text, add_bos, add_eos)

        def __call__(self, sample, inference=False):
            end = {"bos_id": self.bos_id, "eos_id": None if inference else self.eos_id}
            rows = parts.tokenize_messages_no_special_tokens(self, sample.pop("messages"), **end)
            return sample | dict(zip(("tokens", "mask"), rows, strict=True))

        def tokenize_messages(self, messages, add_eos=True):
            return tuple(self({"messages": messages}, inference=not add_eos).values())

    made = Tokenizer(f"{path}/tokenizer.json", tokenizer_config_json_path=f"{path}/tokenizer_config.json")
    made.max_seq_len, made.pad_id = max_seq_len, made.tokenizer.token_to_id(made.config["pad_token"])
    return made


class Log(list):
    """A metric logger: the history as it comes."""

    def log_config(self, config):
        pass

    def log_dict(self, told, step):
        metrics = {NAMES.get(name, name): float(told[name]) for name in KNOWN if name in told}
        self.append({"step": step, "split": "train", "metrics": metrics})


def component(name, **settings):
    return {"_component_": name, **settings}


def passes(asked, rows):
    """(epochs, the most steps of one) that make the steps asked for; None where no number of epochs does."""
    if asked.steps is None:
        return asked.epochs or 1, None
    whole = max(1, rows // asked.world_size // asked.batch // asked.accumulation)  # the last, short batch is dropped
    fits = asked.steps <= whole or asked.steps % whole == 0
    return (math.ceil(asked.steps / whole), min(asked.steps, whole)) if fits else None


def model(folder):
    """Its Llama, of the size that a checkpoint has."""
    c = json.loads((Path(folder) / "config.json").read_text())
    return component(
        "torchtune.models.llama2.llama2", vocab_size=c["vocab_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"], embed_dim=c["hidden_size"],
        intermediate_dim=c["intermediate_size"], max_seq_len=c["max_position_embeddings"], norm_eps=c["rms_norm_eps"],
        attn_dropout=c.get("attention_dropout", 0.0),
    )  # fmt: skip


def settings(probe, asked, rows, times, out):
    """The recipe's configuration, as its file would say it."""
    def checkpoint(folder):
        return component(
            "torchtune.training.FullModelHFCheckpointer", checkpoint_dir=str(folder), model_type="LLAMA2",
            checkpoint_files=["model.safetensors"], recipe_checkpoint=None, output_dir=str(out),
        )  # fmt: skip

    rate, smoothing = {"lr": asked.learning_rate, "weight_decay": asked.weight_decay}, asked.objective.label_smoothing
    adam = component("torch.optim.AdamW", betas=list(asked.betas), eps=asked.epsilon, **rate)
    sgd = component("torch.optim.SGD", momentum=asked.momentum, **rate)
    return {
        "model": model(probe.policy_path), "checkpointer": checkpoint(probe.policy_path), "output_dir": str(out),
        "ref_checkpointer": checkpoint(probe.reference_path or probe.policy_path), "device": "cpu", "dtype": "fp32",
        "tokenizer": component(f"{__name__}.tokenizer", path=str(probe.tokenizer_path), max_seq_len=asked.max_length),
        "dataset": component("torchtune.datasets.preference_dataset", source="json", data_files=str(rows)),
        "loss": component("torchtune.rlhf.loss.DPOLoss", beta=asked.objective.beta, label_smoothing=smoothing),
        "optimizer": sgd if asked.optimizer == "sgd" else adam, "clip_grad_norm": asked.clip_norm,
        "lr_scheduler": component(COSINE, num_warmup_steps=asked.warmup_steps) if asked.schedule == "cosine" else None,
        "metric_logger": component(f"{__name__}.Log"), "log_every_n_steps": 1, "resume_from_checkpoint": False,
        "batch_size": asked.batch, "gradient_accumulation_steps": asked.accumulation, "seed": asked.seed,
        "shuffle": asked.shuffle, "epochs": times[0], "max_steps_per_epoch": times[1],
    }  # fmt: skip


@contextlib.contextmanager
def group(processes):
    """A process group of gloo's: torchrun's, or of this process alone.  gloo has no mean, so a sum is divided."""
    import torch.distributed as dist

    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if processes == 1 else {}
    dist.init_process_group("gloo", **alone)
    reduce, mean = dist.all_reduce, dist.ReduceOp.AVG

    def all_reduce(tensor, op=dist.ReduceOp.SUM, **more):
        reduce(tensor, op=dist.ReduceOp.SUM if op == mean else op, **more)
        if op == mean:
            tensor.div_(processes)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = reduce
        dist.destroy_process_group()
