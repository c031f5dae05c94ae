"""The few pickled files that robot data sets still carry, read without letting a pickle run anything.

numpy's own classes take what a pickle says of memory on trust, so a pickle gets none of them, only stand-ins that note
what was said. Arrays are made afterwards, from what was noted and checked.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from upvla.errors import Corrupt

_PLAIN = re.compile(r"b1|[iu][1248]|f[248]|[SU]\d{1,8}|O[48]")  # what elements of arrays may be, in numpy's names
_MAX_DIMENSIONS = 32
_PYTHONS: Any = pickle._Unpickler  # not C's, which allots a memo as large as ten bytes ask for


class UnsafePickle(Corrupt):
    """A pickle that would import or run something, or have numpy take bytes for objects; nothing of it was run. Do not
    open the file with anything else."""


class _Name:
    """What a name of numpy's stands for. A pickle may call it, and do nothing else with it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickle("it wants to change what a name means")


class _Dtype:
    """What the elements of an array are, if it is something plain; flags and sizes follow from that."""

    __slots__ = ("_order", "name")

    def __init__(self, name: Any, align: Any = False, copy: Any = False):
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            said = repr(name)[:40] if isinstance(name, str) else type(name).__name__
            raise UnsafePickle(f"it has an array of {said}, not of bool, int, float, text or objects")
        self.name, self._order = name, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *described = state
        if order not in ("<", ">", "=", "|") or any(part is not None for part in described[:3]):
            raise UnsafePickle(f"it has an array of {self.name} that consists of parts")
        self._order = order

    def elements(self, data: Any) -> np.ndarray:
        if self.name.startswith("O") or not isinstance(data, bytes | bytearray):
            raise UnsafePickle(f"it has a {type(data).__name__} for the memory of {self.name}")
        if self.name.startswith("U") and (np.frombuffer(data, f"{self._order}u4") > 0x10FFFF).any():
            raise ValueError("its text is no Unicode")
        return np.frombuffer(data, np.dtype(f"{self._order}{self.name}"))


class _Array:
    """An array that is made when all of the pickle is read."""

    __slots__ = ("_said",)

    def __init__(self, *said: Any):
        self._said = said  # data, dtype, shape, order, order of the axes

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self._said = (data, dtype, shape, "F" if is_fortran else "C")

    def made(self, built: Callable[[Any], Any]) -> np.ndarray:
        """`built` is told what an array of objects holds."""
        data, dtype, shape, order, *axes = self._said
        if not isinstance(dtype, _Dtype):
            raise UnsafePickle(f"it has an array whose dtype is a {type(dtype).__name__}")
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"it has an array whose shape is a {type(shape).__name__}, or has too many dimensions")
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError("it has an array whose shape is not of whole numbers")
        if not dtype.name.startswith("O"):
            elements = dtype.elements(data)
            return elements.reshape(shape).transpose(*axes) if order == "K" else elements.reshape(shape, order=order)
        if not isinstance(data, list) or len(data) != math.prod(shape):
            raise ValueError(f"it has an array of shape {shape} that does not hold as many objects")
        objects = np.empty(len(data), object)
        for place, value in enumerate(data):
            objects[place] = built(value)
        return objects.reshape(shape)


def _scalar(dtype: Any, data: Any) -> Any:
    """As Python has it, which a pickle can put nothing into."""
    if not isinstance(dtype, _Dtype):
        raise UnsafePickle(f"it has a scalar whose dtype is a {type(dtype).__name__}")
    if dtype.name in ("U0", "S0") and data == b"":
        return "" if dtype.name == "U0" else b""
    (value,) = dtype.elements(data).tolist()
    return value


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("it wants to encode as something else than Latin-1")
    return text.encode("latin1")


# What numpy writes for arrays, scalars and dtypes inside a pickle, and protocols below 3 for bytes; containers and
# plain values need no import at all.
_NAMES = {
    ("numpy", "ndarray"): _Name(_Array),
    ("numpy", "dtype"): _Name(_Dtype),
    ("_codecs", "encode"): _Name(_latin1),
    ("__builtin__", "bytes"): _Name(lambda: b""),
}
for _package in ("numpy.core", "numpy._core"):
    _NAMES |= {
        (f"{_package}.multiarray", "_reconstruct"): _Name(lambda kind, shape, code: _Array()),
        (f"{_package}.multiarray", "scalar"): _Name(_scalar),
        (f"{_package}.numeric", "_frombuffer"): _Name(_Array),
    }


class _Unpickler(_PYTHONS):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UnsafePickle(f"it wants to import {module}.{name}")
        return _NAMES[module, name]


def _built(value: Any, done: dict[int, Any]) -> Any:
    """The value with real arrays. `done` has what was met before: many places may hold one thing, but none itself."""
    if isinstance(value, _Name | _Dtype):
        raise UnsafePickle("it holds one of numpy's names where data should be")
    if not isinstance(value, _Array | list | tuple | dict | set | frozenset):
        return value
    if id(value) not in done:
        done[id(value)] = None  # not yet
        if isinstance(value, _Array):
            done[id(value)] = value.made(lambda part: _built(part, done))
        elif isinstance(value, dict):
            done[id(value)] = {_built(key, done): _built(part, done) for key, part in value.items()}
        else:
            done[id(value)] = type(value)(_built(part, done) for part in value)
    if done[id(value)] is None:
        raise ValueError("it holds itself")
    return done[id(value)]


def read_object_npy(data: bytes, name: str) -> Any:
    """The value inside a 0-d object `.npy` file (a dict, usually) made of containers, numbers, text and arrays.

    Anything else that the pickle asks for is `UnsafePickle`, a damaged file `Corrupt`; nothing of either has run.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = header(file)
        if not dtype.hasobject:
            raise ValueError(f"it holds {dtype}, not a pickled value")
        value = _built(_Unpickler(file).load(), {})
        return value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    except UnsafePickle as error:
        raise UnsafePickle(f"{name} is not a safe pickled array: {error}; nothing of it was run") from error
    except Exception as error:  # a malformed pickle may raise anything; all of it means the same
        raise Corrupt(f"{name} is not a safe pickled array: {error}; nothing of it was run") from error
