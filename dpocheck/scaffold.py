"""How does a new adapter begin?  As a file that already runs, with three lines to replace."""

from __future__ import annotations

import re
from pathlib import Path

from dpocheck.files import CannotWrite

TEMPLATE = '''\
"""{name} under audit:  dpocheck audit {file}:Adapter"""

from dpocheck.adapter import Says, TrainOut, Unsupported
from dpocheck.miniature import MINIATURE  # REPLACE 1 of 3: import your trainer


class Adapter:
    name, version = "{name}", "0"  # as the report shows them
    says = Says(eos="appended")  # what your trainer's documentation promises; what it leaves open, leave out
    forced = {{}}  # settings forced below that are not what people run, as {{"bf16": False}}: the report says so

    def train(self, probe, rows, recipe, folder):
        # probe.policy(), probe.reference() (None: none is handed over) and probe.tokenizer() are transformers objects;
        # probe.policy_path, probe.reference_path and probe.tokenizer_path are the same as checkpoint folders.
        # rows["train"] is a list of {{"prompt", "chosen", "rejected"}} or the path of a JSONL file; other names are
        # evaluation sets.  `recipe` says how to train: objective.kind, objective.beta, optimizer, learning_rate, batch,
        # accumulation, steps or epochs, seed, ... (dpocheck/experiment.py).  `folder` is this run's own.
        if recipe.objective.kind not in ("sigmoid", "ipo"):
            raise Unsupported(recipe.objective.kind)  # what your trainer cannot do: not applicable, never a pass
        # Refuse so, too, what it never said it takes, or it counts as broken: rows without a prompt, chat rows
        # (lists of messages), recipe.accumulation, .lora, .clip_norm, .optimizer other than "sgd", evaluation sets.
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
