"""Which preference does a row state, whatever of the usual formats it is written in?

The format is found once, in the first row, and every other row must be written the same way. Formats:

- standard: `prompt`, `chosen`, `rejected` are texts;
- text: `chosen` and `rejected` are whole texts, the prompt is what they share at the start;
- transcript: the same in Anthropic's HH form, "\\n\\nHuman: ... \\n\\nAssistant: ...";
- chat: `chosen` and `rejected` are messages, after the messages (or the one user message) in `prompt`;
- chat, implicit prompt: `chosen` and `rejected` are whole conversations;
- ShareGPT: `conversations`, then `chosen` and `rejected` as messages.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reference_impl.datareport import RowNote
from reference_impl.sources import DataError, SourceRow

STANDARD, TEXT, TRANSCRIPT = "standard", "text, implicit prompt", "HH transcript"
CHAT, CHAT_IMPLICIT, SHAREGPT = "chat", "chat, implicit prompt", "ShareGPT"

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
# A column that surely holds the question. Reading such a row as "chosen and rejected only" would lose it in silence.
PROMPT_LIKE = ("prompts", "question", "instruction", "query", "input", "context", "problem", "messages", "conversation")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

Message = dict[str, Any]


@dataclass(frozen=True)
class TextPair:
    """Texts of one preference. `chosen` and `rejected` are whole: each starts with `prompt`."""

    row: int
    place: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ChatPair:
    """Messages of one preference: the shared prompt, then what each side says after it."""

    row: int
    place: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Any, ...]


def detect(row: SourceRow) -> str:
    """The format of a source, from its first row. Raises DataError where the columns make none."""
    fields = row.fields
    for side in ("chosen", "rejected"):
        if side not in fields:
            raise DataError(_missing(row, side))
    prompt, chosen = fields.get("prompt"), fields["chosen"]
    if "conversations" in fields:
        return SHAREGPT
    if "prompt" not in fields:
        _refuse_lost_prompt(row)
        if isinstance(chosen, (list, tuple)):
            return CHAT_IMPLICIT
        return TRANSCRIPT if _is_transcript(chosen) and _is_transcript(fields["rejected"]) else TEXT
    if isinstance(prompt, (list, tuple)) or isinstance(chosen, (list, tuple, Mapping)):
        return CHAT
    return STANDARD


def parse(row: SourceRow, form: str) -> TextPair | ChatPair | RowNote:
    """The preference of one row, or the note why it states none.

    Raises DataError, with the row's place, for a row that is not written in `form`.
    """
    for column in ("chosen", "rejected"):
        _present(row, column)
    if form in (STANDARD, TEXT, TRANSCRIPT):
        return _parse_text(row, form)
    return _parse_chat(row, form)


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
    while low < high:  # a[:low] == b[:low] always; the comparison of slices runs in C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# ---- texts


def _parse_text(row: SourceRow, form: str) -> TextPair | RowNote:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if form == STANDARD:
        prompt = _text(row, "prompt")
        _refuse_lost_system(row)
        if chosen == rejected:
            return dropped(row, "identical", chosen)
        if not chosen or not rejected:
            return dropped(row, "empty", f"chosen {chosen[:20]!r}, rejected {rejected[:20]!r}")
        return TextPair(row.index, row.place, prompt, prompt + chosen, prompt + rejected)
    _refuse_mixture(row, "prompt")
    transcript = _is_transcript(chosen) and _is_transcript(rejected)
    if transcript != (form == TRANSCRIPT):
        raise DataError(
            f"{row.place}: {'an HH transcript' if transcript else 'a plain text'} among rows of the format {form!r}: "
            f"{excerpt(chosen)}; give one format per file"
        )
    if chosen == rejected:
        return dropped(row, "identical", chosen)
    shared = common_prefix_length(chosen, rejected)
    if form == TEXT:
        return TextPair(row.index, row.place, chosen[:shared], chosen, rejected)
    end = chosen.rfind(ASSISTANT, 0, shared) + len(ASSISTANT)
    if end < len(ASSISTANT):
        return dropped(row, "parts_early", chosen)
    for side in (chosen, rejected):
        reply = side[end:]
        if HUMAN in reply or ASSISTANT in reply:
            return dropped(row, "parts_early", reply)
        if not reply.strip():
            return dropped(row, "empty", side[-60:])
    return TextPair(row.index, row.place, chosen[:end], chosen, rejected)


def _is_transcript(text: object) -> bool:
    return isinstance(text, str) and text.startswith(HUMAN) and ASSISTANT in text


def _text(row: SourceRow, column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} is {_kind(value)}, where the rows before it hold text: {value!r:.60}")
    _encodable(value, row, column)
    return value


def _encodable(text: str, row: SourceRow, column: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: column {column!r} holds half a character (a lone surrogate {text[error.start]!r}) at position "
            f"{error.start}; write the text as valid Unicode"
        ) from error


# ---- conversations


def _parse_chat(row: SourceRow, form: str) -> ChatPair | RowNote:
    if form == CHAT_IMPLICIT:
        _refuse_mixture(row, "prompt")
        prompt: list[Message] = []
    elif form == SHAREGPT:
        prompt = messages(row, "conversations")
    elif isinstance(_present(row, "prompt"), str):
        prompt = [{"role": "user", "content": _text(row, "prompt")}]
    else:
        prompt = messages(row, "prompt")
    sides = []
    for column in ("chosen", "rejected"):
        if isinstance(row.fields[column], str) and form == CHAT_IMPLICIT:
            raise DataError(f"{row.place}: column {column!r} is text among conversations; give one format per file")
        side = messages(row, column)
        # A side that repeats the prompt is a whole conversation: scoring the prompt again would be wrong.
        sides.append(side[len(prompt):] if prompt and side[: len(prompt)] == prompt else side)
    chosen, rejected = sides
    if chosen == rejected:
        return dropped(row, "identical", _said(chosen))
    if form in (CHAT_IMPLICIT, CHAT) and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        shared, chosen, rejected = _split_shared(chosen, rejected)
        if form == CHAT and shared:
            prompt = _merge_prompt(row, prompt, shared)
        elif form == CHAT_IMPLICIT:
            prompt = shared
    elif form == CHAT_IMPLICIT:
        prompt, chosen, rejected = _split_shared(chosen, rejected)
    return _checked_chat(row, prompt, chosen, rejected)


def _split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Shared messages, and the rest of each side: at least one message, where each side has one."""
    shared = common_prefix_length(chosen, rejected)
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _merge_prompt(row: SourceRow, prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt where `prompt` repeats, as text, a user message of the whole conversations."""
    asked = {m["content"] for m in shared if isinstance(m["content"], str)}
    if all(m["content"] in asked for m in prompt):
        return shared
    raise DataError(
        f"{row.place}: 'prompt' is not the start of the conversations in 'chosen' and 'rejected': {_said(prompt)!r:.60} against "
        f"{_said(shared)!r:.60}; give the completions alone, or leave out 'prompt'"
    )


def _checked_chat(
    row: SourceRow, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> ChatPair | RowNote:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [m["role"] for m in side]
        if roles[0] != "assistant":
            return dropped(row, "not_assistant", f"{name} starts with {roles[0]}: {_said(side)}")
        if set(roles) != {"assistant"}:
            return dropped(row, "parts_early", f"{name} has turns {', '.join(roles)}")
        if not any(m.get("content") or m.get("tool_calls") for m in side):
            return dropped(row, "empty", f"{name} is empty")
    system = row.fields.get("system")
    if system not in (None, ""):
        if not isinstance(system, str):
            raise DataError(f"{row.place}: column 'system' is {_kind(system)}, not text: {system!r:.60}")
        _encodable(system, row, "system")
        if not (prompt and prompt[0]["role"] == "system"):
            prompt = [{"role": "system", "content": system}, *prompt]
    return ChatPair(row.index, row.place, tuple(prompt), tuple(chosen), tuple(rejected), _tools(row))


def messages(row: SourceRow, column: str) -> list[Message]:
    """A column as messages with `role` and `content`. A lone message and, for a completion, a text are accepted too."""
    value = row.fields[column]
    if isinstance(value, str) and column in ("chosen", "rejected"):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{row.place}: column {column!r} must be a list of messages, not {_kind(value)}: {value!r:.60}")
    if not value and column in ("chosen", "rejected"):
        raise DataError(f"{row.place}: column {column!r} is an empty list of messages")
    return [_message(row, f"{column}[{i}]", item) for i, item in enumerate(value)]


def _message(row: SourceRow, where: str, item: object) -> Message:
    example = '{"role": "user", "content": "..."}'
    if not isinstance(item, Mapping):
        raise DataError(f"{row.place}: {where} is {_kind(item)}, not a message such as {example}: {item!r:.60}")
    role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
    if role_key not in item or (content_key not in item and not item.get("tool_calls")):
        raise DataError(
            f"{row.place}: {where} has the keys {', '.join(map(repr, item)) or '(none)'}; a message is {example} "
            'or {"from": "human", "value": "..."}'
        )
    role = ROLES.get(item[role_key]) if isinstance(item[role_key], str) else None
    if role is None:
        raise DataError(f"{row.place}: {where} has the role {item[role_key]!r:.40}; allowed are {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(row, where, item.get(content_key), item)}
    if role_key == "role":  # tool calls, names, reasoning: the template knows what to do with them
        message.update({k: v for k, v in item.items() if k not in ("role", "content") and v is not None})
    return message


def _content(row: SourceRow, where: str, content: object, item: Mapping[str, Any]) -> str:
    if content is None and item.get("tool_calls"):
        return ""
    if isinstance(content, (list, tuple)) and content:
        kinds = {p.get("type") if isinstance(p, Mapping) else _kind(p) for p in content}
        if kinds != {"text"} or not all(isinstance(p.get("text"), str) for p in content):
            raise DataError(f"{row.place}: {where} has content of the types {sorted(map(str, kinds))}; only text can be trained on")
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise DataError(f"{row.place}: the content of {where} is {_kind(content)}, not text: {content!r:.60}")
    _encodable(content, row, where)
    return content


def _tools(row: SourceRow) -> tuple[Any, ...]:
    tools = row.fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{row.place}: column 'tools' is text that is not JSON ({error}): {tools!r:.60}") from error
    if not tools or (isinstance(tools, str)):
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"{row.place}: column 'tools' must be a list of function descriptions, not {_kind(tools)}: {tools!r:.60}")
    return tuple(tools)


def _said(side: Sequence[Message]) -> str:
    return " | ".join(str(m["content"]) for m in side)


# ---- columns


def _present(row: SourceRow, column: str) -> Any:
    if column not in row.fields:
        raise DataError(_missing(row, column))
    value = row.fields[column]
    if value is None:
        raise DataError(f"{row.place}: column {column!r} is null; every row needs it, remove or complete the row")
    return value


def _missing(row: SourceRow, column: str) -> str:
    names = [str(k) for k in row.fields]
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.6)
    lowered = [n for n in names if n.strip().lower() == column]
    hint = f"; did you mean {(lowered or close)[0]!r}? Rename it to {column!r}" if lowered or close else ""
    if not hint and "label" in names and "completion" in names:
        hint = "; rows with 'completion' and 'label' are unpaired (KTO): DPO needs two completions of one prompt"
    return f"{row.place}: no column {column!r}; the columns are {', '.join(map(repr, names)) or '(none)'}{hint}"


def _refuse_lost_prompt(row: SourceRow) -> None:
    names = {str(k).strip().lower(): k for k in row.fields if row.fields[k] not in (None, "", [])}
    close = difflib.get_close_matches("prompt", list(names), n=1, cutoff=0.75)
    suspects = [names[n] for n in PROMPT_LIKE if n in names] + [names[n] for n in close]
    if suspects:
        raise DataError(
            f"{row.place}: no column 'prompt', but {suspects[0]!r} looks like one; rename it to 'prompt', "
            "or remove it if 'chosen' and 'rejected' hold the whole text"
        )
    _refuse_lost_system(row)


def _refuse_lost_system(row: SourceRow) -> None:
    system = row.fields.get("system")
    if system and isinstance(row.fields["chosen"], str):
        raise DataError(
            f"{row.place}: a column 'system' beside texts would be ignored: {system!r:.60}; put it into 'prompt', "
            "or write the row as messages"
        )


def _refuse_mixture(row: SourceRow, column: str) -> None:
    if row.fields.get(column) is not None:
        raise DataError(f"{row.place}: a column {column!r}, which the first row has not; give one format per file")


def _kind(value: object) -> str:
    names = {type(None): "null", str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true/false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
