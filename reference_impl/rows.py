"""Which preference does a row state, whatever of the usual formats it is written in?

The format is found once, in the first row, and every other row must be written the same way. Formats:

- standard: `prompt`, `chosen`, `rejected` are texts;
- text: `chosen` and `rejected` are whole texts, the prompt is what they share at the start;
- transcript: the same in Anthropic's HH form, "\\n\\nHuman: ... \\n\\nAssistant: ...";
- chat: `chosen` and `rejected` are messages, after the messages (or the one user message) in `prompt`;
- chat, implicit prompt: `chosen` and `rejected` are whole conversations;
- ShareGPT: `conversations`, then `chosen` and `rejected` as messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reference_impl.columns import (
    Message,
    encodable,
    kind,
    messages,
    missing,
    present,
    refuse_lost_prompt,
    refuse_lost_system,
    tools,
)
from reference_impl.datareport import RowNote
from reference_impl.sources import DataError, SourceRow

STANDARD, TEXT, TRANSCRIPT = "standard", "text, implicit prompt", "HH transcript"
CHAT, CHAT_IMPLICIT, SHAREGPT = "chat", "chat, implicit prompt", "ShareGPT"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TELLING = 16  # characters of a prompt that no completion repeats by chance


@dataclass(frozen=True)
class Form:
    """How the rows of one source are written: the format's name, and what each column holds ("text" or "messages")."""

    name: str
    columns: tuple[tuple[str, str], ...]

    @property
    def chat(self) -> bool:
        return self.name in (CHAT, CHAT_IMPLICIT, SHAREGPT)


@dataclass(frozen=True)
class TextPair:
    """Texts of one preference. `chosen` and `rejected` are whole: each starts with `prompt`.

    `unanswered` is the end of a generation prompt that the finished conversations do not have ("" for none).
    `repeats_prompt`: both completions start with the prompt once more.
    """

    row: int
    place: str
    prompt: str
    chosen: str
    rejected: str
    unanswered: str = ""
    repeats_prompt: bool = False


@dataclass(frozen=True)
class ChatPair:
    """Messages of one preference: the shared prompt, then what each side says after it."""

    row: int
    place: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Any, ...]


def detect(row: SourceRow) -> Form:
    """The format of a source, from its first row. Raises DataError where the columns make none."""
    fields = row.fields
    for side in ("chosen", "rejected"):
        if side not in fields:
            raise DataError(missing(row, side))
    if "prompt" in fields and "conversations" in fields:
        raise DataError(f"{row.place}: both 'prompt' and 'conversations'; remove the one that is not the prompt")
    asked = "conversations" if "conversations" in fields else "prompt" if "prompt" in fields else None
    names = [c for c in (asked, "chosen", "rejected") if c is not None]
    columns = tuple((name, _holds(row, name)) for name in names)
    held = dict(columns)
    if held["chosen"] != held["rejected"]:
        raise DataError(
            f"{row.place}: 'chosen' holds {held['chosen']} and 'rejected' {held['rejected']}; write both the same way"
        )
    if asked == "conversations":
        return Form(SHAREGPT, columns)
    if asked == "prompt":
        return Form(STANDARD if set(held.values()) == {"text"} else CHAT, columns)
    if held["chosen"] == "messages":
        return Form(CHAT_IMPLICIT, columns)
    return Form(TRANSCRIPT if _transcripts(fields["chosen"], fields["rejected"]) else TEXT, columns)


def parse(row: SourceRow, form: Form) -> TextPair | ChatPair | RowNote:
    """The preference of one row, or the note why it states none.

    Raises DataError, with the row's place, for a row that is not written in `form`.
    """
    for column, held in form.columns:
        found = _holds(row, column)
        if found != held:
            raise DataError(
                f"{row.place}: column {column!r} holds {found}, but {held} in the first row (format: {form.name}): "
                f"{row.fields[column]!r:.60}; give one format per file"
            )
    for column in ("prompt", "conversations"):
        if column not in dict(form.columns) and row.fields.get(column) is not None:
            raise DataError(
                f"{row.place}: a column {column!r}, which the first row has not (format: {form.name}); "
                "give one format per file"
            )
    return _parse_chat(row, form) if form.chat else _parse_text(row, form)


def dropped(row: SourceRow | TextPair | ChatPair, reason: str, detail: str) -> RowNote:
    """The note of a dropped row, with an excerpt short enough for one line."""
    index = row.index if isinstance(row, SourceRow) else row.row
    return RowNote(index, row.place, "dropped", reason, excerpt(detail))


def excerpt(text: str, limit: int = 60) -> str:
    """Start of a text on one line."""
    shown = repr(text[:limit])
    return shown if len(text) <= limit else shown + "..."


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences of the same type share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # a[:low] == b[:low] throughout; slices are compared in C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _holds(row: SourceRow, column: str) -> str:
    """ "text" or "messages"; DataError for a column that is absent, null or neither."""
    value = present(row, column)
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple, Mapping)):
        return "messages"
    raise DataError(f"{row.place}: column {column!r} is {kind(value)}, not text or messages: {value!r:.60}")


# ---- texts


def _parse_text(row: SourceRow, form: Form) -> TextPair | RowNote:
    fields = row.fields
    for column, _ in form.columns:
        encodable(fields[column], row, column)
    chosen, rejected = fields["chosen"], fields["rejected"]
    refuse_lost_system(row)
    if form.name == TEXT:
        refuse_lost_prompt(row)
    if form.name != STANDARD and _transcripts(chosen, rejected) != (form.name == TRANSCRIPT):
        what = "not an HH transcript" if form.name == TRANSCRIPT else "an HH transcript"
        raise DataError(f"{row.place}: {what}, unlike the first row: {excerpt(chosen)}; give one format per file")
    if chosen == rejected:
        return dropped(row, "identical", chosen)
    if form.name == STANDARD:
        if not chosen or not rejected:
            return dropped(row, "empty", f"chosen {chosen[:20]!r}, rejected {rejected[:20]!r}")
        prompt = fields["prompt"]
        again = len(prompt) >= TELLING and chosen.startswith(prompt) and rejected.startswith(prompt)
        return TextPair(row.index, row.place, prompt, prompt + chosen, prompt + rejected, repeats_prompt=again)
    shared = common_prefix_length(chosen, rejected)
    if form.name == TRANSCRIPT:
        return _transcript(row, chosen, rejected, shared)
    return TextPair(row.index, row.place, chosen[:shared], chosen, rejected)


def _transcript(row: SourceRow, chosen: str, rejected: str, shared: int) -> TextPair | RowNote:
    """The prompt ends with the last shared "Assistant:"; one reply must follow, or a person's words would be scored."""
    start = chosen.rfind(ASSISTANT, 0, shared)
    if start < 0:
        return dropped(row, "parts_early", chosen)
    end = start + len(ASSISTANT)
    for side in (chosen, rejected):
        reply = side[end:]
        if HUMAN in reply or ASSISTANT in reply:
            return dropped(row, "parts_early", reply)
        if not reply.strip():
            return dropped(row, "empty", side[-60:])
    return TextPair(row.index, row.place, chosen[:end], chosen, rejected)


def _transcripts(*texts: str) -> bool:
    return all(text.startswith(HUMAN) and ASSISTANT in text for text in texts)


# ---- conversations


def _parse_chat(row: SourceRow, form: Form) -> ChatPair | RowNote:
    prompt: list[Message] = []
    if form.name == SHAREGPT:
        prompt = messages(row, "conversations")
    elif form.name == CHAT:
        prompt = messages(row, "prompt", text_is="user")
    sides = []
    for column in ("chosen", "rejected"):
        side = messages(row, column, text_is="assistant")
        # A side that repeats the prompt is a whole conversation: the prompt must not be scored again.
        sides.append(side[len(prompt) :] if prompt and side[: len(prompt)] == prompt else side)
    chosen, rejected = sides
    if chosen == rejected:
        return dropped(row, "identical", _said(chosen))
    if not chosen or not rejected:
        return dropped(row, "empty", "one side is the prompt alone")
    shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    common, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    whole = bool(common) and common[0]["role"] != "assistant"
    prompt = _contained(row, prompt, common) if prompt and whole else prompt + common
    if not prompt:
        refuse_lost_prompt(row)
    return _checked_chat(row, _with_system(row, prompt), chosen, rejected)


def _contained(row: SourceRow, prompt: list[Message], common: list[Message]) -> list[Message]:
    """The shared start of whole conversations, beside which `prompt` repeats some of the messages."""
    asked = {m["content"].strip() for m in common}
    if all(m["content"].strip() in asked for m in prompt):
        return common
    raise DataError(
        f"{row.place}: 'prompt' is not in the conversations of 'chosen' and 'rejected': "
        f"{excerpt(_said(prompt))} against "
        f"{excerpt(_said(common))}; give the completions alone, or leave out 'prompt'"
    )


def _with_system(row: SourceRow, prompt: list[Message]) -> list[Message]:
    system = row.fields.get("system")
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise DataError(f"{row.place}: column 'system' is {kind(system)}, not text: {system!r:.60}")
    encodable(system, row, "system")
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise DataError(
            f"{row.place}: column 'system' and the first message are two system prompts: {excerpt(system)} and "
            f"{excerpt(prompt[0]['content'])}; keep one"
        )
    return prompt


def _checked_chat(
    row: SourceRow, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> ChatPair | RowNote:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [m["role"] for m in side]
        if roles[0] != "assistant":
            return dropped(row, "not_assistant", f"{name} goes on with {roles[0]}: {_said(side)}")
        if set(roles) != {"assistant"}:
            return dropped(row, "parts_early", f"{name} goes on with {', '.join(roles)}")
        if not any(m["content"] or m.get("tool_calls") for m in side):
            return dropped(row, "empty", f"{name} is empty")
    return ChatPair(row.index, row.place, tuple(prompt), tuple(chosen), tuple(rejected), tools(row))


def _said(side: Sequence[Message]) -> str:
    return " | ".join(m["content"] for m in side)
