"""How does a checkpoint become a model that everybody loads?  One process puts its parts together, file by file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from reference_impl import models
from reference_impl.checkpoint import TRAINER, CheckpointError
from reference_impl.config import ConfigError
from reference_impl.files import MANIFEST, DamagedError, DiskError, check_folder, whole_folder
from reference_impl.processes import ALONE, OtherProcessError
from reference_impl.reading import names_are_own
from reference_impl.shards import load_tensors, save_files, stored_tensors
from reference_impl.weights import PARTS


def export(checkpoint: Path, folder: Path) -> None:
    """Writes a checkpoint's model or adapter into a new folder, as from_pretrained loads it; whole or not at all.

    A model whose files have other names or shapes than its weights is in memory whole, of any other one file at a time.

    Raises:
        ConfigError: the folder is there, or the first one is no checkpoint.
        CheckpointError: the checkpoint is damaged.  DiskError: the folder cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already: give the name of a new folder")
    facts = _facts(checkpoint)
    try:
        with whole_folder(folder, {"checkpoint": str(checkpoint), "step": facts["step"]}) as writing:
            for file in checkpoint.iterdir():
                if file.is_file() and file.name != MANIFEST:
                    shutil.copyfile(file, writing / file.name)
            if (checkpoint / PARTS).is_dir():
                _put_together(checkpoint, facts["config"]["dtype"], writing)
    except OSError as error:
        raise DiskError(folder, error) from error
    except (SafetensorError, OtherProcessError) as error:
        raise CheckpointError(f"{folder} could not be written from {checkpoint}: {error}") from error


def _facts(checkpoint: Path) -> dict[str, Any]:
    """The facts of a whole checkpoint."""
    if not (checkpoint / MANIFEST).is_file() or not (checkpoint / TRAINER).is_dir():
        raise ConfigError(f"{checkpoint} is no checkpoint of a run: give a folder named checkpoint-…")
    try:
        return check_folder(checkpoint)
    except DamagedError as error:
        raise CheckpointError(f"the checkpoint is damaged: {error}") from error


def _put_together(checkpoint: Path, dtype: str, folder: Path) -> None:
    parts, skeleton = checkpoint / PARTS, models.load_skeleton(str(checkpoint), dtype)
    stored = stored_tensors(parts)

    def whole(names: list[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty_like(stored[name], device="cpu") for name in names}
        load_tensors(tensors, parts, ALONE)
        return tensors

    if names_are_own(skeleton):
        save_files(stored, whole, folder, ALONE)
        return
    skeleton.save_pretrained(folder, state_dict=whole(list(stored)))
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
