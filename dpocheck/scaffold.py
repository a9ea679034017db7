"""How does a new adapter begin?  As a file that already runs, with three lines to replace."""

from __future__ import annotations

import re
from pathlib import Path

from dpocheck.files import CannotWrite

TEMPLATE = '''\
"""{name} under audit:  dpocheck audit {file}:Adapter"""

from dpocheck.adapter import Says, TrainOut, Unsupported, refuse_others
from dpocheck.miniature import MINIATURE  # REPLACE 1 of 3: import your trainer


class Adapter:
    name, version = "{name}", "0"  # as the report shows them
    says = Says()  # what your trainer's documentation promises, as Says(eos="appended"); a promise is held against it
    forced = {{}}  # settings forced below that are not what people run, as {{"bf16": False}}: the report says so

    def train(self, probe, rows, recipe, folder):
        # probe.policy(), probe.reference() (None: none is handed over) and probe.tokenizer() are transformers objects;
        # probe.policy_path, probe.reference_path and probe.tokenizer_path are the same as checkpoint folders.
        # A trainer that always wants a reference gets `probe.reference() or probe.policy()`: each call makes a copy.
        # Read from policy_path instead, it is another model where the policy was changed in memory, and that is found.
        # rows["train"] is a list of {{"prompt", "chosen", "rejected"}} or the path of a JSONL file; other names are
        # evaluation sets.  `recipe` says how to train (dpocheck/experiment.py).  `folder` is this run's own.
        # Name what you pass on, and take out below what your trainer has not; what else a recipe asks for is refused:
        # not applicable, never a pass or a failure.  What is named and ignored counts against the trainer.
        # Each of these opens more checks: clip_norm, weight_decay, warmup_steps, momentum, label_smoothing, sft_weight,
        # shuffle, max_length, truncation, eval_batch, eval_every, save_every, resume_from, defaults, dtype, lora.
        # Plain SGD shows gradients: put it in where the trainer has another optimizer, and say so under `forced`.
        # So with a template or a separator of its own around the prompt, or shuffling that cannot be switched off.
        # One that counts epochs: epochs = steps * batch * accumulation / rows; raise Unsupported where it is not whole.
        refuse_others(recipe, "beta", "learning_rate", "batch", "accumulation", "steps", "epochs", "seed",
                      kind=("sigmoid",), optimizer=("sgd",), schedule=("constant",))
        if len(rows) > 1 or not isinstance(rows["train"], list):
            raise Unsupported("evaluation sets, and rows on disk")
        if not all(isinstance(row.get("prompt"), str) for row in rows["train"]):
            raise Unsupported("rows without a prompt, and chats")
        trainer = MINIATURE  # REPLACE 2 of 3: your trainer, set up from probe, rows and recipe
        done = trainer.train(probe, rows, recipe, folder)  # REPLACE 3 of 3: train, and hand back what came out
        # policy: the trained model, or the folder it was saved in.  history: what was logged, in TRL's names, as
        # {{"step": 1, "split": "train", "metrics": {{"loss": 0.69}}}}.  checkpoints: step -> folder.
        return TrainOut(policy=done.policy, history=done.history, checkpoints=done.checkpoints)
'''


class NameRefused(ValueError):
    """No adapter can be written under this name; the message says why."""


def new_adapter(name: str, folder: Path) -> Path:
    """Write `<name>.py` into `folder`.  Raises NameRefused or CannotWrite; never overwrites."""
    stem = name.removesuffix(".py")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", stem):
        raise NameRefused(f"{name!r} is no name for an adapter; use letters, digits and _, as mytrainer")
    path = folder / f"{stem}.py"
    text = TEMPLATE.format(name=stem, file=path.name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise NameRefused(f"{path.name} is there already and is not overwritten; choose another name") from None
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
    return path
