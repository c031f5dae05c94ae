"""A dataset version as a LeRobot v3.0 data set of pictures, for everybody's tools; pyarrow only.

https://huggingface.co/docs/lerobot/lerobot-dataset-v3 : data/chunk-000/file-000.parquet with many episodes a file,
meta/info.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet, meta/stats.json. Encoded frames are copied
as they are. What LeRobot has no field for (the action space, where it came from) lies under "upvla" in info.json, and
upvla's own reader takes it from there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upvla.data.table import Dataset, EpisodeRow
from upvla.errors import AlreadyExists, ConfigError
from upvla.images import decode_image
from upvla.store import Store, content_hash

_FILE_BYTES = 100 << 20
_UNSAID = "no instruction"
_STATS_FRAMES = 32  # an episode's frames that its picture statistics are taken from
_Statistics = dict[str, dict[str, list[Any]]]


def export_lerobot(
    dataset: Dataset, target: Store, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write every recording of the version under `target`, which must be empty. Returns counts.

    A step belongs to the first of its spans (the format has one task a step).
    """
    manifest = dataset.manifest
    if target.list():
        raise AlreadyExists(f"{target.url} is not empty; export into a new folder")
    if not manifest.action_space.dims:
        raise ConfigError(f"{manifest.dataset} has no actions, LeRobot's format needs them")
    rates = {row.rate_hz for row in dataset.episodes}
    if len(rates) != 1:
        raise ConfigError(f"{manifest.dataset} mixes rates {sorted(rates)} Hz, a LeRobot data set has one")
    writer = _Writer(dataset, target, rates.pop())
    for number in range(len(dataset.episodes)):
        writer.add(number)
        if progress:
            progress(number + 1, len(dataset.episodes))
    return writer.finish()


class _Writer:
    def __init__(self, dataset: Dataset, target: Store, rate_hz: float):
        self._dataset, self._target, self._rate_hz = dataset, target, rate_hz
        self._cameras = dataset.manifest.cameras
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[_Statistics] = []
        self._pending: list[pa.Table] = []
        self._bytes = self._file = self._rows = 0
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, number: int) -> None:
        row = self._dataset.episodes[number]
        images = [f"image_{camera}" for camera in self._cameras]
        found = self._dataset.read(number, range(row.length), ["action", "state", "timestamp", *images])
        tasks = self._task_of_each_step(row)
        columns: dict[str, pa.Array] = {}
        for camera, name in zip(self._cameras, images, strict=True):
            frames = [{"bytes": data, "path": f"frame-{step:06d}.png"} for step, data in enumerate(found[name])]
            columns[f"observation.images.{camera}"] = pa.array(frames, _PICTURE)
            self._shapes.setdefault(camera, decode_image(found[name][0]).shape)
        for name, values in (("observation.state", found["state"]), ("action", found["action"])):
            kind = pa.list_(pa.float32(), values.shape[1])
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), type=kind)
        steps = np.arange(row.length)
        times = (found["timestamp"] - found["timestamp"][0]).astype(np.float32)
        counters = {"timestamp": times, "frame_index": steps, "episode_index": np.full(row.length, number)}
        counters |= {"index": self._rows + steps, "task_index": np.array(tasks)}
        columns |= {name: pa.array(values) for name, values in counters.items()}
        stats = {name: _figures(values) for name, values in counters.items()}
        stats |= {
            name: _figures(found[short]) for name, short in (("observation.state", "state"), ("action", "action"))
        }
        stats |= {f"observation.images.{c}": _picture_figures(found[f"image_{c}"]) for c in self._cameras}
        self._stats.append(stats)
        names = list(self._tasks)
        self._episodes.append(
            {
                "episode_index": number,
                "tasks": [names[task] for task in dict.fromkeys(tasks)],
                "length": row.length,
                "data/chunk_index": 0,
                "data/file_index": self._file,
                "dataset_from_index": self._rows,
                "dataset_to_index": self._rows + row.length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{name}/{key}": value for name, part in stats.items() for key, value in part.items()},
            }
        )
        table = pa.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": self._features()}})}
        )
        self._pending.append(table)
        self._rows, self._bytes = self._rows + row.length, self._bytes + table.nbytes
        if self._bytes >= _FILE_BYTES:
            self._flush()

    def finish(self) -> dict[str, Any]:
        self._flush()
        tasks = pa.table({"task_index": list(self._tasks.values()), "task": list(self._tasks)})
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(_TASKS_AS_PANDAS)})
        self._put("meta/tasks.parquet", [tasks])
        self._put("meta/episodes/chunk-000/file-000.parquet", [pa.Table.from_pylist(self._episodes)])
        self._target.write_json("meta/stats.json", _merged(self._stats))
        manifest = self._dataset.manifest
        info = {
            "codebase_version": "v3.0",
            "robot_type": self._dataset.episodes[0].embodiment,
            "total_episodes": len(self._episodes),
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(self._rate_hz) if self._rate_hz == int(self._rate_hz) else self._rate_hz,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": None,
            "features": self._lerobot_features(),
            "upvla": {
                "dataset": f"{manifest.dataset}@{manifest.version}",
                "content_id": manifest.content_id,
                "action_space": manifest.action_space.to_json(),
            },
        }
        self._target.write_json("meta/info.json", info)  # last: without it nothing is a data set
        return {"recordings": len(self._episodes), "steps": self._rows, "files": self._file, "id": content_hash(info)}

    def _flush(self) -> None:
        if self._pending:
            self._put(f"data/chunk-000/file-{self._file:03d}.parquet", self._pending)
            self._file += 1
        self._pending, self._bytes = [], 0

    def _put(self, key: str, tables: list[pa.Table]) -> None:
        """One row group a table, so that an episode can be read alone."""
        with tempfile.TemporaryDirectory(prefix="upvla-export-") as folder:
            path = Path(folder, "table.parquet")
            with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=len(table))
            self._target.upload(path, key)

    def _task_of_each_step(self, row: EpisodeRow) -> list[int]:
        texts = [_UNSAID] * row.length
        for span in reversed(row.spans):  # the first one wins
            texts[span.start : span.end] = [span.text] * (span.end - span.start)
        return [self._tasks.setdefault(text, len(self._tasks)) for text in texts]

    def _lerobot_features(self) -> dict[str, Any]:
        manifest = self._dataset.manifest
        pictures = {
            f"observation.images.{camera}": {
                "dtype": "image",
                "shape": list(self._shapes[camera]),
                "names": ["height", "width", "channels"],
            }
            for camera in self._cameras
        }
        widths = manifest.options["columns"]
        names = [dim.name for dim in manifest.action_space.dims]
        counters = {"timestamp": "float32"} | dict.fromkeys(
            ("frame_index", "episode_index", "index", "task_index"), "int64"
        )
        return {
            **pictures,
            "observation.state": {"dtype": "float32", "shape": [widths["state"]], "names": None},
            "action": {"dtype": "float32", "shape": [widths["action"]], "names": names},
            **{name: {"dtype": kind, "shape": [1], "names": None} for name, kind in counters.items()},
        }

    def _features(self) -> dict[str, Any]:
        """As the `datasets` library types the columns."""
        described: dict[str, Any] = {}
        for name, feature in self._lerobot_features().items():
            if feature["dtype"] == "image":
                described[name] = {"_type": "Image"}
            elif feature["shape"] == [1]:
                described[name] = {"dtype": feature["dtype"], "_type": "Value"}
            else:
                inner = {"dtype": "float32", "_type": "Value"}
                described[name] = {"feature": inner, "length": feature["shape"][0], "_type": "List"}
        return described


_TASKS_AS_PANDAS = {
    "index_columns": ["task"],  # LeRobot looks instructions up in the frame's index
    "column_indexes": [],
    "columns": [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ],
}
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _figures(values: np.ndarray) -> dict[str, list[Any]]:
    """LeRobot's statistics of one episode's feature: [T] or [T,D] -> lists of D."""
    wide = values.reshape(len(values), -1).astype(np.float64)
    quantiles = {f"q{q:02d}": np.quantile(wide, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
    found = {"min": wide.min(0), "max": wide.max(0), "mean": wide.mean(0), "std": wide.std(0), **quantiles}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(wide)]}


def _picture_figures(frames: list[bytes]) -> dict[str, list[Any]]:
    """Per channel, in 0..1, of evenly spaced frames: lists shaped [3,1,1]."""
    some = np.linspace(0, len(frames) - 1, min(len(frames), _STATS_FRAMES)).astype(int)
    pixels = np.concatenate([decode_image(frames[i])[::4, ::4].reshape(-1, 3) for i in some.tolist()]) / 255
    found = _figures(pixels)
    return {k: v if k == "count" else [[[channel]] for channel in v] for k, v in found.items()} | {"count": [len(some)]}


def _merged(episodes: list[_Statistics]) -> Mapping[str, Any]:
    """Over all episodes; quantiles as LeRobot merges them, weighted by count."""
    merged: dict[str, Any] = {}
    for name in episodes[0]:
        parts = {key: np.array([episode[name][key] for episode in episodes], np.float64) for key in episodes[0][name]}
        count = parts["count"].reshape(-1, *[1] * (parts["mean"].ndim - 1))
        weight = count / count.sum()
        mean = (parts["mean"] * weight).sum(0)
        variance = ((parts["std"] ** 2 + (parts["mean"] - mean) ** 2) * weight).sum(0)
        merged[name] = {
            "min": parts["min"].min(0),
            "max": parts["max"].max(0),
            "mean": mean,
            "std": np.sqrt(variance),
            **{key: (value * weight).sum(0) for key, value in parts.items() if key.startswith("q")},
        }
        merged[name] = {key: value.tolist() for key, value in merged[name].items()} | {"count": [int(count.sum())]}
    return merged
