"""A DPO trainer to train with, and to read: begin with dpo.py.

`train` is the function.  Names are imported when first used, so that `import reference_impl` is quick.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "train": "training",
    "TrainResult": "training",
    "TrainConfig": "config",
    "LoraSettings": "config",
    "load_config": "config",
    "load_pairs": "data",
    "TokenPair": "data",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reference_impl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"reference_impl.{_HOMES[name]}"), name)
