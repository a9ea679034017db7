"""Tiny models, tokenizers and probes for the tests of the miniature and the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpocheck.adapter import PairBatch, Probe

WORDS = tuple(f"w{i}" for i in range(60))
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '<unk> ' }}{{ m['content'] }}"
    "{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}<unk> {% endif %}"
)


def tokenizer(bos: bool = False, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """One word one token; the chat template ends a reply with EOS itself."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS + SPECIAL)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 61)])
    pad = "</s>" if pad_is_eos else "<pad>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, dropout: float = 0.0, scale: float = 0.3, layers: int = 1, vocabulary: int = 64) -> Any:
    """A random Llama, larger weights than the usual initialisation so that log-probs differ visibly."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, attention_dropout=dropout, tie_word_embeddings=False,
        pad_token_id=63, bos_token_id=61, eos_token_id=62,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        made = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.float()


def probe(
    folder: Path, policy: Any = None, reference: Any | None = "other", tokens: Any = None, edit: Any = None
) -> Probe:
    """Checkpoint folders and a loader, as the probes make them; `edit` changes the policy after it is loaded."""
    policy = policy if policy is not None else model(1)
    reference = model(2) if reference == "other" else reference
    for name, what in (("policy", policy), ("reference", reference), ("tokenizer", tokens or tokenizer())):
        if what is not None:
            what.save_pretrained(folder / name)

    def load(name: str) -> Any:
        if name == "tokenizer":
            return AutoTokenizer.from_pretrained(folder / name)
        with torch.random.fork_rng(devices=[]):
            loaded = LlamaForCausalLM.from_pretrained(folder / name)
        if name == "policy" and edit is not None:
            with torch.no_grad():
                edit(loaded)
        return loaded

    return Probe(folder / "policy", None if reference is None else folder / "reference", folder / "tokenizer", load)


ROWS = [
    {"prompt": "w1 w2 ", "chosen": "w3 w4 w5", "rejected": "w6 w7"},
    {"prompt": "w8 w9 w10 ", "chosen": "w11 w0", "rejected": "w13 w14 w15 w16"},
    {"prompt": "w17 ", "chosen": "w18 w19 w20 w21", "rejected": "w22"},
    {"prompt": "w23 w24 ", "chosen": "w25", "rejected": "w26 w27 w28"},
    {"prompt": "w29 w30 w31 w32 ", "chosen": "w33 w34", "rejected": "w0 w36 w37"},
    {"prompt": "w38 ", "chosen": "w39 w40 w41", "rejected": "w42 w43 w44 w45 w46"},
    {"prompt": "w47 w48 ", "chosen": "w49 w50", "rejected": "w51 w52"},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"].strip()}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in ROWS
]


def pair_batch(side: str = "right") -> PairBatch:
    """Three ragged pairs; token id 0 is among the completion's tokens."""
    rows = [
        ([1, 2], [3, 0, 5, 62]), ([8, 9, 10], [11, 62]), ([17], [18, 19, 62]),
        ([1, 2], [6, 62]), ([8, 9, 10], [13, 14, 15, 62]), ([17], [22, 0, 62]),
    ]  # fmt: skip
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + 1

    def padded(values: list[int], rest: int) -> list[int]:
        fill = [rest] * (width - len(values))
        return values + fill if side == "right" else fill + values

    return PairBatch(
        torch.tensor([padded(p + c, 63) for p, c in rows]),
        torch.tensor([padded([1] * len(p + c), 0) for p, c in rows]),
        torch.tensor([padded([0] * len(p) + [1] * len(c), 0) for p, c in rows]),
        pad_token_id=63,
    )
