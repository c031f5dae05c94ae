"""An object of a store as a file that can be read anywhere, for looking into a large one without fetching it whole."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

from upvla.store import Store

_BLOCK_BYTES = 1 << 16  # what a request costs beside its bytes
_BLOCKS_KEPT = 64


class RangeFile(io.RawIOBase):
    """Read in blocks by ranged requests; the last few blocks are kept."""

    def __init__(self, store: Store, key: str):
        self._store, self._key, self._size, self._at = store, key, store.size(key), 0
        self._blocks = OrderedDict[int, bytes]()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, but for the file's end: HDF5 does not ask twice."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._at < self._size:
            number, skip = divmod(self._at, _BLOCK_BYTES)
            part = self._block(number)[skip : skip + len(view) - done]
            view[done : done + len(part)] = part
            done, self._at = done + len(part), self._at + len(part)
        return done

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * _BLOCK_BYTES
            (data,) = self._store.read_ranges(self._key, [(start, min(self._size, start + _BLOCK_BYTES))])
            self._blocks[number] = data
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]
