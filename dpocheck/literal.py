"""How is plain data written as Python that a person can read?"""

from __future__ import annotations

import math
from typing import Any


def literal(value: Any, width: int = 110) -> str:
    """Python text of strings, numbers, lists, tuples and dicts; broken at `width`, several items a line."""
    whole = _flat(value)
    if len(whole) <= width or not isinstance(value, list | tuple | dict) or not value:
        return whole
    opening, closing = {list: "[]", tuple: "()", dict: "{}"}[type(value)]
    if isinstance(value, dict):
        items = [f"{_flat(name)}: {literal(item, width - 4)}" for name, item in value.items()]
    else:
        items = [literal(item, width - 4) for item in value]
    lines: list[str] = []
    current = ""
    for item in items:
        if current and ("\n" in item or "\n" in current or len(current) + len(item) + 2 > width - 4):
            lines.append(current + ",")
            current = item
        else:
            current = f"{current}, {item}" if current else item
    lines.append(current + ",")
    body = "\n".join("    " + row for line in lines for row in line.split("\n"))
    return f"{opening}\n{body}\n{closing}"


def _flat(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flat(name)}: {_flat(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flat, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_flat, value)) + ("," if len(value) == 1 else "") + ")"
    text = ascii(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and text[0] == "'" and '"' not in text else text
