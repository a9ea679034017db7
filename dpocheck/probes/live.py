"""How do the checkpoint folders of a probe become live models?  The only place that imports torch and transformers.

It runs in the trainer's own environment, from transformers 4.38 on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.adapter import Probe
from dpocheck.experiment import Body, Table
from dpocheck.probes import tables

PRISTINE: dict[tuple[str, str], Any] = {}  # (config.json, dtype) -> a model as transformers loads it, never handed out


def probe(
    policy: Path, reference: Path | None, *, dtype: str, edit: Table | None = None, watch: Any = None
) -> Probe:
    """A `Probe` over checkpoint folders.  `edit`: the table the policy is changed to in memory after loading.

    Every call loads anew, as `from_pretrained` does: who asks twice for the policy, to keep one as the reference, has
    two models.  `watch(name, model)` sees each model that is handed out (the spies).
    """

    def load(what: str) -> Any:
        if what == "tokenizer":
            return _tokenizer(policy)
        model = _model(policy if what == "policy" else reference, dtype)
        if what == "policy" and edit is not None:
            _edit(model, edit, dtype)
        if watch:
            watch(what, model)
        return model

    return Probe(policy, reference, policy, load)


def _model(path: Path, dtype: str) -> Any:
    import copy

    import torch
    import transformers
    from safetensors.torch import load_file

    # Loading costs most of a probe's time, and probes differ in their weights alone: one is loaded the ordinary way
    # for each configuration, the others are copies of it with their own weights and their own name.
    pristine = PRISTINE.get(key := ((path / "config.json").read_text(encoding="utf-8"), dtype))
    if pristine is None:
        release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        name = "dtype" if release >= (4, 56) else "torch_dtype"
        asked = {name: getattr(torch, dtype)}
        PRISTINE[key] = pristine = transformers.AutoModelForCausalLM.from_pretrained(str(path), **asked)
    model = copy.deepcopy(pristine)
    model.load_state_dict(load_file(path / "model.safetensors"))
    model.name_or_path = model.config._name_or_path = str(path)
    return model


def _tokenizer(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(path))


def _edit(model: Any, table: Table, dtype: str) -> None:
    import torch

    head = tables.weights(table, table.size, Body(), dtype)[tables.HEAD]
    with torch.no_grad():
        model.lm_head.weight[:, : head.shape[1]].copy_(torch.from_numpy(head))


def state(model: Any) -> dict[str, np.ndarray]:
    """The parameters of a live model by name, as numpy; an adapter is merged into its base."""
    import torch

    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    model = getattr(model, "module", model)
    found = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu")
        found[name] = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()
    return found
