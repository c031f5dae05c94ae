"""Random rows of Parquet objects at the price of sequential ones: a bounded pool of decoded row groups."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.errors import Corrupt
from upvla.store import Store


class RowGroupPool:
    """Rows of Parquet objects, through a pool of decoded row groups bounded in bytes; safe for threads."""

    def __init__(self, root: Store, pool_mb: int):
        self._root, self._limit = root, pool_mb << 20
        self._lock = threading.Lock()
        self._files: dict[str, tuple[threading.Lock, pq.ParquetFile, np.ndarray]] = {}
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...]], tuple[dict[str, Any], int]] = OrderedDict()
        self._bytes = 0

    def take(self, key: str, rows: Sequence[int], columns: tuple[str, ...]) -> dict[str, Any]:
        """Column -> numbers as an array over `rows`, binary values as a list of bytes. Rows may lie in any groups."""
        starts = self._file(key)[2]
        numbers = np.searchsorted(starts, rows, side="right") - 1
        parts = {int(group): self._group(key, int(group), columns) for group in dict.fromkeys(numbers.tolist())}
        places = [(parts[int(group)], row - int(starts[group])) for group, row in zip(numbers, rows, strict=True)]
        return {name: _gather([(part[name], place) for part, place in places]) for name in columns}

    def group_starts(self, key: str) -> np.ndarray:
        """i64[groups]: the first row of every row group of an object."""
        return self._file(key)[2]

    def _file(self, key: str) -> tuple[threading.Lock, pq.ParquetFile, np.ndarray]:
        with self._lock:
            if key not in self._files:
                file = self._root.parquet(key)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                self._files[key] = (threading.Lock(), file, np.cumsum([0, *sizes[:-1]]))
            return self._files[key]

    def _group(self, key: str, group: int, columns: tuple[str, ...]) -> dict[str, Any]:
        name = (key, group, columns)
        with self._lock:
            if name in self._groups:
                self._groups.move_to_end(name)
                return self._groups[name][0]
        reading, _, _ = self._file(key)
        with reading:  # one reader a file: a second thread that wants this group finds it in the pool
            with self._lock:
                if name in self._groups:
                    return self._groups[name][0]
            table = self._read(key, group, columns)
            decoded = {column: _decoded(table[column]) for column in columns}
        with self._lock:
            self._groups[name] = (decoded, table.nbytes)
            self._bytes += table.nbytes
            while self._bytes > self._limit and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1][1]
        return decoded

    def _read(self, key: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        try:
            return self._file(key)[1].read_row_group(group, columns=list(columns), use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise Corrupt(f"{self._root.url}/{key}, row group {group}: {error}; use the version before") from error


def _decoded(column: pa.ChunkedArray) -> Any:
    """Binary columns stay Arrow arrays (one buffer); numbers become arrays over the same memory."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    if pa.types.is_binary(array.type) or pa.types.is_fixed_size_binary(array.type):
        return array
    return array.to_numpy()


def _gather(places: Sequence[tuple[Any, int]]) -> Any:
    values = [array[place] for array, place in places]
    return [value.as_py() for value in values] if isinstance(values[0], pa.Scalar) else np.stack(values)
