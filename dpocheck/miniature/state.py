"""What has to be kept so that an interrupted run goes on as if nothing had happened?  Parts: checkpoint, resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Progress:
    """Three clocks that a resumed run has to set right: steps done, windows consumed, steps of the schedule."""

    step: int = 0
    data: int = 0
    schedule: int = 0

    def next(self) -> Progress:
        return Progress(self.step + 1, self.data + 1, self.schedule + 1)


def checkpoint(folder: Path, policy: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """The model as transformers saves it, and all that a bit-exact continuation needs; whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial)
    tensors = {f"parameter.{name}": p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items() if isinstance(t, torch.Tensor)}
    tensors["rng"] = torch.get_rng_state()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "training.safetensors")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def resume(folder: Path, policy: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts back what `checkpoint` wrote."""
    if not (folder / "progress.json").exists():
        raise FileNotFoundError(f"no checkpoint at {folder}: resume_from names a step that an earlier run saved")
    tensors = load_file(folder / "training.safetensors")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"parameter.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng"])
    return Progress(**json.loads((folder / "progress.json").read_text()))
