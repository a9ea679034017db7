"""What does a hand-written function expect a model's call to return: transformers' record, a tensor, or a tuple?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpocheck.functions.source_facts import Facts

MASK_NAMES = ("attn_mask", "mask", "padding_mask", "pad_mask")
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


def _renamed(module: Any, args: Any, named: dict[str, Any]) -> Any:
    """A mask by the names that hand-written models give it: transformers would take it in silence and use none."""
    spelled = next((name for name in MASK_NAMES if name in named), None)
    if spelled is None or "attention_mask" in named:
        return None
    return args, {("attention_mask" if name == spelled else name): value for name, value in named.items()}


@contextmanager
def speaking(facts: Facts, *models: Any, pad: int | None = None) -> Iterator[None]:
    """For the time of a call, models answer as the function expects, and say how long a row may be."""
    kind = expected(facts)
    handles = [m.register_forward_pre_hook(_renamed, with_kwargs=True) for m in models if m is not None]
    said = [(m, name) for m in models if m is not None for name in facts.habits.lengths if not hasattr(m, name)]
    for model, name in said:
        setattr(model, name, getattr(model.config, "max_position_embeddings", 1 << 20))
    kept = [(m.config, m.config.pad_token_id) for m in models if pad is not None and hasattr(m, "config")]
    for config, _ in kept:
        config.pad_token_id = pad
    if kind != "record":

        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output.logits, None) if kind == "tuple" else output.logits

        handles += [model.register_forward_hook(hook) for model in models if model is not None]
    try:
        yield
    finally:
        for model, name in said:
            delattr(model, name)
        for config, before in kept:
            config.pad_token_id = before
        for handle in handles:
            handle.remove()
