"""What do the trainer's tests train?  Tiny models, token pairs, a word tokenizer and text rows, all from a seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from reference_impl.data import TokenPair

VOCABULARY = 32
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *[f"w{i}" for i in range(VOCABULARY - 4)]]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.LlamaForCausalLM:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 1}
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).to(dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> transformers.GPT2LMHeadModel:
    """Every operation in the model's own dtype: float64 relations hold to float64's rounding (Llama's norms do not)."""
    settings = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 2, "bos_token_id": 1}
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **changes})).to(dtype)


def pairs(count: int, seed: int = 0, longest: int = 5) -> list[TokenPair]:
    """Ragged pairs; the rows' numbers are not their places."""
    draw = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest)))

    return [TokenPair(3 * index + 1, tokens(), tokens(), tokens()) for index in range(count)]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Text rows with a rule to learn: a chosen completion begins with w0, a rejected one with w1."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(WORDS[6:]) for _ in range(draw.randint(1, 4)))

    return [{"prompt": text(), "chosen": f" w0 {text()}", "rejected": f" w1 {text()}"} for _ in range(count)]


def tokenizer(**changes: Any) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = changes.pop("words", WORDS)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | changes
    special = {name: token for name, token in special.items() if token is not None}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def save(folder: Path, model: torch.nn.Module | None = None, words: Any = None) -> str:
    """A checkpoint folder with model and tokenizer."""
    (model or llama()).save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return str(folder)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def numbers(history: list[dict[str, Any]]) -> list[Any]:
    """A history without what a clock put into it."""
    clocks = ("tokens/s", "pairs/s", "seconds")
    return [(r["step"], r["split"], {k: v for k, v in r["metrics"].items() if k not in clocks}) for r in history]
