"""What does one column of a row hold, and what is wrong with it when it holds something else?

Every complaint names the row, the column, the value, what is allowed and, where it can be guessed, what was meant.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from reference_impl.sources import DataError, SourceRow

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
# Columns that hold a question in well-known sets. Reading such rows as "chosen and rejected alone" would lose it.
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "problem", "messages", "conversation")


def present(row: SourceRow, column: str) -> Any:
    """The value of a column that every row needs."""
    if column not in row.fields:
        raise DataError(missing(row, column))
    value = row.fields[column]
    if value is None:
        raise DataError(f"{row.place}: column {column!r} is null; every row needs it, complete or remove the row")
    return value


def missing(row: SourceRow, column: str) -> str:
    """What to say of an absent column, with the column that was probably meant."""
    names = [str(k) for k in row.fields]
    close = [n for n in names if n.strip().lower() == column] or difflib.get_close_matches(column, names, 1, 0.6)
    hint = ""
    if close:
        hint = f"; did you mean {close[0]!r}? Rename it to {column!r}"
    elif "label" in names and "completion" in names:
        hint = "; rows with 'completion' and 'label' are unpaired (KTO), DPO needs two completions of one prompt"
    return f"{row.place}: no column {column!r}; the columns are {', '.join(map(repr, names)) or '(none)'}{hint}"


def refuse_lost_prompt(row: SourceRow) -> None:
    """Refuse a row without `prompt` where another column is probably the prompt."""
    names = {str(k).strip().lower(): k for k, v in row.fields.items() if v and isinstance(v, (str, list, tuple))}
    texts = [n for n in names if not n.endswith("id")]  # prompt_id is no prompt
    suspects = [names[n] for n in difflib.get_close_matches("prompt", texts, 1, 0.75)]
    suspects += [names[n] for n in PROMPT_LIKE if n in names]
    if suspects:
        raise DataError(
            f"{row.place}: no column 'prompt', but {suspects[0]!r} looks like one; rename it to 'prompt', "
            "or remove it if 'chosen' and 'rejected' hold the whole text"
        )


def refuse_lost_system(row: SourceRow) -> None:
    """Refuse a system prompt beside texts: nothing would render it."""
    system = row.fields.get("system")
    if system:
        raise DataError(
            f"{row.place}: a column 'system' beside texts would be ignored: {system!r:.60}; put it into 'prompt', "
            "or write the row as messages"
        )


def encodable(text: str, row: SourceRow, where: str) -> None:
    """Refuse text that no encoding can carry (JSON may escape half a surrogate pair)."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: {where} holds half a character (the lone surrogate {text[error.start]!r}) at position "
            f"{error.start}; write the text as valid Unicode"
        ) from error


def messages(row: SourceRow, column: str, text_is: str | None = None) -> list[Message]:
    """A column as messages with `role` and `content`; a text is one message of the role `text_is`, if that is given."""
    value = row.fields[column]
    if isinstance(value, str) and text_is is not None:
        value = [{"role": text_is, "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{row.place}: column {column!r} must be a list of messages, not {kind(value)}: {value!r:.60}")
    if not value:
        raise DataError(f"{row.place}: column {column!r} is an empty list; it needs at least one message")
    return [_message(row, f"{column}[{i}]", item) for i, item in enumerate(value)]


def _message(row: SourceRow, where: str, item: object) -> Message:
    example = '{"role": "user", "content": "..."} or {"from": "human", "value": "..."}'
    if not isinstance(item, Mapping):
        raise DataError(f"{row.place}: {where} is {kind(item)}, not a message such as {example}: {item!r:.60}")
    # Columnar files fill absent keys with null, so that a null key counts as absent.
    by_role = item.get("role") is not None
    said = item.get("role") if by_role else item.get("from")
    content_key = "content" if by_role else "value"
    if said is None or (item.get(content_key) is None and not item.get("tool_calls")):
        raise DataError(
            f"{row.place}: {where} lacks its {'role' if said is None else repr(content_key)}: it has "
            f"{', '.join(repr(k) for k, v in item.items() if v is not None) or 'nothing'}; a message is {example}"
        )
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{row.place}: {where} has the role {said!r:.40}; allowed are {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(row, where, item.get(content_key))}
    if by_role:  # tool calls, names, reasoning: the template knows what to do with them
        message.update({k: v for k, v in item.items() if k not in ("role", "content") and v is not None})
    return message


def _content(row: SourceRow, where: str, content: object) -> str:
    if content is None:  # only beside tool calls, see _message
        return ""
    if isinstance(content, (list, tuple)) and content:
        kinds = {str(p.get("type")) if isinstance(p, Mapping) else kind(p) for p in content}
        if kinds != {"text"} or not all(isinstance(p.get("text"), str) for p in content):
            raise DataError(
                f"{row.place}: {where} has content of type {', '.join(sorted(kinds))}; only parts "
                '{"type": "text", "text": "..."} can be trained on'
            )
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise DataError(f"{row.place}: the content of {where} is {kind(content)}, not text: {content!r:.60}")
    encodable(content, row, where)
    return content


def tools(row: SourceRow) -> tuple[Any, ...]:
    """The `tools` column: function descriptions as a list or as JSON text; absent is none."""
    value = row.fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{row.place}: column 'tools' is text that is not JSON ({error}): {value!r:.60}") from error
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, Mapping) for t in value):
        raise DataError(
            f"{row.place}: column 'tools' must be a list of function descriptions, not {kind(value)}: {value!r:.60}"
        )
    return tuple(value)


def kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    names = {type(None): "null", str: "text", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
