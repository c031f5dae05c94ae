"""What policy server and client say to each other: JSON that describes arrays, then their raw bytes. No pickle.

    u32 little-endian: length of the header | header: UTF-8 JSON | bytes of the arrays, C order, in the header's order

The header is an object; its key `arrays` is `[[name, dtype, shape], ...]`. Whoever reads checks sizes before it touches
a byte of an array, so that a wrong or hostile message costs nothing but its own length.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from upvla.errors import Mismatch

FORMAT = 1
MAX_BYTES = 16 << 20
"""Of a whole message, unless the reader says otherwise: two cameras of 1,600 x 1,600 pixels."""

_HEADER_BYTES = 64 << 10
_ARRAYS, _AXES = 16, 4
_DTYPES = {"uint8", "int64", "float32", "float64"}


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Raises `Mismatch` for an array that the other side would refuse."""
    listed = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    for name, dtype, shape in listed:
        if dtype not in _DTYPES or len(shape) > _AXES:
            raise Mismatch(f"wire: array {name!r} is {dtype}{shape}; send one of {', '.join(sorted(_DTYPES))}")
    text = json.dumps({**header, "arrays": listed}).encode()
    raw = (np.ascontiguousarray(array).data.cast("B") if array.size else b"" for array in arrays.values())
    return b"".join((struct.pack("<I", len(text)), text, *raw))


def unpack(message: bytes, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header without `arrays`, read-only views of the message). Raises `Mismatch` saying what is wrong with it."""
    if not 4 <= len(message) <= max_bytes:
        raise Mismatch(f"wire: a message of {len(message)} bytes; 4 to {max_bytes} are taken")
    (length,) = struct.unpack_from("<I", message)
    if length > min(_HEADER_BYTES, len(message) - 4):
        raise Mismatch(f"wire: a header of {length} bytes in a message of {len(message)}")
    header = _object(message[4 : 4 + length])
    arrays: dict[str, np.ndarray] = {}
    offset = 4 + length
    for name, dtype, shape in _listed(header.pop("arrays", [])):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if offset + size > len(message):
            raise Mismatch(f"wire: array {name!r} ({dtype}{shape}) ends after the message does")
        count = math.prod(shape)
        arrays[name] = np.frombuffer(message, dtype, count, offset).reshape(shape) if count else np.zeros(shape, dtype)
        offset += size
    if offset != len(message):
        raise Mismatch(f"wire: {len(message) - offset} bytes after the last array")
    return header, arrays


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"wire: the header is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Mismatch("wire: the header is not a JSON object")
    return value


def _listed(rows: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    if not isinstance(rows, list) or len(rows) > _ARRAYS:
        raise Mismatch(f"wire: `arrays` is a list of at most {_ARRAYS}")
    found = []
    for row in rows:
        match row:
            case [str(name), str(dtype), [*shape]] if dtype in _DTYPES and len(shape) <= _AXES:
                if all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in shape):
                    found.append((name, dtype, tuple(shape)))
                    continue
        raise Mismatch(f"wire: {str(row)[:100]} does not describe an array: [name, dtype, shape of up to {_AXES}]")
    if len({name for name, _, _ in found}) != len(found):
        raise Mismatch("wire: two arrays of one name")
    return found
