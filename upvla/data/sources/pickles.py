"""The few pickled files that robot data sets still carry, read without letting a pickle run anything."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from upvla.errors import Corrupt

# What numpy writes for arrays, scalars and dtypes inside a pickle; containers and plain values need no import at all.
_ALLOWED = {
    (module, name)
    for package in ("numpy", "numpy.core", "numpy._core")
    for module, name in (
        (package, "ndarray"),
        (package, "dtype"),
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
}


class UnsafePickle(Corrupt):
    """A pickle that would import or run something; nothing of it was run. Do not open the file with anything else."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocols below 3 carry bytes
            return _latin1
        if (module, name) not in _ALLOWED:
            raise UnsafePickle(f"it wants to import {module}.{name}")
        return super().find_class(module, name)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants to encode as {encoding}")
    return text.encode("latin1")


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
        value = _Unpickler(file).load()
        return value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    except UnsafePickle as error:
        raise UnsafePickle(f"{name} is not a safe pickled array: {error}; nothing of it was run") from error
    except Exception as error:  # a malformed pickle may raise anything; all of it means the same
        raise Corrupt(f"{name} is not a safe pickled array: {error}; nothing of it was run") from error
