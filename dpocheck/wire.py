"""How a message between the judge and a worker looks in bytes: numbers, text and arrays, never a pickle.

A frame is a 16-byte prefix (4 bytes magic, 4 bytes length of the header, 8 bytes length of the body, little-endian), a
canonical JSON header and a body of raw array bytes, one array after the other in the header's order:

    {"message": {...}, "arrays": [["name", "<f8", [2, 3]], ...]}

Non-finite floats in `message` are Python's JSON words NaN, Infinity and -Infinity: a subject's NaN is a finding, and
both sides are this file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["MAX_BODY", "MAX_HEADER", "MalformedFrame", "decode", "encode", "read"]

MAGIC = b"dpo1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 256 * 2**20
MAX_BODY = 8 * 2**30
# What a reader accepts; anything else could carry objects.
DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})


class MalformedFrame(ValueError):
    """The bytes are not a frame, or a value cannot be sent; the message says which and why."""


# The names are bound here, so that a subject that replaces `json.dumps` does not change how we speak.
_dumps, _loads = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode, json.loads


def encode(message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The frame of a JSON-able dictionary and named arrays.  Raises MalformedFrame for what cannot be sent."""
    described, parts = [], []
    for name, array in (arrays or {}).items():
        if not isinstance(array, np.ndarray):
            raise MalformedFrame(f"array {name!r} is a {type(array).__name__}; only numpy arrays can be sent")
        dtype = array.dtype.newbyteorder("<").str
        if dtype not in DTYPES:
            raise MalformedFrame(f"array {name!r} has dtype {array.dtype}; allowed: {', '.join(sorted(DTYPES))}")
        described.append([name, dtype, list(array.shape)])
        parts.append(np.asarray(array, dtype=dtype, order="C").tobytes())
    try:
        header = _dumps({"message": dict(message), "arrays": described}).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedFrame(f"the message is not plain JSON data: {error}") from None
    body = b"".join(parts)
    if len(header) > MAX_HEADER or len(body) > MAX_BODY:
        raise MalformedFrame(
            f"a frame of {len(header)} + {len(body)} bytes is too large; allowed: {MAX_HEADER} + {MAX_BODY}"
        )
    return PREFIX.pack(MAGIC, len(header), len(body)) + header + body


def read(take: Callable[[int], bytearray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next frame, of a function that returns exactly so many bytes.  Raises MalformedFrame."""
    magic, header_length, body_length = PREFIX.unpack(take(PREFIX.size))
    if magic != MAGIC:
        raise MalformedFrame(f"a frame begins with {MAGIC!r}, this one with {magic!r}: something else was written")
    if header_length > MAX_HEADER or body_length > MAX_BODY:
        raise MalformedFrame(
            f"a frame announces {header_length} + {body_length} bytes; allowed: {MAX_HEADER} + {MAX_BODY}"
        )
    return _contents(take(header_length), take(body_length))


def decode(frame: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of exactly one frame.  Raises MalformedFrame."""
    position = 0

    def take(count: int) -> bytearray:
        nonlocal position
        part = bytearray(frame[position : position + count])
        if len(part) < count:
            raise MalformedFrame(f"a frame ends after {len(frame)} bytes; {position + count} were announced")
        position += count
        return part

    contents = read(take)
    if position != len(frame):
        raise MalformedFrame(f"{len(frame) - position} bytes follow the frame")
    return contents


def _contents(header: bytearray, body: bytearray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        data = _loads(header.decode("ascii"))
        message, described = data["message"], data["arrays"]
        described = [(str(name), str(dtype), tuple(shape)) for name, dtype, shape in described]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedFrame(f"a frame's header cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(message, dict):
        raise MalformedFrame(f"a frame's message is a {type(message).__name__}; an object is expected")
    arrays: dict[str, np.ndarray] = {}
    position = 0
    for name, dtype, shape in described:
        if dtype not in DTYPES:
            raise MalformedFrame(f"array {name!r} has dtype {dtype!r}; allowed: {', '.join(sorted(DTYPES))}")
        if name in arrays or not all(type(n) is int and n >= 0 for n in shape):
            raise MalformedFrame(f"array {name!r} of shape {shape} is named twice or has an impossible shape")
        count = math.prod(shape)
        end = position + count * np.dtype(dtype).itemsize
        if end > len(body):
            raise MalformedFrame(f"array {name!r} of shape {shape} needs more bytes than the frame holds")
        # A view into the bytearray: writable, not copied.
        arrays[name] = np.frombuffer(body, dtype=dtype, count=count, offset=position).reshape(shape)
        position = end
    if position != len(body):
        raise MalformedFrame(f"{len(body) - position} bytes of a frame belong to no array")
    return message, arrays
