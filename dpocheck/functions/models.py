"""What does a hand-written function expect a model's call to return: transformers' record, a tensor, or a tuple?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpocheck.functions.source_facts import Facts

OUTPUT_FIELDS = {"logits", "last_hidden_state", "hidden_states"}


def expected(facts: Facts) -> str:
    """record, tuple or tensor, as the source treats it; record where the source does not tell."""
    if not facts.known or facts.fields & OUTPUT_FIELDS or "logits" in facts.strings:
        return "record"
    if facts.unpacks:
        return "tuple"
    return "tensor" if facts.calls & {"model", "policy", "ref_model", "reference", "policy_model", "lm"} else "record"


def outside(error: Exception) -> bool:
    """Was a label of -100 used as an index?  So says a function that does not know ignored labels."""
    return "-100" in str(error) or "out of bounds" in str(error) or "out of range" in str(error)


@contextmanager
def speaking(kind: str, *models: Any) -> Iterator[None]:
    """For the time of a call, models answer as `kind` says."""
    handles = []
    if kind != "record":

        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output.logits, None) if kind == "tuple" else output.logits

        handles = [model.register_forward_hook(hook) for model in models if model is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
