"""What a model computes once from a dataset and every epoch reads: image codes, as sidecar tables of the shards.

    <dataset>/derived/codes-<tokenizer_id>/<shard>.parquet    row i belongs to row i of data/<shard>.parquet

A sidecar is a function of its shard, of the tokenizer and of the resize, which is in its metadata: an appended version
encodes only its new shards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.data.rowgroups import RowGroupPool
from upvla.data.table import Dataset
from upvla.errors import Mismatch, NotFound
from upvla.images import Resize, decode_image, resize

Encoder = Callable[[np.ndarray], np.ndarray]  # u8[B,H,W,3] -> integers [B,N]


def encode_codes(
    dataset: Dataset,
    encoder: Encoder,
    *,
    cameras: Sequence[str],
    resize_to: Resize,
    tokenizer_id: str,
    shards: Sequence[str] | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the missing sidecars (of `shards`, by key; all by default) and return the keys written.

    Shards are independent, so several processes may take different ones; two that take the same one agree. Raises
    `Mismatch` at a sidecar that was made of other cameras or with another resize.
    """
    written = []
    todo = [shard for shard in dataset.manifest.shards if shards is None or shard.key in shards]
    for done, shard in enumerate(todo):
        key = _sidecar(tokenizer_id, shard.key)
        if not dataset.root.exists(key):
            with tempfile.TemporaryDirectory(prefix="upvla-codes-") as folder:
                path = Path(folder, "codes.parquet")
                _encode_shard(dataset, shard.key, path, encoder, cameras, resize_to, tokenizer_id, batch)
                dataset.root.upload(path, key)
            written.append(key)
        else:
            require_made_of(dataset, key, cameras, resize_to)
        if progress:
            progress(done + 1, len(todo))
    return written


class CodeTable:
    """Codes of every step of a dataset, read beside it. `NotFound` names the first shard that was not encoded,
    `Mismatch` what was made of other cameras than `cameras` or with another resize than `resize_to`.
    """

    def __init__(
        self, dataset: Dataset, tokenizer_id: str, cameras: Sequence[str], resize_to: Resize, *, pool_mb: int = 128
    ):
        self.dataset, self.tokenizer_id = dataset, tokenizer_id
        self._rows = RowGroupPool(dataset.root, pool_mb)
        present = set(dataset.root.list(f"derived/codes-{tokenizer_id}/"))
        for shard in dataset.manifest.shards:
            if _sidecar(tokenizer_id, shard.key) not in present:
                raise NotFound(
                    f"{dataset.root.url}/{shard.key} has no image codes of tokenizer {tokenizer_id}; encode it first"
                )
        schema = require_made_of(dataset, _sidecar(tokenizer_id, dataset.manifest.shards[0].key), cameras, resize_to)
        self.cameras = tuple(name.removeprefix("codes_") for name in schema.names)
        self.num_codes = int(schema.field(0).type.list_size)

    def get(self, episode: int, steps: Sequence[int], camera: str) -> np.ndarray:
        """Codes of one camera at steps of one recording: i64[K,N]."""
        if camera not in self.cameras:
            raise Mismatch(f"tokenizer {self.tokenizer_id} encoded cameras {self.cameras}, not {camera!r}")
        row = self.dataset.episodes[episode]
        key, column = _sidecar(self.tokenizer_id, row.shard), f"codes_{camera}"
        found = self._rows.take(key, {column: steps}, row.row0)
        return np.asarray(found[column], np.int64)


def require_made_of(dataset: Dataset, key: str, cameras: Sequence[str], resize_to: Resize) -> pa.Schema:
    """Schema of a sidecar, whose columns are called `<what>_<camera>`; `Mismatch` unless all `cameras` are in it and
    their frames were resized as `resize_to` says: its name tells of the weights alone.
    """
    schema = dataset.root.parquet(key).schema_arrow
    made = Resize.model_validate_json(schema.metadata[b"resize"])
    held = [name.partition("_")[2] for name in schema.names]
    if made != resize_to or not set(cameras) <= set(held):
        raise Mismatch(
            f"{dataset.root.url}/{key} was made of cameras {held} with resize ({made}), the model asks for "
            f"{list(cameras)} with ({resize_to}): set the model's back to those, or delete "
            f"{dataset.root.url}/{key.rpartition('/')[0]} and {dataset.store.url}/steps/encode and encode again"
        )
    return schema


def _sidecar(tokenizer_id: str, shard: str) -> str:
    return f"derived/codes-{tokenizer_id}/{shard.rpartition('/')[2]}"


def _encode_shard(
    dataset: Dataset,
    shard: str,
    path: Path,
    encoder: Encoder,
    cameras: Sequence[str],
    resize_to: Resize,
    tokenizer_id: str,
    batch: int,
) -> None:
    """One sidecar, with the row groups of its shard."""
    frames = dataset.root.parquet(shard)
    writer: pq.ParquetWriter | None = None
    for group in range(frames.metadata.num_row_groups):
        table = frames.read_row_group(group, columns=[f"image_{camera}" for camera in cameras])
        columns = {}
        for camera in cameras:
            encoded = table[f"image_{camera}"].combine_chunks()
            codes = [
                np.asarray(encoder(np.stack([resize(decode_image(frame.as_py()), resize_to) for frame in part])))
                for part in (encoded[start : start + batch] for start in range(0, len(encoded), batch))
            ]
            columns[f"codes_{camera}"] = _code_column(np.concatenate(codes), tokenizer_id)
        if writer is None:
            metadata = {"resize": resize_to.model_dump_json(), "tokenizer": tokenizer_id}
            fields = [pa.field(name, array.type, nullable=False) for name, array in columns.items()]
            schema = pa.schema(fields, metadata)
            writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, store_schema=True)
        writer.write_table(
            pa.Table.from_arrays(list(columns.values()), schema=writer.schema), row_group_size=len(table)
        )
    assert writer is not None
    writer.close()


def _code_column(codes: np.ndarray, tokenizer_id: str) -> pa.Array:
    """Integers [T,N] -> fixed-size lists of uint16."""
    if codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max:
        raise Mismatch(f"tokenizer {tokenizer_id} gave code {codes.max()}, a table holds 0 to 65535")
    kind = pa.list_(pa.field("element", pa.uint16(), nullable=False), codes.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).ravel()), type=kind)
