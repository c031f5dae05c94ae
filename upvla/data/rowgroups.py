"""Random rows of Parquet objects at the price of sequential ones: a bounded pool of decoded row groups."""

from __future__ import annotations

import itertools
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.errors import Corrupt, Mismatch, StoreError
from upvla.store import Store

_OPEN_FILES = 128  # a descriptor each on disk, and for 128 MB of shard a footer that takes 1 MB in memory


class _File(NamedTuple):
    """An open object. It is closed when the pool has let go of it and nobody reads it any more."""

    reading: threading.Lock
    file: pq.ParquetFile


class _Binary(NamedTuple):
    """Values of a binary column over the memory that Arrow read them into."""

    data: memoryview
    edges: list[int]


_Column = np.ndarray | _Binary


class Held(NamedTuple):
    """Rows whose row groups are in memory, in the pool or here alone."""

    wanted: Mapping[str, Sequence[int]]  # rows by column, counted from row `first`
    first: int
    starts: Sequence[int]  # the first row of every row group of the object
    groups: Mapping[int, Mapping[str, _Column]]  # those that the rows lie in, by number

    def read(self) -> dict[str, Any]:
        """As `RowGroupPool.take` does."""
        if len(self.groups) == 1:
            ((group, part),) = self.groups.items()
            first = self.starts[group] - self.first
            return {name: _values(part[name], rows, first) for name, rows in self.wanted.items() if len(rows)}
        found: dict[str, Any] = {}
        for name, rows in self.wanted.items():
            pieces = []
            for row in rows:
                group = bisect_right(self.starts, self.first + row) - 1
                pieces.append(_values(self.groups[group][name], (row,), self.starts[group] - self.first))
            if pieces:
                found[name] = [*itertools.chain(*pieces)] if isinstance(pieces[0], list) else np.concatenate(pieces)
        return found


class RowGroupPool:
    """Rows of Parquet objects, through a pool of decoded row groups bounded in bytes; safe for threads.

    Of any number of objects the latest stay open; opening one again costs its footer: 2 ms, and a store's latency.
    A row group is read with all the columns that are asked for together, so callers who ask for the same ones each
    time read it once.
    """

    def __init__(self, root: Store, pool_mb: float):
        self._root = root
        self.resize(pool_mb)
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._starts: dict[str, Sequence[int]] = {}  # of the row groups of all objects that were ever open
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...]], tuple[dict[str, _Column], int]] = OrderedDict()
        self._bytes = 0

    def resize(self, pool_mb: float) -> None:
        """Hold no more than that from the next row group on."""
        self._limit = int(pool_mb * 2**20)

    def take(self, key: str, wanted: Mapping[str, Sequence[int]], first: int = 0) -> dict[str, Any]:
        """{column: its rows, counted from row `first`} -> {column: numbers as an array over the rows, or binary values
        as a list of bytes}.

        The rows of a column may lie in any groups; a column without any comes along for others to find.
        """
        return self.hold(key, wanted, first).read()

    def hold(self, key: str, wanted: Mapping[str, Sequence[int]], first: int = 0, count: int | None = None) -> Held:
        """The same rows, in memory for as long as the answer is. `IndexError` where one is not below `count`."""
        ends = [_bounds(rows) for rows in wanted.values() if len(rows)]
        if not ends:
            return Held({}, first, (), {})
        low, high = min(ends)[0], max(end for _, end in ends)
        if count is not None and not 0 <= low <= high < count:
            raise IndexError(f"rows {low} to {high} of {count}")
        starts, columns = self.group_starts(key), tuple(wanted)
        groups = {bisect_right(starts, first + low) - 1, bisect_right(starts, first + high) - 1}
        if len(groups) > 1:
            groups = {bisect_right(starts, first + row) - 1 for rows in wanted.values() for row in rows}
        return Held(wanted, first, starts, {group: self._group(key, group, columns) for group in sorted(groups)})

    def group_starts(self, key: str) -> Sequence[int]:
        """The first row of every row group of an object."""
        if key not in self._starts:
            self._starts[key] = array("q", starts_of(self._file(key).file.metadata))
        return self._starts[key]

    def _file(self, key: str) -> _File:
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
        opened = _File(threading.Lock(), self._root.parquet(key))
        with self._lock:
            file = self._files.setdefault(key, opened)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _group(self, key: str, group: int, columns: tuple[str, ...]) -> dict[str, _Column]:
        name = (key, group, columns)
        with self._lock:
            if name in self._groups:
                self._groups.move_to_end(name)
                return self._groups[name][0]
        file = self._file(key)
        with file.reading:  # one reader a file: a second thread that wants this group finds it in the pool
            with self._lock:
                if name in self._groups:
                    return self._groups[name][0]
            table = self._read(file.file, key, group, columns)
            if missing := [column for column in columns if column not in table.column_names]:
                raise Mismatch(f"{self._root.url}/{key} has no column {missing[0]!r}")
            decoded = {column: _decoded(table[column]) for column in columns}
        with self._lock:
            self._groups[name] = (decoded, table.nbytes)
            self._bytes += table.nbytes
            while self._bytes > self._limit and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1][1]
        return decoded

    def _read(self, file: pq.ParquetFile, key: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        try:
            return file.read_row_group(group, columns=list(columns), use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            where = f"{self._root.url}/{key}, row group {group}: {error}"
            if "AWS Error" in str(error):  # Arrow tells a store that fails from bytes that are wrong by words only
                raise StoreError(f"{where}; is the object store up?") from error
            raise Corrupt(f"{where}; use the version before") from error


def _bounds(rows: Sequence[int]) -> tuple[int, int]:
    """The first and the last of some rows, of which there is one at least."""
    ordered = len(rows) == 1 or (isinstance(rows, range) and rows.step > 0)
    return (rows[0], rows[-1]) if ordered else (min(rows), max(rows))


def starts_of(footer: pq.FileMetaData) -> list[int]:
    """The first row of every row group."""
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    return [*itertools.accumulate(sizes[:-1], initial=0)]


def _decoded(column: pa.ChunkedArray) -> _Column:
    """Numbers and binary values over the memory that they were read into. Arrow's is of huge pages: copied into others
    the pool takes 25 MB less, and a row costs 40 to 60 us more to read."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return _numbers(array.flatten()).reshape(len(array), array.type.list_size)
    if pa.types.is_fixed_size_binary(array.type):
        width, first = array.type.byte_width, array.offset
        return _Binary(memoryview(array.buffers()[1]), [width * (first + i) for i in range(len(array) + 1)])
    if pa.types.is_binary(array.type):
        _, offsets, data = array.buffers()
        edges = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        return _Binary(memoryview(data), edges.tolist())
    return _numbers(array)


def _numbers(array: pa.Array) -> np.ndarray:
    """Arrow's own way would load pandas, 45 MB in every process that reads; bits it cannot hand over otherwise."""
    return (
        np.asarray(array.to_numpy(zero_copy_only=False)) if pa.types.is_boolean(array.type) else np.from_dlpack(array)
    )


def _values(column: _Column, rows: Sequence[int], first: int) -> Any:
    """Those rows of a group whose first row is `first`; nothing that is returned shares the pool's memory."""
    if isinstance(column, _Binary):
        data, edges = column
        return [bytes(data[edges[row - first] : edges[row - first + 1]]) for row in rows]
    if isinstance(rows, range) and rows.step == 1:
        return column[rows.start - first : rows.stop - first].copy()
    return column[[row - first for row in rows]]
