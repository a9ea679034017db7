"""Which token rows should a trainer see for a dataset row?

From the tokenizer as data: text and chat rows, implicit prompts, EOS and BOS, the boundary between prompt and
completion, truncation.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from dpocheck.experiment import Message, Pair, Row, Template, Tokenizer, TrainExperiment
from dpocheck.oracle.counting import Side, Sides
from dpocheck.oracle.theory import PAPER, Theory

_SPECIAL = re.compile("(" + "|".join(re.escape(word) for word in Tokenizer.special) + ")")
EOS = Tokenizer.special[2]

Messages = tuple[Message, ...]


# ------------------------------------------------------------------------------------------------------------- text


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids without a BOS.  Special tokens are recognised wherever their text stands."""
    return list(_encode(text, tokenizer))


@lru_cache(maxsize=65536)
def _encode(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    known = _vocabulary(tokenizer)
    ids: list[int] = []
    for piece in _SPECIAL.split(text):
        if piece in Tokenizer.special:
            ids.append(known["</s>"] if piece == "</s>" else tokenizer.id(piece))
            continue
        items = piece.split() if tokenizer.kind == "words" else _merged(list(piece), tokenizer.merge)
        ids += [known.get(item, tokenizer.unk) for item in items]
    return tuple(ids)


@lru_cache(maxsize=256)
def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.word(token): token for token in range(tokenizer.size)}


def _merged(items: list[str], merge: tuple[str, str] | None) -> list[str]:
    """Byte-pair encoding with one merge: from the left, each occurrence of the pair becomes one item."""
    if merge is None:
        return items
    found: list[str] = []
    i = 0
    while i < len(items):
        if tuple(items[i : i + 2]) == merge:
            found.append("".join(merge))
            i += 2
        else:
            found.append(items[i])
            i += 1
    return found


def render(messages: Messages, template: Template) -> str:
    """A conversation as text, as the chat template writes it."""
    text = ""
    for message in messages:
        before, after = getattr(template, message.role)
        text += before + message.content + after
        if message.role == "assistant" and template.eos:
            text += EOS
    return text


# ---------------------------------------------------------------------------------------------------------- prompts


def common_prefix(*sequences: list | tuple | str) -> int:
    """How many leading items all sequences share."""
    count = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        count += 1
    return count


def with_prompt(row: Row, theory: Theory = PAPER) -> tuple:
    """(prompt, chosen, rejected); what both completions share is the prompt where the row has none."""
    if row.prompt is not None:
        return row.prompt, row.chosen, row.rejected
    if theory.prefix == "loses-shared":
        return _last_index(row)
    shared = common_prefix(row.chosen, row.rejected)
    if isinstance(row.chosen, str) and row.chosen[:shared].endswith(" "):
        shared -= 1  # the space goes with the word that follows it
    return row.chosen[:shared], row.chosen[shared:], row.rejected[shared:]


def _last_index(row: Row) -> tuple:
    """The index at which the loop over both stopped, taken for the length of what they share."""
    index = 0
    for index in range(min(len(row.chosen), len(row.rejected))):
        if row.chosen[index] != row.rejected[index]:
            if isinstance(row.chosen, str) and row.chosen[index - 1] == " ":  # index 0 looks at the last character
                index -= 1
            break
    return row.chosen[:index], row.chosen[index:], row.rejected[index:]


# ------------------------------------------------------------------------------------------------------------ rows


def sides(row: Row, tokenizer: Tokenizer, theory: Theory = PAPER) -> Sides:
    """The two token rows of a dataset row, before truncation."""
    prompt, chosen, rejected = with_prompt(_spaced(row, theory), theory)
    if isinstance(row.chosen, str):
        texts = prompt, _ended(chosen, theory), _ended(rejected, theory)
        return _split(*texts, tokenizer, theory, chat=False)
    template = tokenizer.template
    if template is None:
        raise ValueError("a chat row needs a tokenizer with a template; give Tokenizer(template=Template(...))")
    start = render(prompt, template)
    asked = start + template.generation_prompt
    whole = [_chat_ended(render(prompt + side, template), template, theory) for side in (chosen, rejected)]
    shared = common_prefix(asked, *whole)
    # What the template writes differently with and without a reply belongs to the reply.
    return _split(asked[:shared], whole[0][shared:], whole[1][shared:], tokenizer, theory, chat=True)


def _spaced(row: Row, theory: Theory) -> Row:
    """A text row with a prompt as `Theory.spaces` has it."""
    if theory.spaces == "kept" or row.prompt is None or not isinstance(row.chosen, str):
        return row
    stripped = replace(row, chosen=row.chosen.strip(), rejected=row.rejected.strip())
    return stripped if theory.spaces == "stripped" else replace(stripped, prompt=row.prompt.strip() + " ")


def _ended(text: str, theory: Theory) -> str:
    if theory.eos in ("none", "between", "after-prompt"):
        return text
    if theory.eos == "always":
        return text + EOS
    return (text if text.endswith(EOS) else text + EOS) + (EOS if theory.eos == "twice" else "")


def _chat_ended(text: str, template: Template, theory: Theory) -> str:
    missing = theory.template_eos == "ensured" and not text.endswith(EOS)
    return text + (EOS if missing or theory.template_eos == "twice" else "")


def _split(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer, theory: Theory, chat: bool) -> Sides:
    """Tokenise, and say where the completions start."""
    alone = encode(prompt, tokenizer)
    whole = [encode(prompt + text, tokenizer) for text in (chosen, rejected)]
    if theory.boundary == "apart":
        starts, completions = alone, [encode(text, tokenizer) for text in (chosen, rejected)]
    elif theory.boundary == "cut":
        starts, completions = alone, [ids[len(alone) :] for ids in whole]
    else:
        shared = common_prefix(alone, *whole)
        starts, completions = alone[:shared], [ids[shared:] for ids in whole]
    front, inside = _bos(tokenizer, theory, chat)
    if theory.eos == "between" and not chat:
        inside = [*inside, tokenizer.eos]
    if theory.eos == "after-prompt" and not chat:
        starts = [*starts, tokenizer.eos]
    rows = [Side(tuple(front + starts + inside + ids), len(front) + len(starts)) for ids in completions]
    return rows[0], rows[1]


def _bos(tokenizer: Tokenizer, theory: Theory, chat: bool) -> tuple[list[int], list[int]]:
    """The BOS before the row and the one before the completion.

    A chat template writes its own special tokens, so the tokenizer is asked for none after it.
    """
    added = [tokenizer.bos] if tokenizer.adds_bos and not chat else []
    if theory.bos == "none":
        return [], []
    if theory.bos == "added":
        return [] if chat else [tokenizer.bos], []
    if theory.bos == "twice":
        return added * 2, []
    return added, added if theory.bos == "inside" else []


def truncated(pair: Sides, limit: int | None, how: str, theory: Theory, eos: int) -> Sides | None:
    """The rows cut to `limit` tokens, or None where they are dropped."""
    if limit is None or how == "none" or all(len(side.ids) <= limit for side in pair):
        return pair
    if how == "drop":
        return None
    cut = []
    for side in pair:
        gone = max(len(side.ids) - limit, 0)
        if how == "keep_end":
            cut.append(Side(side.ids[gone:], max(side.start - gone, 0)))
            continue
        ids = side.ids[:limit]
        if gone and theory.eos_cut == "restored":
            ids = (*ids[:-1], eos)
        cut.append(Side(ids, min(side.start, len(ids))))
    return cut[0], cut[1]


@lru_cache(maxsize=4096)
def rows_of(
    rows: tuple[Row, ...], tokenizer: Tokenizer, limit: int | None, how: str, theory: Theory
) -> tuple[Sides, ...]:
    """The token rows of a dataset; dropped rows are absent.  `theory` should differ from PAPER in its token stage
    only: see `token_theory`."""
    found = (truncated(sides(row, tokenizer, theory), limit, how, theory, tokenizer.eos) for row in rows)
    return tuple(pair for pair in found if pair is not None)


TOKEN_FIELDS = ("eos", "template_eos", "bos", "boundary", "prefix", "spaces", "eos_cut")


@lru_cache(maxsize=4096)
def token_theory(theory: Theory) -> Theory:
    """The theory with every later stage as in the paper, so that theories that tokenise alike share the work."""
    return PAPER.but(**{name: getattr(theory, name) for name in TOKEN_FIELDS})


def dataset(experiment: TrainExperiment, rows: tuple[Row, ...], theory: Theory = PAPER) -> tuple[Sides, ...]:
    """The token rows of one of the experiment's sets."""
    recipe = experiment.recipe
    how = recipe.truncation if theory.truncation == "asked" else theory.truncation
    found = rows_of(rows, experiment.tokenizer, recipe.max_length, how, token_theory(theory))
    if theory.repeated_prompts == "first":
        firsts = {sides[0].ids[: sides[0].start]: sides for sides in reversed(found)}
        return tuple(firsts.values())[::-1]
    return found


def tokenise(experiment: TrainExperiment, theory: Theory = PAPER) -> tuple[Pair, ...]:
    """The pairs that the trainer should see, in token ids; rows that truncation drops are absent.

    Where `keep_end` leaves the two sides unequal prompts, `prompt` is the longer one: of the other side's, its end.
    """
    pairs = []
    for chosen, rejected in dataset(experiment, experiment.rows, theory):
        prompt = max((side.ids[: side.start] for side in (chosen, rejected)), key=len)
        pairs.append(Pair(prompt, chosen.ids[chosen.start :], rejected.ids[rejected.start :]))
    return tuple(pairs)
