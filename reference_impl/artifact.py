"""What is left when a run is done?  The model as everybody loads it, with where it came from."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from reference_impl.checkpoint import FINAL, CheckpointError
from reference_impl.config import to_yaml
from reference_impl.processes import OtherProcessError
from reference_impl.shards import shared_folder
from reference_impl.weights import save_policy

if TYPE_CHECKING:
    from reference_impl.prepare import Run


def command_line() -> str:
    """The command of this process, as a shell reads it: `dpo-train …`, `python -m …` or `python script.py …`."""
    script = Path(sys.argv[0])
    if script.suffix == "" and script.is_file():
        return shlex.join([script.name, *sys.argv[1:]])
    return shlex.join(["python", *sys.orig_argv[1:]])


def save_final(run: Run, rows: list[dict[str, Any]]) -> Path:
    """Writes `final`: safetensors, config, tokenizer, model card, settings and command, in one piece.

    Raises:
        CheckpointError: the disk is full or gone.
    """
    target = run.folder / FINAL
    facts = {"command": command_line(), "identity": run.identity, "versions": versions(), "step": run.total_steps}
    try:
        with shared_folder(target, facts, run.crew) as writing:
            save_policy(run.policy, writing, run.crew)
            run.crew.together(lambda: _describe(run, rows, writing) if run.crew.first else None)
    except (OSError, SafetensorError, OtherProcessError) as error:
        raise CheckpointError(f"{target} could not be written ({error}): make room, run the same command") from error
    return target


def _describe(run: Run, rows: list[dict[str, Any]], folder: Path) -> None:
    (folder / "train_config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, rows), encoding="utf-8")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def model_card(run: Run, rows: list[dict[str, Any]]) -> str:
    """A model card in the hub's format, with the numbers of the run."""
    config = run.config
    base = config.model or getattr(run.policy.model, "name_or_path", "") or "a model in memory"
    head = ["---", "library_name: transformers", "tags: [dpo, preference-optimization]"]
    if config.model is not None and not Path(config.model).exists():
        head.append(f"base_model: {json.dumps(config.model)}")
    lines = [
        *[*head, "---", f"# {base} trained on preferences ({config.objective})", ""],
        f"- objective: `{config.objective}`, beta {config.beta}, sft_weight {config.sft_weight}",
        f"- pairs: {len(run.train.pairs)}, {run.total_steps} optimizer steps of {config.pairs_per_step} pairs",
        f"- optimizer: {config.optimizer}, learning rate {config.learning_rate}, {config.schedule}, seed {config.seed}",
        f"- precision: {config.dtype}; {'LoRA' if config.lora else 'all weights'} trained",
        *["", "All settings are in `train_config.yaml`.", "", "```", command_line(), "```", ""],
        *_last_evaluations(rows),
        "Rewards are β (log π − log π_ref) in nats; log-probabilities are sums over the completion's tokens.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
    ]
    return "\n".join(lines) + "\n"


def _last_evaluations(rows: list[dict[str, Any]]) -> list[str]:
    last = {row["split"]: row for row in rows if row["split"] != "summary"}
    table = ["| set | step | loss | accuracy | margin | logps chosen | logps rejected |", "|---" * 7 + "|"]
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    for split, row in last.items():
        numbers = " | ".join(f"{row['metrics'][name]:.4g}" for name in names)
        table.append(f"| {split} | {row['step']} | {numbers} |")
    return [*table, ""]
