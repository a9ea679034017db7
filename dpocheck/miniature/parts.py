"""What does one part ask of the trainer that it stands in?  The other parts, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Parts(Protocol):
    """`trainer.Miniature`, as its parts see it: each is a plain function, described where it is defined."""

    collate: Callable[..., Any]
    forward: Callable[..., Any]
    logps: Callable[..., Any]
    reduce: Callable[..., Any]
    gather: Callable[..., Any]
    metrics: Callable[..., Any]
