"""How a stranger's text is made safe to show: in a terminal, in XML, in HTML (which still escapes it)."""

from __future__ import annotations

import re

__all__ = ["printable"]

_SEQUENCES = re.compile(
    r"""
    (?:\x1b\[|\x9b) [0-?]* [ -/]* [@-~]                        # CSI: colours, cursor
    | (?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]) [^\x07\x1b\x9c]* (?:\x07|\x1b\\|\x9c)   # OSC, DCS, ...: titles, links
    | \x1b [ -/]* [0-~]                                        # two-character escapes, character sets
    """,
    re.VERBOSE,
)
# C0 but for tab and newline, DEL, C1, and the marks that reorder what a reader sees.
_REMOVED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Not a character, or not one that XML 1.0 allows.
_REPLACED = re.compile("[\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]|[^\x00-\U0010ffff]")
_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029")


def printable(text: str, limit: int | None = None) -> str:
    """The text without control characters, escape sequences, lone surrogates and marks that reorder a line.

    Tab and newline stay, every other line end becomes a newline (so each state of a progress bar is a line), and what
    is no character becomes U+FFFD.  A text of more than `limit` characters loses its middle, and says how much: the
    result is never longer than `limit`.
    """
    text = _SEQUENCES.sub("", text)
    text = _LINE_ENDS.sub("\n", text)
    text = _REMOVED.sub("", text)
    text = _REPLACED.sub("\ufffd", text)
    return text if limit is None or len(text) <= limit else _without_middle(text, limit)


def _without_middle(text: str, limit: int) -> str:
    mark = f"\n[... {len(text) - limit} characters and more left out ...]\n"
    room = limit - len(mark)
    if room < 2:
        return text[: max(limit, 0)]
    head = room // 2
    return text[:head] + mark + text[len(text) - (room - head) :]
