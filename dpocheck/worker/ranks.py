"""What is different for a trainer that runs as one of several processes?  Worker side.

The processes are started with torchrun's variables in their environment; the port is new for each run, so that a
trainer that leaves its group at the end of one can join another.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def enter(payload: dict[str, Any]) -> None:
    """Before a run: tell the trainer, as torchrun would, where its ranks meet."""
    if "port" in payload:
        os.environ["MASTER_PORT"] = str(payload["port"])


def is_silent(out: Any, payload: dict[str, Any]) -> bool:
    """Whether a rank other than the first shows no weights of its own, which only the first has to."""
    return payload.get("rank", 0) > 0 and getattr(out, "policy", None) is None


def in_group() -> bool:
    """Whether the trainer is still in a process group.  Its processes are then not used again, unless the adapter says
    `keeps_group`: a group cannot be left for the trainer, because what is left of its model may still hold it."""
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())
