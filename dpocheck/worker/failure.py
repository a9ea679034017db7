"""What did a subject raise, and whose frame did it come from?  Worker side; survives any exception object."""

from __future__ import annotations

import importlib
import linecache
import os
import sys
from typing import Any

from dpocheck.adapter import Unsupported

__all__ = ["BadAnswer", "describe", "headline", "kind_of"]

MESSAGE = 20_000  # characters kept of a message
FRAMES = 25  # kept at each end of a long traceback
CAUSES = 5
LOADED = "dpocheck_subject_"  # the name under which a subject's file is imported

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # this package
_OURS_AS_SUBJECT = tuple(os.path.join(_HERE, name) for name in ("miniature", "zoo" + os.sep))


class BadAnswer(Exception):
    """The adapter answered with something that its contract does not allow; addressed to the adapter's author."""


def kind_of(value: Any) -> str:
    """The type of a value with its article, for a complaint: "a list", "None"."""
    name = type(value).__name__
    return "None" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"


def describe(raised: BaseException, subject: str, state: dict[str, Any]) -> dict[str, Any]:
    """An exception as JSON data: `kind` ("Unsupported" or "Exception"), `type`, `message`, `traceback_lines`,
    `in_adapter` (raised in the adapter's own file, or one of our own complaints about it) and `in_suite` (raised in
    this package, not by a subject: our fault)."""
    try:
        files = _subject_files(subject, state)
        deepest = _deepest(raised)
        adapter = deepest in files or _is_complaint(raised)
        suite = deepest.startswith(_HERE) and not adapter and not deepest.startswith(_OURS_AS_SUBJECT)
        lines = _traceback(raised, suite)
    except BaseException as error:
        adapter, suite, lines = False, False, [f"<the traceback cannot be shown: {type(error).__name__}>"]
    kind = "Unsupported" if isinstance(raised, Unsupported) else "Exception"
    return {
        "kind": kind,
        "type": _type_name(raised),
        "message": _message(raised),
        "traceback_lines": lines,
        "in_adapter": adapter,
        "in_suite": suite,
    }


def headline(kind: str, message: str) -> str:
    """An exception in one line; one without a message is named alone."""
    return f"{kind}: {message}" if message.strip() else kind


def _is_complaint(raised: BaseException) -> bool:
    """Our own exception classes say what is wrong with an adapter; but an unsendable answer is our mistake."""
    module = str(type(raised).__module__)
    return module.startswith("dpocheck.") and module != "dpocheck.wire" and not isinstance(raised, Unsupported)


def _type_name(raised: BaseException) -> str:
    try:
        kind = type(raised)
        module = str(kind.__module__)
        plain = module in ("builtins", "__main__") or module.startswith(("dpocheck.", LOADED))
        return str(kind.__qualname__) if plain else f"{module}.{kind.__qualname__}"
    except BaseException:
        return "an exception without a name"


def _message(raised: BaseException) -> str:
    try:
        return str.__str__(str(raised))[:MESSAGE]
    except BaseException as error:
        return f"<the message cannot be shown: its __str__ raised {_type_name(error)}>"


def _subject_files(subject: str, state: dict[str, Any]) -> set[str]:
    files = set()
    place = subject.partition(":")[0]
    if place.endswith(".py"):
        files |= {os.path.abspath(place), os.path.realpath(place), place}
    adapter = state.get("adapter")
    for name in (place, getattr(type(adapter), "__module__", None), getattr(adapter, "__module__", None)):
        file = getattr(sys.modules.get(name), "__file__", None) if isinstance(name, str) else None
        if file and (not file.startswith(_HERE) or file.startswith(_OURS_AS_SUBJECT)):
            files.add(file)
    return files


def _deepest(raised: BaseException) -> str:
    tb, file = raised.__traceback__, ""
    while tb is not None:
        file, tb = tb.tb_frame.f_code.co_filename, tb.tb_next
    return file


def _is_ours(file: str) -> bool:
    """A frame that says nothing about the subject: this package's, or the import system's."""
    if file.startswith("<frozen importlib") or file == importlib.__file__:
        return True
    return file.startswith(_HERE) and not file.startswith(_OURS_AS_SUBJECT)


def _traceback(raised: BaseException, suite: bool) -> list[str]:
    """The traceback, innermost last, causes first; the middle of a long one is left out, and our own frames are unless
    the fault is ours.  Empty where nothing of the subject's is left: the message then says it all."""
    chain: list[BaseException] = []
    one: BaseException | None = raised
    while one is not None and len(chain) < CAUSES and all(one is not other for other in chain):
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    lines: list[str] = []
    for exception in reversed(chain):
        frames = _frames(exception, suite)
        if len(frames) > 2 * FRAMES:
            gap = f"  ... {len(frames) - 2 * FRAMES} frames left out ..."
            frames = [*frames[:FRAMES], gap, *frames[-FRAMES:]]
        lines += [*frames, headline(_type_name(exception), _message(exception)[:2000])]
    return lines if len(lines) > len(chain) else []


def _frames(raised: BaseException, suite: bool) -> list[str]:
    frames, tb = [], raised.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if suite or not _is_ours(code.co_filename):
            source = linecache.getline(code.co_filename, tb.tb_lineno).strip()[:200]
            frames.append(f'  File "{code.co_filename}", line {tb.tb_lineno}, in {code.co_name}')
            if source:
                frames[-1] += f"\n    {source}"
        tb = tb.tb_next
    return frames
