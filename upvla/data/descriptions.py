"""What a model said of the frames of a dataset, made once and read beside it: the MMU-conditioned action prompt's text.

    <dataset>/derived/descriptions-<id>/<shard>.parquet    row i of the shard's buckets: the first frame's row, its text

Frames are described in buckets: the first of every `every_steps` steps of a recording stands for the others. `id` names
the model and the question. A sidecar is a function of its shard and of that id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.data.table import Dataset
from upvla.errors import NotFound
from upvla.images import Resize, decode_image, resize

Describer = Callable[[np.ndarray], Sequence[str]]  # u8[B,K,H,W,3] -> a text each


def write_descriptions(
    dataset: Dataset,
    describer: Describer,
    *,
    cameras: Sequence[str],
    resize_to: Resize,
    every_steps: int,
    description_id: str,
    shards: Sequence[str] | None = None,
    batch: int = 64,
) -> list[str]:
    """Write the missing sidecars (of `shards`, by key; all by default) and return the keys written."""
    written = []
    for shard in (ref.key for ref in dataset.manifest.shards if shards is None or ref.key in shards):
        key = _sidecar(description_id, shard)
        if dataset.root.exists(key):
            continue
        places = [
            (number, step)
            for number, episode in enumerate(dataset.episodes)
            if episode.shard == shard
            for step in range(0, episode.length, every_steps)
        ]
        texts: list[str] = []
        for start in range(0, len(places), batch):
            frames = [_frames(dataset, *place, cameras, resize_to) for place in places[start : start + batch]]
            texts += describer(np.stack(frames))
        rows = [dataset.episodes[number].row0 + step for number, step in places]
        table = pa.table({"row": pa.array(rows, pa.int64()), "text": pa.array(texts, pa.string())})
        with tempfile.TemporaryDirectory(prefix="upvla-descriptions-") as folder:
            path = Path(folder, "descriptions.parquet")
            pq.write_table(table, path, compression="zstd")
            dataset.root.upload(path, key)
        written.append(key)
    return written


class DescriptionTable:
    """Descriptions of one dataset. `NotFound` names the first shard that was not described."""

    def __init__(self, dataset: Dataset, description_id: str, every_steps: int) -> None:
        self.dataset, self.description_id, self.every_steps = dataset, description_id, every_steps
        present = set(dataset.root.list(f"derived/descriptions-{description_id}/"))
        for shard in dataset.manifest.shards:
            if _sidecar(description_id, shard.key) not in present:
                raise NotFound(
                    f"{dataset.root.url}/{shard.key} has no descriptions {description_id}; describe it first"
                )
        self._texts = cache(self._read)

    def get(self, episode: int, step: int) -> str:
        """What was said of the bucket of `step`."""
        row = self.dataset.episodes[episode]
        return self._texts(row.shard)[row.row0 + step // self.every_steps * self.every_steps]

    def _read(self, shard: str) -> dict[int, str]:
        table = self.dataset.root.parquet(_sidecar(self.description_id, shard)).read()
        return dict(zip(table["row"].to_pylist(), table["text"].to_pylist(), strict=True))


def _frames(dataset: Dataset, episode: int, step: int, cameras: Sequence[str], resize_to: Resize) -> np.ndarray:
    found = dataset.read(episode, [step], [f"image_{camera}" for camera in cameras])
    return np.stack([resize(decode_image(found[f"image_{camera}"][0]), resize_to) for camera in cameras])


def _sidecar(description_id: str, shard: str) -> str:
    return f"derived/descriptions-{description_id}/{shard.rpartition('/')[2]}"
