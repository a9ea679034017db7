"""Does a frame come back as it was sent, and is everything else refused?"""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpocheck import wire

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
DTYPES = st.sampled_from(sorted(wire.DTYPES))
ARRAYS = st.dictionaries(
    st.text(max_size=5), DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0))), max_size=3
)


@given(message=st.dictionaries(st.text(), PLAIN, max_size=4), arrays=ARRAYS)
def test_every_plain_message_and_array_comes_back_bit_for_bit(message, arrays):
    back, out = wire.decode(wire.encode(message, arrays))
    assert json.dumps(back, sort_keys=True) == json.dumps(message, sort_keys=True)
    assert list(out) == list(arrays)
    for name, array in arrays.items():
        assert (out[name].dtype, out[name].shape) == (array.dtype, array.shape)
        assert out[name].tobytes() == array.tobytes()


@given(message=st.dictionaries(st.text(), PLAIN, max_size=4), arrays=ARRAYS)
def test_equal_messages_have_equal_bytes(message, arrays):
    turned = dict(reversed(list(message.items())))
    assert wire.encode(message, arrays) == wire.encode(turned, arrays)


@given(garbage=st.binary(max_size=200))
def test_random_bytes_are_refused(garbage):
    with pytest.raises(wire.MalformedFrame):
        wire.decode(garbage)


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_read_as_data_or_refused_but_never_anything_else(position, value):
    frame = bytearray(wire.encode({"call": 1, "text": "x"}, {"a": np.arange(4.0), "b": np.zeros((2, 2), np.int8)}))
    frame[position % len(frame)] = value
    try:
        message, arrays = wire.decode(bytes(frame))
    except wire.MalformedFrame:
        return
    assert isinstance(message, dict)
    assert all(isinstance(array, np.ndarray) and array.dtype.str in wire.DTYPES for array in arrays.values())


def test_arrays_received_can_be_written_to():
    _, out = wire.decode(wire.encode({}, {"a": np.arange(3)}))
    out["a"][0] = 7
    assert out["a"].tolist() == [7, 1, 2]


def test_transposed_and_big_endian_arrays_arrive_with_their_values():
    turned = np.arange(6.0).reshape(2, 3).T
    big = np.arange(3, dtype=">f8")
    _, out = wire.decode(wire.encode({}, {"turned": turned, "big": big}))
    assert np.array_equal(out["turned"], turned)
    assert np.array_equal(out["big"], big)


def test_frames_follow_one_another():
    stream = io.BytesIO(wire.encode({"n": 1}) + wire.encode({"n": 2}, {"a": np.ones(2)}))
    assert wire.read(lambda count: bytearray(stream.read(count)))[0] == {"n": 1}
    assert wire.read(lambda count: bytearray(stream.read(count)))[1]["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.array([object()])}, "dtype object"),
        ({"a": np.array(["text"])}, "dtype <U4"),
        ({"a": np.zeros(1, np.complex128)}, "dtype complex128"),
        ({"a": [1.0]}, "is a list"),
    ],
)
def test_an_array_that_could_carry_objects_is_not_sent(arrays, words):
    with pytest.raises(wire.MalformedFrame, match=words):
        wire.encode({}, arrays)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.float32(1)])
def test_a_message_that_is_not_json_is_not_sent(value):
    with pytest.raises(wire.MalformedFrame, match="not plain JSON"):
        wire.encode({"x": value})


def _framed(header: bytes, body: bytes = b"") -> bytes:
    return wire.PREFIX.pack(wire.MAGIC, len(header), len(body)) + header + body


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pickle.dumps({"call": 1}) + b" " * 20, "something else was written"),
        (wire.PREFIX.pack(wire.MAGIC, wire.MAX_HEADER + 1, 0), "announces"),
        (wire.PREFIX.pack(wire.MAGIC, 2, wire.MAX_BODY + 1), "announces"),
        (_framed(b"[" * 100_000), "cannot be read"),
        (_framed(b'{"message": 3, "arrays": []}'), "an object is expected"),
        (_framed(b'{"message": {}, "arrays": [["a", "|O", [1]]]}', b"12345678"), "dtype '|O'"),
        (_framed(b'{"message": {}, "arrays": [["a", "<f8", [-1]]]}', b"12345678"), "impossible shape"),
        (_framed(b'{"message": {}, "arrays": [["a", "<f8", [true]]]}', b"12345678"), "impossible shape"),
        (_framed(b'{"message": {}, "arrays": [["a", "<f8", [99999999999]]]}', b"12345678"), "more bytes than"),
        (_framed(b'{"message": {}, "arrays": []}', b"12345678"), "belong to no array"),
        (_framed(b'{"message": {}, "arrays": [["a", "<f8", [1]], ["a", "<f8", [0]]]}', b"12345678"), "named twice"),
        (wire.encode({}) + b"x", "follow the frame"),
        (wire.encode({"a": 1})[:-1], "were announced"),
    ],
)
def test_a_malformed_frame_is_refused_with_the_reason(frame, words):
    with pytest.raises(wire.MalformedFrame) as caught:
        wire.decode(frame)
    assert words in str(caught.value)
