"""Tokenizers as users have them: byte-level BPE trained on a few sentences, plain, ChatML-like and Llama-2-like."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "What is 2 + 2? It is 4. It is five, I think. Answer briefly.",
    "It was unbelievable, he said; uncommon, she said. Hello there, hi.",
    "The naïve café costs €5 — très bien.\n\nFirst line. Second line:\n  indented",
    "Q: one or two? A: one. Sure? Yes. No. I would say so, I believe.",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('this template has no system messages') }}{% endif %}{% endfor %}"
)


def write(folder: Path, template: str | None = None, *, bos: str | None = None, eos: str = "</s>") -> Path:
    """Train a tokenizer and write it as `save_pretrained` does; with `bos`, it puts that before every text."""
    special = [token for token in (eos, "<pad>", bos, "<|im_start|>" if template == CHATML else None) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", bos_token=bos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def chatml(folder: Path) -> Path:
    return write(folder, CHATML, eos="<|im_end|>")


def llama2(folder: Path) -> Path:
    return write(folder, LLAMA2, bos="<s>")
