"""Patch features of a frozen understanding encoder, made once and read in place of frames.

    <dataset>/derived/features-<tower_id>/<shard>.parquet    row i belongs to row i of data/<shard>.parquet

Half precision, [P,D] a frame and camera. A sidecar is a function of its shard (named by its content), of the tower and
of the resize, which is in its metadata.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.data.derived import require_made_of
from upvla.data.rowgroups import RowGroupPool
from upvla.data.table import Dataset
from upvla.errors import NotFound
from upvla.images import Resize, decode_image, resize

Tower = Callable[[np.ndarray], np.ndarray]  # u8[B,H,W,3] -> f16[B,P,D]


def encode_features(
    dataset: Dataset,
    tower: Tower,
    *,
    cameras: Sequence[str],
    resize_to: Resize,
    tower_id: str,
    shards: Sequence[str] | None = None,
    batch: int = 32,
) -> list[str]:
    """Write the missing sidecars (of `shards`, by key; all by default) and return the keys written. Raises `Mismatch`
    at one that was made of other cameras or with another resize.
    """
    written = []
    for shard in (ref.key for ref in dataset.manifest.shards if shards is None or ref.key in shards):
        key = _sidecar(tower_id, shard)
        if not dataset.root.exists(key):
            with tempfile.TemporaryDirectory(prefix="upvla-features-") as folder:
                path = Path(folder, "features.parquet")
                _encode_shard(dataset, shard, path, tower, cameras, resize_to, batch)
                dataset.root.upload(path, key)
            written.append(key)
        else:
            require_made_of(dataset, key, cameras, resize_to)
    return written


class FeatureTable:
    """Features of every step of a dataset, read beside it. Raises what `CodeTable` does."""

    def __init__(
        self, dataset: Dataset, tower_id: str, cameras: Sequence[str], resize_to: Resize, *, pool_mb: int = 256
    ) -> None:
        self.dataset, self.tower_id = dataset, tower_id
        self._rows = RowGroupPool(dataset.root, pool_mb)
        present = set(dataset.root.list(f"derived/features-{tower_id}/"))
        for shard in dataset.manifest.shards:
            if _sidecar(tower_id, shard.key) not in present:
                raise NotFound(
                    f"{dataset.root.url}/{shard.key} has no patch features of tower {tower_id}; encode it first"
                )
        schema = require_made_of(dataset, _sidecar(tower_id, dataset.manifest.shards[0].key), cameras, resize_to)
        self.shape = (int(schema.metadata[b"patches"]), int(schema.metadata[b"width"]))

    def get(self, episode: int, step: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """camera -> f32[P,D] at one step of one recording."""
        row = self.dataset.episodes[episode]
        columns = tuple(f"features_{camera}" for camera in cameras)
        found = self._rows.take(_sidecar(self.tower_id, row.shard), dict.fromkeys(columns, (step,)), row.row0)
        return {
            camera: np.frombuffer(found[column][0], np.float16).astype(np.float32).reshape(self.shape)
            for camera, column in zip(cameras, columns, strict=True)
        }


def _encode_shard(
    dataset: Dataset,
    shard: str,
    path: Path,
    tower: Tower,
    cameras: Sequence[str],
    resize_to: Resize,
    batch: int,
) -> None:
    """One sidecar, with the row groups of its shard: at no time is more than a row group's features in memory."""
    frames = dataset.root.parquet(shard)
    writer: pq.ParquetWriter | None = None
    for group in range(frames.metadata.num_row_groups):
        table = frames.read_row_group(group, columns=[f"image_{camera}" for camera in cameras])
        columns, shape = {}, (0, 0)
        for camera in cameras:
            encoded = table[f"image_{camera}"].combine_chunks()
            parts = [
                np.asarray(tower(np.stack([resize(decode_image(f.as_py()), resize_to) for f in part])), np.float16)
                for part in (encoded[start : start + batch] for start in range(0, len(encoded), batch))
            ]
            shape = parts[0].shape[1:]
            columns[f"features_{camera}"] = pa.array([row.tobytes() for part in parts for row in part], pa.binary())
        if writer is None:
            about = {"resize": resize_to.model_dump_json(), "patches": str(shape[0]), "width": str(shape[1])}
            schema = pa.schema([pa.field(name, pa.binary(), nullable=False) for name in columns], about)
            writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, store_schema=True)
        rows = pa.Table.from_arrays(list(columns.values()), schema=writer.schema)
        writer.write_table(rows, row_group_size=len(table))
    assert writer is not None
    writer.close()


def _sidecar(tower_id: str, shard: str) -> str:
    return f"derived/features-{tower_id}/{shard.rpartition('/')[2]}"
