"""Which tokens are the prompt, and which are scored, so that prompt + completion is the tokenised text?

Prompt and completion are tokenised together, as the model will see them. A token that spans the boundary belongs to the
completion, on both sides of the pair: the prompt is what the tokenised prompt and both tokenised texts share at the start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reference_impl.datareport import RowNote
from reference_impl.rows import TextPair, common_prefix_length, dropped
from reference_impl.sources import DataError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class SpecialTokens:
    """What the tokenizer adds by itself. `prefix` stands before every plain text; `bos` is None where there is none."""

    prefix: Ids
    bos: int | None
    eos: int


@dataclass(frozen=True)
class TokenisedPair:
    """One pair before truncation. `merged`: a token spanned the boundary; `lossy`: "", "spacing" or "text"."""

    row: int
    place: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    merged: bool
    lossy: str
    bos_added: bool
    eos_added: bool


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Special tokens of a transformers tokenizer. Raises DataError without EOS: nothing could then end a completion."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise DataError(f"the tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            f"the tokenizer has no EOS token (eos_token = {tokenizer.eos_token!r}), so no completion could end; "
            "set tokenizer.eos_token to the token that the model ends with"
        )
    plain, full = encode(tokenizer, ["a"], False)[0], encode(tokenizer, ["a"], True)[0]
    at = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), None)
    if at is None or not plain:
        raise DataError(f"the tokenizer gives {plain} for 'a' without and {full} with special tokens: the first is not part of the second")
    return SpecialTokens(tuple(full[:at]), tokenizer.bos_token_id, tokenizer.eos_token_id)


def encode(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text, never truncated or padded."""
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False,
        padding=False, truncation=False, verbose=False,
    )["input_ids"]  # fmt: skip


def tokenise(
    pairs: Sequence[TextPair], tokenizer: Any, special: SpecialTokens, *, add_prefix: bool
) -> list[TokenisedPair | RowNote]:
    """Tokenise a batch. `add_prefix` is false for chats, where the template writes BOS itself."""
    texts = [t for p in pairs for t in (p.prompt, p.chosen, p.rejected)]
    ids = encode(tokenizer, texts)
    whole = [side for i in range(len(pairs)) for side in ids[3 * i + 1 : 3 * i + 3]]
    back = tokenizer.batch_decode(whole, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    prefix = special.prefix if add_prefix else ()
    out = []
    for i, pair in enumerate(pairs):
        lossy = max(loss(pair.chosen, back[2 * i]), loss(pair.rejected, back[2 * i + 1]))
        out.append(_split(pair, *ids[3 * i : 3 * i + 3], prefix, special, lossy, tokenizer.decode))
    return out


def loss(text: str, decoded: str) -> str:
    """What tokenising lost: "" nothing, "spacing" only white space, "text" more than that."""
    # SentencePiece drops or adds one space at the start; it is the same text.
    if decoded == text or decoded.removeprefix(" ") == text.removeprefix(" "):
        return ""
    return "spacing" if "".join(decoded.split()) == "".join(text.split()) else "text"


def _split(
    pair: TextPair, alone: list[int], chosen: list[int], rejected: list[int], prefix: Ids, special: SpecialTokens,
    lossy: str, decode: Callable[[list[int]], str],
) -> TokenisedPair | RowNote:  # fmt: skip
    shared = min(common_prefix_length(alone, chosen), common_prefix_length(alone, rejected))
    prompt = tuple(alone[:shared])
    if prompt[: len(prefix)] != prefix:  # a text that already starts with BOS does not get a second one
        prompt = prefix + prompt
    bos_added = not prompt and special.bos is not None
    if bos_added:
        prompt = (special.bos,)
    if not prompt:
        return dropped(pair, "unscorable", pair.chosen)
    sides, added = [], False
    for side in (chosen[shared:], rejected[shared:]):
        if special.bos not in (None, special.eos) and (special.bos in side or prompt[:2] == (special.bos,) * 2):
            return dropped(pair, "bos_inside", pair.chosen)
        ended = end_once(side, special.eos, decode)
        if ended is None:
            return dropped(pair, "eos_inside", decode(side))
        added |= len(ended) > len(side)
        sides.append(tuple(ended))
    if sides[0] == sides[1]:
        return dropped(pair, "identical_tokens", pair.chosen[len(pair.prompt) :])
    merged = shared < len(alone)
    return TokenisedPair(pair.row, pair.place, prompt, sides[0], sides[1], merged, lossy, bos_added, added)


def end_once(ids: list[int], eos: int, decode: Callable[[list[int]], str]) -> list[int] | None:
    """The completion with exactly one EOS where it ends, or None where text follows an EOS.

    White space after EOS is kept: chat templates write a line break after the turn, and the text is what they write.
    """
    if eos not in ids:
        return [*ids, eos]
    first = ids.index(eos)
    after = [t for t in ids[first + 1 :] if t != eos]
    if after and decode(after).strip():
        return None
    return [*ids[: first + 1], *after]
