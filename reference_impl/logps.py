"""How are pairs of token rows turned into log π(y|x)?  One way in, `pair_logps`; the ways to compute stand behind it.

Only positions that predict a completion token are projected onto the vocabulary, and those in chunks whose logits are
recomputed in the backward pass: the (row, token, vocabulary) tensor of a plain forward never exists.  The result is
that of the plain forward (`full`), which stays here as the path for architectures whose head is not known.

Rows are padded on the right with a masked token; `is_completion` alone decides what is scored, so the padding token may
be the end-of-sequence token, and a token may have the id 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference_impl import dpo

if TYPE_CHECKING:
    from reference_impl.data import TokenPair

Path = str | Callable[[nn.Module, "RowBatch"], Tensor]

LOGITS_AT_ONCE = 2**24
"""Greatest number of logits held at a time by the chunked path: 64 MiB in float32."""

# Architectures whose logits are `lm_head(backbone(x).last_hidden_state)` and nothing more.  Read in their forward
# functions; one that is not listed takes the full path, which is right for every model and only needs more memory.
# fmt: off
PLAIN_HEADS = frozenset([
    "arcee", "ernie4_5", "exaone4", "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gptj", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon",
    "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
])
# fmt: on
# ... followed by one elementwise rule, whose number is in the config under this name.
CAPPED_HEADS = {"gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}
DIVIDED_HEADS = {"granite": "logits_scaling"}
MULTIPLIED_HEADS = {"cohere": "logit_scale", "cohere2": "logit_scale"}
KNOWN_HEADS = PLAIN_HEADS | CAPPED_HEADS.keys() | DIVIDED_HEADS.keys() | MULTIPLIED_HEADS.keys()


@dataclass(frozen=True)
class RowBatch:
    """Token rows padded on the right; all (row, token) but `is_completion`, (row, token − 1).

    is_completion[r, t] says that token t + 1 of row r is scored; the logits at position t predict it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_completion: Tensor


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, device: torch.device) -> RowBatch:
    """Pads (prompt, completion) rows to the longest.

    Raises:
        ValueError: a row without a prompt token (nothing would predict its first completion token) or without a
            completion token.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    is_completion = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for index, (prompt, completion) in enumerate(rows):
        if not prompt or not completion:
            raise ValueError(
                f"row {index} of the batch has {len(prompt)} prompt and {len(completion)} completion tokens, but each "
                "needs at least one: drop the row, or begin the prompt with a beginning-of-sequence token"
            )
        length = len(prompt) + len(completion)
        input_ids[index, :length] = torch.tensor([*prompt, *completion])
        attention_mask[index, :length] = 1
        is_completion[index, len(prompt) - 1 : length - 1] = True
    return RowBatch(input_ids.to(device), attention_mask.to(device), is_completion.to(device))


def pair_logps(
    model: nn.Module, pairs: Sequence[TokenPair], *, pad_id: int, path: Path = "auto"
) -> tuple[Tensor, Tensor]:
    """log π(y_w|x) and log π(y_l|x) of each pair: sums over the completions' tokens, in nats.

    Args:
        model: a causal LM of transformers, or of peft around one.
        pairs: token rows; each needs a prompt token and a token in both completions.
        pad_id: any id below the vocabulary's size; masked wherever it is used as padding.
        path: 'auto' (see `choose_path`), a name of PATHS, or a function like those.
    Returns:
        chosen (pair,) and rejected (pair,); float64 for a float64 model, float32 for all others.
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    batch = collate(rows, pad_id, next(model.parameters()).device)
    name = choose_path(model)[0] if path == "auto" else path
    logps = (PATHS[name] if isinstance(name, str) else name)(model, batch)
    return logps[: len(pairs)], logps[len(pairs) :]


def chunked_row_logps(model: nn.Module, batch: RowBatch, chunk: int | None = None) -> Tensor:
    """log π(y|x) of each row (row,), the head applied to `chunk` completion positions at a time."""
    base = unwrapped(model)
    backbone, head = getattr(base, base.base_model_prefix), base.get_output_embeddings()
    hidden = backbone(**_inputs(backbone, batch)).last_hidden_state[:, :-1][batch.is_completion]
    targets = batch.input_ids[:, 1:][batch.is_completion]
    rule = head_rule(base)
    size = chunk or max(1, LOGITS_AT_ONCE // base.config.get_text_config().vocab_size)

    def head_logps(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        # The head is called as a module: an adapter on it, a trained copy of it or a bias then counts.
        return dpo.token_logps(rule(head(hidden_chunk)), target_chunk)

    parts = []
    for part, part_targets in zip(hidden.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(head_logps, part, part_targets, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(head_logps(part, part_targets))
    return _sum_rows(torch.cat(parts), batch.is_completion)


def full_row_logps(model: nn.Module, batch: RowBatch) -> Tensor:
    """log π(y|x) of each row (row,) from the model's own forward, all logits at once."""
    logits = model(**_inputs(unwrapped(model), batch)).logits[:, :-1][batch.is_completion]
    targets = batch.input_ids[:, 1:][batch.is_completion]
    return _sum_rows(dpo.token_logps(logits, targets), batch.is_completion)


PATHS: dict[str, Callable[[nn.Module, RowBatch], Tensor]] = {"chunked": chunked_row_logps, "full": full_row_logps}


def choose_path(model: nn.Module) -> tuple[str, str]:
    """The name of the path for this model, and the reason in words."""
    base = unwrapped(model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if not type(base).__module__.startswith("transformers."):
        return "full", f"{type(base).__name__} is not a class of transformers, its head is not known"
    if "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks:
        return "full", "the model's forward is replaced or hooked, and must run"
    if kind not in KNOWN_HEADS:
        return "full", f"the head of {kind!r} is not known"
    return "chunked", f"{kind!r} has a head that is known"


def head_rule(base: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the logits after its head, elementwise."""
    config = base.config.get_text_config()
    kind = base.config.model_type
    if kind in CAPPED_HEADS and (cap := getattr(config, CAPPED_HEADS[kind], None)) is not None:
        return lambda logits: torch.tanh(logits / cap) * cap
    if kind in DIVIDED_HEADS:
        return lambda logits: logits / getattr(config, DIVIDED_HEADS[kind])
    if kind in MULTIPLIED_HEADS:
        return lambda logits: logits * getattr(config, MULTIPLIED_HEADS[kind])
    return lambda logits: logits


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal LM of transformers inside a peft model; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _inputs(module: nn.Module, batch: RowBatch) -> dict[str, Tensor | bool]:
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    accepted = inspect.signature(module.forward).parameters
    if "position_ids" in accepted:
        row, token = batch.input_ids.shape
        inputs["position_ids"] = torch.arange(token, device=batch.input_ids.device).expand(row, token)
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs


def _sum_rows(logps: Tensor, is_completion: Tensor) -> Tensor:
    # Back into the grid before summing: a scatter without repeated targets is the same from run to run on a GPU too.
    grid = torch.zeros(is_completion.shape, dtype=logps.dtype, device=logps.device)
    return dpo.sequence_logp(grid.masked_scatter(is_completion, logps), is_completion)
