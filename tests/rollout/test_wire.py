"""The format between server and client: what goes in comes out, and nothing else is ever more than a `Mismatch`."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upvla.errors import Mismatch
from upvla.rollout import wire

ARRAYS = {"image_static": np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "state": np.arange(3, dtype=np.float32)}
MESSAGE = wire.pack({"id": 1, "instruction": "öffne"}, ARRAYS)


def test_what_goes_in_comes_out() -> None:
    header, arrays = wire.unpack(MESSAGE)
    assert header == {"id": 1, "instruction": "öffne"}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype and not arrays[name].flags.writeable
    every_second = wire.unpack(wire.pack({}, {"a": ARRAYS["image_static"][:, ::2]}))[1]["a"]
    np.testing.assert_array_equal(every_second, ARRAYS["image_static"][:, ::2])
    assert wire.unpack(wire.pack({}, {"empty": np.zeros((0, 7), np.float32)}))[1]["empty"].shape == (0, 7)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ([["a", "object", [1]]], "does not describe an array"),
        ([["a", "float32", [1 << 40]]], "does not describe an array"),
        ([["a", "float32", [-1]]], "does not describe an array"),
        ([["a", "float32", [2, 3, 4, 5, 6]]], "does not describe an array"),
        ([["a", "float32", [1 << 20, 1 << 20]]], "ends after the message"),
        ([["a", "uint8", [0]], ["a", "uint8", [0]]], "two arrays of one name"),
        ([["a", "uint8", [0]]] * 20, "at most"),
        ({"a": 1}, "at most"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(arrays: object, why: str) -> None:
    import json

    text = json.dumps({"arrays": arrays}).encode()
    with pytest.raises(Mismatch, match=why):
        wire.unpack(struct.pack("<I", len(text)) + text)


def test_lengths_are_checked_before_anything_is_read() -> None:
    for message, why in (
        (b"", "0 bytes"),
        (struct.pack("<I", 1 << 31) + b"{}", "a header of"),
        (MESSAGE + b"more", "bytes after the last array"),
        (MESSAGE[:-1], "ends after the message"),
        (struct.pack("<I", 60_000) + b"[" * 60_000, "not JSON"),
        (struct.pack("<I", 2) + b"[]", "not a JSON object"),
    ):
        with pytest.raises(Mismatch, match=why):
            wire.unpack(message)
    with pytest.raises(Mismatch, match=f"{len(MESSAGE)} bytes; 4 to 10"):
        wire.unpack(MESSAGE, max_bytes=10)
    with pytest.raises(Mismatch, match="object"):
        wire.pack({}, {"a": np.array([None])})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_spoilt_message_is_a_mismatch_or_a_message(data: st.DataObject) -> None:
    spoilt = bytearray(MESSAGE)
    for _ in range(data.draw(st.integers(1, 6))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, arrays = wire.unpack(bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))]))
    except Mismatch:
        return
    assert sum(array.nbytes for array in arrays.values()) <= len(MESSAGE)
