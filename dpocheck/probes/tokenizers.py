"""How does a tokenizer that is data become the files that transformers reads?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpocheck.experiment import Template, Tokenizer


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names["pad_token"] = "</s>" if tokenizer.pad_is_eos else "<pad>"
    config: dict[str, Any] = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if tokenizer.template:
        config["chat_template"] = jinja(tokenizer.template)
    for name, content in (
        ("tokenizer.json", fast(tokenizer)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def fast(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json.  Ids between the words and the special tokens get names that no text contains."""
    vocabulary = {tokenizer.word(token): token for token in range(tokenizer.size)}
    special = [
        {"id": tokenizer.size - 4 + i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, word in enumerate(Tokenizer.special)
    ]  # fmt: skip
    if tokenizer.kind == "words":
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        splitter, decoder = {"type": "WhitespaceSplit"}, None
    else:
        # As one text where that is clear: tokenizers before 0.20 read no other form.
        merge = tokenizer.merge or ()
        merges = [] if not merge else [list(merge) if " " in "".join(merge) else " ".join(merge)]
        model = {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
            "merges": merges,
        }  # fmt: skip
        splitter, decoder = None, {"type": "Fuse"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": splitter, "post_processor": _bos(tokenizer), "decoder": decoder, "model": model,
    }  # fmt: skip


def _bos(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not tokenizer.adds_bos:
        return None
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [tokenizer.bos], "tokens": ["<s>"]}},
    }


def jinja(template: Template) -> str:
    """The chat template in Jinja, as transformers renders it."""
    ends = {"user": template.user, "assistant": template.assistant, "system": template.system}
    branches = []
    for word, (role, (before, after)) in zip(("if", "elif", "elif"), ends.items(), strict=True):
        closing = " + eos_token" if role == "assistant" and template.eos else ""
        branches.append(
            f"{{% {word} m['role'] == '{role}' %}}{{{{ {before!r} + m['content'] + {after!r}{closing} }}}}"
        )
    prompt = f"{{% if add_generation_prompt %}}{{{{ {template.generation_prompt!r} }}}}{{% endif %}}"
    return "{% for m in messages %}" + "".join(branches) + "{% endif %}{% endfor %}" + prompt


def alphabet(size: int) -> tuple[str, ...]:
    """`size` - 4 short words, one token each: a, b, ..., z, then aa, ab, ..."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(first + second for first in letters for second in letters)]
    return tuple(names[: size - 4])


def plain_words(size: int) -> Tokenizer:
    """The tokenizer of experiments that are given in token ids."""
    return Tokenizer(alphabet(size), size)
