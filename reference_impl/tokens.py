"""Which tokens are the prompt, and which are scored, so that prompt + completion is the tokenised text?

Prompt and completion are tokenised together, as the model will see them. A token across the boundary belongs to the
completion, on both sides: the prompt is what the tokenised prompt and both tokenised texts share at the start.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reference_impl.datareport import RowNote
from reference_impl.rows import TextPair, common_prefix_length, dropped, excerpt
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
    """One pair before truncation.

    `merged`: a token spanned the end of the prompt. `lossy`: "", or how the tokens decode to another text ("spacing",
    "text"). `bos_added`: the prompt had no token. `eos_added`: a side did not end with EOS by itself. `unanswered`
    and `repeats_prompt`: see TextPair.
    """

    row: int
    place: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    merged: bool
    lossy: str
    bos_added: bool
    eos_added: bool
    unanswered: str
    repeats_prompt: bool


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Special tokens of a transformers tokenizer. Raises DataError without EOS: no completion could then end."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise DataError(f"the tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            "the tokenizer has no EOS token, so no completion could end; set tokenizer.eos_token to the token that the "
            "model ends with"
        )
    return SpecialTokens(_prefix(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def _prefix(tokenizer: Any) -> Ids:
    """What stands before a text when the tokenizer adds its special tokens, found by trying a text that it knows."""
    special = set(tokenizer.all_special_ids)
    known = (i for i in range(len(tokenizer)) if i not in special)
    for text in ("a", *(tokenizer.decode([i]) for i, _ in zip(known, range(20), strict=False))):
        try:
            plain, full = _call(tokenizer, [text], False)[0], _call(tokenizer, [text], True)[0]
        except Exception:  # a word outside a vocabulary without unknown token: try the next
            continue
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
        if plain and at is not None:
            return tuple(full[:at])
    raise DataError("the tokenizer tokenises none of its own first words; is its vocabulary complete?")


def _call(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False,
        padding=False, truncation=False, verbose=False,
    )["input_ids"]  # fmt: skip


def _encode(pairs: Sequence[TextPair], tokenizer: Any) -> list[list[int]]:
    """Ids of prompt, chosen text and rejected text of each pair in turn, without added special tokens."""
    try:
        return _call(tokenizer, [t for p in pairs for t in (p.prompt, p.chosen, p.rejected)], False)
    except Exception:
        for pair in pairs:  # find the text that it was
            for text in (pair.prompt, pair.chosen, pair.rejected):
                try:
                    _call(tokenizer, [text], False)
                except Exception as error:
                    raise DataError(f"{pair.place}: the tokenizer cannot tokenise {excerpt(text)}: {error}") from error
        raise


def tokenise(
    pairs: Sequence[TextPair], tokenizer: Any, special: SpecialTokens, *, add_prefix: bool
) -> list[TokenisedPair | RowNote]:
    """Tokenise a batch. `add_prefix` is false for chats, where the template writes BOS, or leaves it out, itself."""
    ids = _encode(pairs, tokenizer)
    whole = [side for i in range(len(pairs)) for side in ids[3 * i + 1 : 3 * i + 3]]
    back = tokenizer.batch_decode(whole, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    prefix = special.prefix if add_prefix else ()
    out = []
    for i, pair in enumerate(pairs):
        found = {loss(pair.chosen, back[2 * i]), loss(pair.rejected, back[2 * i + 1])}
        lossy = "text" if "text" in found else max(found)
        out.append(_split(pair, *ids[3 * i : 3 * i + 3], prefix, special, lossy, tokenizer.decode))
    return out


def loss(text: str, decoded: str) -> str:
    """What tokenising lost: "" nothing, "spacing" white space, "text" more than that."""
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
    if special.bos not in (None, special.eos):
        second = special.bos in chosen[shared:] or special.bos in rejected[shared:]
        if second or prompt[:2] == (special.bos, special.bos):
            return dropped(pair, "bos_inside", pair.chosen)
    ends = [end_once(side[shared:], special.eos, decode) for side in (chosen, rejected)]
    if None in ends:
        side = pair.chosen if ends[0] is None else pair.rejected
        return dropped(pair, "eos_inside", side[len(pair.prompt) :])
    if ends[0] == ends[1]:
        return dropped(pair, "identical_tokens", pair.chosen[len(pair.prompt) :])
    eos_added = special.eos not in chosen[shared:] or special.eos not in rejected[shared:]
    return TokenisedPair(
        pair.row, pair.place, prompt, ends[0], ends[1], merged=shared < len(alone), lossy=lossy, bos_added=bos_added,
        eos_added=eos_added, unanswered=pair.unanswered, repeats_prompt=pair.repeats_prompt,
    )  # fmt: skip


def end_once(ids: list[int], eos: int, decode: Callable[[list[int]], str]) -> Ids | None:
    """The completion with EOS exactly once, where its text ends; None where text follows an EOS.

    White space after EOS stays: chat templates write a line break after a turn, and the tokens are those of the text.
    """
    if eos not in ids:
        return (*ids, eos)
    first = ids.index(eos)
    after = [t for t in ids[first + 1 :] if t != eos]
    if after and decode(after).strip():
        return None
    return (*ids[: first + 1], *after)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of what decides how a text becomes ids: vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        body: Any = sorted(tokenizer.get_vocab().items())
    else:
        body = json.loads(backend.to_str())
        body["truncation"] = body["padding"] = None  # left by the last call, no part of the tokenizer
    specials = {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}
    whole = [type(tokenizer).__name__, body, specials, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
