"""How does a template of this package become a script?"""

from __future__ import annotations

import ast
from typing import Any


def render(name: str, values: dict[str, Any]) -> str:
    """A template of this package, as text without trailing blanks or piles of empty lines."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # The result is Python, not HTML: every value put in is a literal, or one printable line behind a '#'.
    environment = Environment(
        loader=PackageLoader("dpocheck.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    rows = [row.rstrip() for row in environment.get_template(name).render(values).splitlines()]
    text = "\n".join(rows) + "\n"
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    ast.parse(text)  # a script that is no Python is a bug of ours, and is not written
    return text
