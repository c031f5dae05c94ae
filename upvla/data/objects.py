"""Parquet objects named by their content: writing any of them, and the index of a shard, a row a recording.

Objects never change, so what this process wrote or read of an index need not be read again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from upvla.data.stats import Summary
from upvla.errors import Corrupt, StoreError
from upvla.store import Store
from upvla.types import ShardRef

_Value = TypeVar("_Value")

SPAN_TYPE = pa.list_(
    pa.struct([("start", pa.int32()), ("end", pa.int32()), ("text", pa.string()), ("task", pa.string())])
)
INDEX_SCHEMA = pa.schema(
    [
        ("episode_id", pa.binary(16)),
        ("source_key", pa.string()),
        ("source_token", pa.string()),
        ("source", pa.string()),
        ("embodiment", pa.string()),
        ("scene", pa.string()),
        ("rate_hz", pa.float64()),
        ("length", pa.int32()),
        ("row0", pa.int64()),
        ("row_groups", pa.list_(pa.int64())),
        ("spans", SPAN_TYPE),
        ("summary", pa.string()),
    ]
)
_ROW = [name for name in INDEX_SCHEMA.names if name != "summary"]  # which is most of an index
_Summaries = dict[str, dict[str, Summary]]  # recording's id -> feature -> what it contributes to the statistics


def put_table(root: Store, folder: str, table: pa.Table) -> ShardRef:
    with scratch(table.nbytes), tempfile.TemporaryDirectory(prefix="upvla-table-") as name:
        path = Path(name, "table.parquet")
        with HashedFile(path) as file:
            pq.write_table(table, file, compression="zstd")
        return put_file(root, folder, path, len(table), file.sha256)


def read_table(root: Store, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A small table, by default with all columns: one request instead of an open file's three."""
    data = root.read(key)
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise Corrupt(f"{root.url}/{key}: {error}; use the version before") from error


class HashedFile(io.BufferedWriter):
    """A new file that is written from one end to the other, and hashed on the way."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self.path = path
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return super().write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def put_file(root: Store, folder: str, path: Path, rows: int, sha256: str) -> ShardRef:
    """Under the name that its content gives; the file itself may be gone afterwards. What lies there already is written
    again: `gc` goes by age, and what an ingest left behind a week ago must not go while its rerun relies on it."""
    ref = ShardRef(f"{folder}/{sha256[:16]}.parquet", rows, path.stat().st_size, sha256)
    root.adopt(path, ref.key)
    return ref


@contextmanager
def scratch(num_bytes: int) -> Iterator[None]:
    """While a table on its way to the store is written to this machine: without room for it, `StoreError` says so."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{tempfile.gettempdir()}: {error}; tables are written there first, this one needs about "
            f"{max(1, num_bytes >> 20)} MB: free some space, or point TMPDIR elsewhere"
        ) from error


def refs(values: Iterable[Mapping[str, Any]]) -> tuple[ShardRef, ...]:
    return tuple(ShardRef(**value) for value in values)


# ------------------------------------------------------------------------------------------------- indexes of shards


class Kept(Generic[_Value]):
    """The latest values, as many as hold `limit` rows together."""

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._values: OrderedDict[tuple[str, str], tuple[_Value, int]] = OrderedDict()
        self._held = 0

    def get(self, root: Store, key: str) -> _Value | None:
        with self._lock:
            found = self._values.get((root.url, key))
            return found[0] if found else None

    def put(self, root: Store, key: str, value: _Value, rows: int) -> _Value:
        with self._lock:
            self._held += rows - self._values.get((root.url, key), (value, 0))[1]
            self._values[root.url, key] = (value, rows)
            while len(self._values) > 1 and self._held > self._limit:
                self._held -= self._values.popitem(last=False)[1][1]
        return value


_rows: Kept[list[dict[str, Any]]] = Kept(100_000)
_summaries: Kept[_Summaries] = Kept(4_000)  # 14 kB each, and only committers ask for them


def put_index(root: Store, rows: Sequence[Mapping[str, Any]], summaries: _Summaries) -> ShardRef:
    """`rows` are as INDEX_SCHEMA says, but for their summaries."""
    texts = (summaries[row["episode_id"].hex()] for row in rows)
    written = [
        {**row, "summary": json.dumps({name: part.to_json() for name, part in text.items()}, separators=(",", ":"))}
        for row, text in zip(rows, texts, strict=True)
    ]
    ref = put_table(root, "index", pa.Table.from_pylist(written, INDEX_SCHEMA))
    _rows.put(root, ref.key, [dict(row) for row in rows], len(rows))
    _summaries.put(root, ref.key, dict(summaries), len(rows))
    return ref


def read_index(root: Store, ref: ShardRef) -> list[dict[str, Any]]:
    """Rows of one index object, without their summaries; without `row_groups` where an older upvla wrote it."""
    found = _rows.get(root, ref.key)
    return _rows_of(root, ref, read_table(root, ref.key, _ROW)) if found is None else found


def read_summaries(root: Store, ref: ShardRef, ids: Iterable[str]) -> _Summaries:
    """Of these recordings of one index object."""
    known = _summaries.get(root, ref.key)
    if known is not None:
        return {identity: known[identity] for identity in ids}
    table = read_table(root, ref.key, ["episode_id", "summary"])
    places = {identity.hex(): place for place, identity in enumerate(table["episode_id"].to_pylist())}
    texts = {identity: table["summary"][places[identity]].as_py() for identity in ids}
    return {
        identity: {name: Summary.from_json(part) for name, part in json.loads(text).items()}
        for identity, text in texts.items()
    }


def _rows_of(root: Store, ref: ShardRef, table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select([name for name in _ROW if name in table.column_names]).to_pylist()
    return _rows.put(root, ref.key, rows, len(rows))
