"""Which small tokenizers do the data tests read with? Built in memory, with every habit that real ones have."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The turn ends without any special token.
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# A default system prompt where none is given, and BOS from the template.
DEFAULT_SYSTEM = "<s>{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
# The generation prompt opens a thought that the finished conversation does not have.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The first message is rendered otherwise once a reply follows.
REWRITING = "{% if messages[-1].role == 'assistant' %}done {% else %}open {% endif %}" + CHATML


def byte_bpe(
    merges: Iterable[tuple[str, str]] = (), *, bos: bool = False, eos: str | None = "</s>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly these merges (as ByteLevel writes bytes: "Ġ" is a space). It decodes every text."""
    merges = list(merges)
    tokens = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *ALPHABET, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _wrap(inner, bos, eos, template)


def trained_bpe(texts: Iterable[str], size: int, *, bos: bool = False, eos: str = "</s>", template: str | None = None):
    """Byte-level BPE trained on `texts`, as GPT-2's is."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=ALPHABET, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return _wrap(inner, bos, eos, template)


def word_level(
    words: str, *, bos: bool = False, eos: str | None = "</s>", unk: bool = True, template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token for each word with the space before it. The first word has the id 0: a real word, no padding."""
    tokens = [word if i == 0 else " " + word for i, word in enumerate(words.split())]
    tokens += ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *(["<unk>"] if unk else [])]
    vocab = {t: i for i, t in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>") if unk else models.WordLevel(vocab))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+| "), "isolated")
    inner.decoder = decoders.Fuse()
    return _wrap(inner, bos, eos, template)


def _wrap(inner: Tokenizer, bos: bool, eos: str | None, template: str | None) -> PreTrainedTokenizerFast:
    names = {"eos_token": eos} if eos is not None else {}
    names |= {"bos_token": "<s>"} if bos else {}
    # Padding with EOS, as people do whose tokenizer has no padding token.
    names |= {"pad_token": eos if eos is not None else "<pad>"}
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **names
    )
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """The text of ids, special tokens written out."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
