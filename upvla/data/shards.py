"""Recordings into content-named Parquet objects that no version refers to yet; columns in docs/data-format.md."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from upvla.data.identity import Hashing, episode_id, numbers_of
from upvla.data.language import Question, questions
from upvla.data.objects import HashedFile, put_file, put_index, put_table, refs, scratch
from upvla.data.stats import Summary
from upvla.errors import Mismatch
from upvla.images import encode_jpeg
from upvla.store import Store
from upvla.types import ActionSpace, Episode, ShardRef, Talk

_FEATURES = ("action", "state")  # whose statistics are kept
_ARRAY_BYTES = 1 << 31  # an Arrow array of binary values holds less

QA_SCHEMA = pa.schema(
    [
        ("episode_id", pa.binary(16)),
        ("step", pa.int32()),
        ("topic", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("template_split", pa.string()),
        ("more", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
    ]
)


class Rejection(NamedTuple):
    """A recording that is not in the table, and why. `token` is the source's, to notice a repair."""

    key: str
    reason: str
    detail: str
    token: str
    episode_id: str = ""  # of a recording that is in a shard and was removed


class Layout(BaseModel):
    """Target sizes of what is written: row groups are the unit of reading, shards of storing and encoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row_group_bytes: int = Field(default=1 << 20, gt=0)
    max_row_group_bytes: int = Field(default=4 << 20, gt=0)
    shard_bytes: int = Field(default=128 << 20, gt=0)


@dataclass(frozen=True)
class Staged:
    """Objects that lie in the store and belong to no version yet; JSON, so that it can travel and be a receipt."""

    shards: tuple[ShardRef, ...]
    index: tuple[ShardRef, ...]
    qa: tuple[ShardRef, ...]
    rejected: tuple[Rejection, ...]
    action_space: ActionSpace | None
    columns: Mapping[str, int]  # numeric column -> width
    cameras: tuple[str, ...]
    hashing: Hashing = "blake2b"  # receipts that do not say are of that time

    @property
    def keys(self) -> list[str]:
        """Of the objects that it stands for."""
        return [ref.key for ref in (*self.shards, *self.index, *self.qa)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rejected": [row._asdict() for row in self.rejected]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Staged:
        space = value["action_space"]
        return Staged(
            shards=refs(value["shards"]),
            index=refs(value["index"]),
            qa=refs(value["qa"]),
            rejected=tuple(Rejection(**row) for row in value["rejected"]),
            action_space=ActionSpace.from_json(space) if space else None,
            columns=dict(value["columns"]),
            cameras=tuple(value["cameras"]),
            hashing=value.get("hashing", "blake2b"),
        )


def stage(
    root: Store,
    episodes: Iterable[tuple[Episode, str] | Rejection],
    *,
    qa_per_episode: int = 0,
    layout: Layout | None = None,
    hashing: Hashing = "blake3",
    encoded: Callable[[Episode, str], None] | None = None,
) -> Staged:
    """Write checked recordings (each with its source token) as shards under a dataset's `root`; nothing becomes
    visible. Memory holds one recording's pictures and a row group of encoded ones, whatever the number; a full shard
    travels to the store while the next is made. Equal input gives equal objects under equal names. `encoded` is handed
    every recording as soon as its frames are."""
    layout = layout or Layout()
    rejected, asked = list[Rejection](), list[Question]()
    scenes = list[tuple[str, np.ndarray, str]]()

    def recordings() -> Iterator[_Recording]:
        for item in episodes:
            if isinstance(item, Rejection):
                rejected.append(item)
                continue
            episode, token = item
            frames = {camera: _encoded(images) for camera, images in episode.images.items()}
            if encoded:
                encoded(replace(episode, images=frames), token)
            yield _Recording(replace(episode, images={}), token, {c: _Joined.of(each) for c, each in frames.items()})

    with _ShardWriter(root, layout, hashing) as writer:
        for bunch in _bunches(recordings(), layout.max_row_group_bytes):
            for recording in bunch:
                episode, identity = recording.episode, writer.add(recording)
                asked.extend(_asked(identity, talk) for talk in episode.talks)
                if episode.scene_state is not None:
                    scenes.append((identity, episode.scene_state, episode.scene))
        shards, index = writer.finish()
    asked += questions(scenes, qa_per_episode) if qa_per_episode else []
    return Staged(
        shards=shards,
        index=index,
        qa=(put_table(root, "qa", _qa_table(asked)),) if asked else (),
        rejected=tuple(rejected),
        action_space=writer.action_space,
        columns=writer.columns,
        cameras=writer.cameras,
        hashing=hashing,
    )


def _encoded(frames: np.ndarray | Sequence[bytes]) -> Sequence[bytes]:
    return [encode_jpeg(frame) for frame in frames] if isinstance(frames, np.ndarray) else frames


class _Joined(NamedTuple):
    """One camera's frames end to end, and where each of them begins and the last ends."""

    data: bytes
    edges: np.ndarray  # i64[T+1]

    @staticmethod
    def of(frames: Sequence[bytes]) -> _Joined:
        return _Joined(b"".join(frames), np.cumsum([0, *map(len, frames)]))


class _Recording(NamedTuple):
    """On its way into a shard; `episode` has no images any more."""

    episode: Episode
    token: str
    frames: Mapping[str, _Joined]

    @property
    def num_bytes(self) -> int:
        """Of its frames."""
        return sum(len(joined.data) for joined in self.frames.values())


def _bunches(recordings: Iterable[_Recording], num_bytes: int) -> Iterator[list[_Recording]]:
    """Neighbours whose frames have `num_bytes` together. Encoding a recording drives everything else out of the
    processor's caches, so what comes after it costs less for some at a time: 3 % of an ingest."""
    bunch, held = list[_Recording](), 0
    for recording in recordings:
        bunch.append(recording)
        held += recording.num_bytes
        if held >= num_bytes:
            yield bunch
            bunch, held = [], 0
    yield bunch


class _ShardWriter:
    """Rolls shards at whole recordings and packs row groups; an oversized recording spans several row groups."""

    def __init__(self, root: Store, layout: Layout, hashing: Hashing):
        self.action_space: ActionSpace | None = None
        self.columns: dict[str, int] = {}
        self.cameras: tuple[str, ...] = ()
        self._root, self._layout, self._hashing = root, layout, hashing
        self._shards: list[Future[ShardRef]] = []
        self._index: list[ShardRef] = []
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="upvla-shards")
        with scratch(layout.shard_bytes):
            self._folder = tempfile.TemporaryDirectory(prefix="upvla-shard-")
        self._file: HashedFile
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._pending: list[pa.Table] = []
        self._pending_bytes = self._shard_bytes = self._row = 0
        self._index_rows: list[dict[str, Any]] = []
        self._summed: dict[str, dict[str, np.ndarray]] = {}

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._sender.shutdown()
        self._folder.cleanup()

    def finish(self) -> tuple[tuple[ShardRef, ...], tuple[ShardRef, ...]]:
        """Shards and their indexes, all of them in the store."""
        if self._index_rows:
            self._finish_shard()
        return tuple(shard.result() for shard in self._shards), tuple(self._index)

    def add(self, recording: _Recording) -> str:
        """Its id, once it is on its way into a shard."""
        episode = recording.episode
        identity = episode_id(episode, {c: joined.data for c, joined in recording.frames.items()}, self._hashing)
        numbers = numbers_of(episode)
        table = self._table(episode, numbers, recording.frames, identity)
        size = recording.num_bytes + sum(values.nbytes for values in numbers.values())
        if self._pending_bytes + size > self._layout.max_row_group_bytes:
            self._flush()
        pieces = -(-size // self._layout.max_row_group_bytes)
        rows = -(-len(table) // pieces)
        begun: list[int] = []
        for start in range(0, len(table), rows):
            if start:
                self._flush()
            if not self._pending:
                begun.append(self._row + start)
            self._pending.append(table.slice(start, rows))
        self._pending_bytes += size // pieces
        self._shard_bytes += size
        self._index_rows.append(
            {
                "episode_id": bytes.fromhex(identity),
                "source_key": episode.id,
                "source_token": recording.token,
                "source": episode.source,
                "embodiment": episode.embodiment,
                "scene": episode.scene,
                "rate_hz": episode.rate_hz,
                "length": len(episode),
                "row0": self._row,
                "row_groups": begun,
                "spans": [vars(span) for span in episode.spans],
            }
        )
        self._summed[identity] = {name: numbers[name] for name in _FEATURES if name in numbers}
        self._row += len(episode)
        if self._pending_bytes >= self._layout.row_group_bytes:
            self._flush()
        if self._shard_bytes >= self._layout.shard_bytes:
            self._finish_shard()
        return identity

    def _table(
        self, episode: Episode, numbers: Mapping[str, np.ndarray], frames: Mapping[str, _Joined], identity: str
    ) -> pa.Table:
        steps, columns = len(episode), {name: int(values.shape[1]) for name, values in numbers.items()}
        if self.action_space is None:
            self.action_space, self.columns, self.cameras = episode.action_space, columns, tuple(frames)
        self.action_space.require_equal(episode.action_space, ours="the dataset", theirs=episode.id)
        if (columns, tuple(frames)) != (self.columns, self.cameras):
            raise Mismatch(
                f"{episode.id} has {columns} and cameras {list(frames)}, recordings before it had "
                f"{self.columns} and {list(self.cameras)}; import them as another dataset"
            )
        arrays: dict[str, pa.Array] = {
            "episode_id": pa.array([bytes.fromhex(identity)] * steps, pa.binary(16)),
            "step": pa.array(np.arange(steps, dtype=np.int32)),
            "timestamp": pa.array(episode.timestamps.astype(np.float64)),
        }
        for name, values in numbers.items():
            flat = pa.array(np.ascontiguousarray(values).ravel())
            kind = pa.list_(pa.field("element", pa.float32(), nullable=False), values.shape[1])
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, type=kind)
        for camera, joined in frames.items():
            arrays[f"image_{camera}"] = _binary(joined)
        if self._schema is None:
            fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
            self._schema = pa.schema(
                fields, {"action_space": json.dumps(episode.action_space.to_json(), sort_keys=True)}
            )
        return pa.Table.from_arrays(list(arrays.values()), schema=self._schema)

    def _flush(self) -> None:
        if self._pending:
            group = pa.concat_tables(self._pending)
            with scratch(self._layout.shard_bytes):
                if self._writer is None:
                    self._file = HashedFile(Path(self._folder.name, f"{len(self._shards)}.parquet"))
                    self._writer = _parquet_writer(self._file, group.schema)
                self._writer.write_table(group, row_group_size=len(group))
        self._pending, self._pending_bytes = [], 0

    def _finish_shard(self) -> None:
        self._flush()
        assert self._writer is not None
        with scratch(self._layout.shard_bytes), self._file:
            self._writer.close()
        if self._shards:
            self._shards[-1].result()  # so that no more than two shards lie on this machine
        self._shards.append(self._sender.submit(self._send, self._file, self._row))
        summaries = {
            identity: {name: Summary.of(values) for name, values in features.items()}
            for identity, features in self._summed.items()
        }
        self._index.append(put_index(self._root, self._index_rows, summaries))
        self._writer, self._index_rows, self._summed, self._row, self._shard_bytes = None, [], {}, 0, 0

    def _send(self, file: HashedFile, rows: int) -> ShardRef:
        ref = put_file(self._root, "data", file.path, rows, file.sha256)
        file.path.unlink(missing_ok=True)
        return ref


def _parquet_writer(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Images plain and uncompressed (they are compressed), numbers byte-split and zstd, statistics only of scalars."""
    names = schema.names
    images = [name for name in names if name.startswith("image_")]
    lists = [f"{field.name}.list.element" for field in schema if pa.types.is_fixed_size_list(field.type)]
    scalars = ["step", "timestamp"]
    return pq.ParquetWriter(
        file,
        schema,
        version="2.6",
        data_page_size=1 << 20,
        write_page_checksum=True,
        use_dictionary=["episode_id"],
        column_encoding={"step": "DELTA_BINARY_PACKED"}
        | dict.fromkeys(lists, "BYTE_STREAM_SPLIT")
        | dict.fromkeys(images, "PLAIN"),
        compression=dict.fromkeys(images, "none") | dict.fromkeys([*lists, *scalars, "episode_id"], "zstd"),
        write_statistics=scalars,
        store_schema=True,
    )


def _binary(joined: _Joined) -> pa.Array:
    """Over the same memory; copied if it is too much for one array."""
    data, edges = joined
    if len(data) >= _ARRAY_BYTES:
        return pa.array([data[start:end] for start, end in itertools.pairwise(edges.tolist())], pa.binary())
    begins = pa.py_buffer(edges.astype(np.int32))
    return pa.BinaryArray.from_buffers(pa.binary(), len(edges) - 1, [None, begins, pa.py_buffer(data)])


def _asked(identity: str, talk: Talk) -> Question:
    """A source's own conversation, whose words are for training and validation alike."""
    (question, answer), *more = talk.turns
    return Question(identity, talk.step, talk.topic, question, answer, "both", tuple(more))


def _qa_table(rows: Sequence[Question]) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)]
    columns[0] = [bytes.fromhex(identity) for identity in columns[0]]
    columns[-1] = [[{"question": question, "answer": answer} for question, answer in more] for more in columns[-1]]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, QA_SCHEMA, strict=True)], schema=QA_SCHEMA
    )
