"""LeRobot data sets, formats v2.1 and v3.0, with frames in Parquet or in video files.

    meta/info.json                      codebase_version, fps, features {key: {dtype, shape}}, path templates
    v2.1: meta/{episodes,tasks}.jsonl   one Parquet file (and one mp4 a camera) an episode
    v3.0: meta/tasks.parquet, meta/episodes/chunk-*/file-*.parquet   many episodes a file; an episode's rows are
          [dataset_from_index, dataset_to_index), its frames start at videos/<key>/from_timestamp of an mp4

Encoded frames in Parquet are kept as they are; video is decoded by PyAV and encoded again, frame by frame. Every
frame's own time stamp is compared with the row it is to belong to: a shifted video is a bad episode, not a silent one.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from upvla.data.actions import agreed_space, declared_space, require_rate
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound, UpvlaError
from upvla.images import MAX_PIXELS, encode_jpeg
from upvla.store import Store, content_hash, open_store
from upvla.types import ActionSpace, Episode, Span

_PREFIX = "observation.images."


class LeRobotSource:
    """The episodes of a data set's root folder.

    action_space: the format has no field for it, so it is declared here (data sets that upvla exported carry theirs,
    and another one declared is refused).
    cameras: {name in the table: feature key}; all image and video features by default, under their last word.
    """

    format = "lerobot"

    def __init__(
        self,
        url: str,
        *,
        action_space: str | Mapping[str, Any] | None = None,
        cameras: Mapping[str, str] | None = None,
        state: str = "observation.state",
        action: str = "action",
        embodiment: str = "",
        scene: str = "unknown",
    ):
        self.store = open_store(url)
        self.notes: Mapping[str, int] = {}
        try:
            self.info = self.store.read_json("meta/info.json")
            self.version = str(self.info["codebase_version"])
            self._features = {str(key): dict(feature) for key, feature in self.info["features"].items()}
            self.rate_hz = float(self.info["fps"])
            if not 0 < self.rate_hz < float("inf"):
                raise ValueError(f"fps is {self.rate_hz:g}")
        except NotFound as error:
            raise NotFound(f"{error}: the URL must be the root of a LeRobot data set") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"{url}/meta/info.json is no description of a LeRobot data set: {error!r}") from error
        if not self.version.startswith(("v2.", "v3.")):
            raise ConfigError(f"{url} is LeRobot format {self.version}; v2.1 and v3.0 are read, convert it first")
        self.space = self._space(action_space, action)
        self.cameras = dict(cameras) if cameras else self._all_cameras()
        for key in (state, action, *self.cameras.values()):
            if key not in self._features:
                raise ConfigError(f"{url} has no feature {key!r}; there is: {', '.join(self._features)}")
        self._state, self._action, self.scene = state, action, scene
        self.embodiment = embodiment or str(self.info.get("robot_type") or "unknown")
        self._scratch = tempfile.TemporaryDirectory(prefix="upvla-video-")
        self._videos: dict[str, tuple[str, Path]] = {}  # feature -> (object, file), the last one of each

    @staticmethod
    def recognises(store: Store) -> bool:
        return store.exists("meta/info.json")

    def keys(self) -> Sequence[str]:
        return list(self._episodes)

    def num_steps(self, key: str) -> int:
        return int(self._episodes[key]["length"])

    def token(self, key: str) -> str:
        row = self._episodes[key]
        files = [self._data_key(row), *(self._video_key(row, feature) for feature in self._video_features())]
        options = [self.space.to_json(), self.cameras, self._state, self._action, self.embodiment, self.scene]
        row = json.loads(json.dumps(row, default=str), parse_constant=str)  # columns of others may hold days, or NaN
        return content_hash([row, [self._tokens.get(file, "") for file in files], self._tasks_of(row), options])

    def _tasks_of(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Those that the episode names, so that a new one is nothing to others; all, if one of them is not there."""
        own = set(row.get("tasks") or ())
        named = {index: text for index, text in self._tasks.items() if text in own}
        return named if own and own == set(named.values()) else self._tasks

    def read(self, key: str) -> Episode:
        row = self._episodes[key]
        table, length = self._rows(key, row), int(row["length"])
        self._check_rows(key, row, table)
        times = _column(table, "timestamp", key).to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1)
        if not np.isfinite(times).all():
            step = int(np.argmin(np.isfinite(times)))
            raise BadEpisode("time", f"{key}: timestamp is {times[step]} at step {step}")
        images = {
            name: list(self._video(key, row, feature, times))
            if self._features[feature]["dtype"] == "video"
            else self._pictures(key, table, feature)
            for name, feature in self.cameras.items()
        }
        return Episode(
            id=key,
            source=self.format,
            embodiment=self.embodiment,
            scene=self.scene,
            action_space=self.space,
            rate_hz=self.rate_hz,
            timestamps=times,
            images=images,
            state=_matrix(table, self._state, length, key),
            actions=_matrix(table, self._action, length, key),
            spans=self._spans(key, table),
        )

    # ------------------------------------------------------------------------------------------------- description

    def _space(self, declared: str | Mapping[str, Any] | None, action: str) -> ActionSpace:
        carried = self.info.get("upvla", {}).get("action_space") if isinstance(self.info.get("upvla"), dict) else None
        source = f"LeRobot data set {self.store.url}"
        stated = declared_space(carried, f"{source} (upvla.action_space of meta/info.json)") if carried else None
        space = agreed_space(declared, stated, source)
        require_rate(space, self.rate_hz, source)
        shape = self._features.get(action, {}).get("shape")
        if shape is not None and list(shape) != [len(space)]:
            raise ConfigError(
                f"{self.store.url}: feature {action!r} has shape {list(shape)}, the declared action space {space.name} "
                f"{len(space)} dimensions; declare one for each"
            )
        return space

    def _all_cameras(self) -> dict[str, str]:
        pictures = [key for key, feature in self._features.items() if feature.get("dtype") in ("image", "video")]
        return {key.removeprefix(_PREFIX).replace(".", "_"): key for key in pictures}

    def _video_features(self) -> list[str]:
        return [feature for feature in self.cameras.values() if self._features[feature]["dtype"] == "video"]

    @cached_property
    def _tokens(self) -> dict[str, str]:
        return self.store.tokens()

    @cached_property
    def _episodes(self) -> dict[str, dict[str, Any]]:
        if self.version.startswith("v2."):
            rows = self._lines("meta/episodes.jsonl")
        else:
            rows = []
            for file in self.store.list("meta/episodes/"):
                parquet = self.store.parquet(file)
                columns = [name for name in parquet.schema_arrow.names if not name.startswith("stats/")]
                rows += parquet.read(columns=columns).to_pylist()
        try:
            return {f"episode_{int(row['episode_index']):06d}": row for row in rows if int(row["length"]) >= 0}
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{self.store.url}/meta lists an episode without {error}; repair the data set") from error

    @cached_property
    def _first_rows(self) -> dict[str, int]:
        """v3.0: data file -> the data set's row that it begins with."""
        first: dict[str, int] = {}
        try:
            for row in self._episodes.values():
                file, start = self._data_key(row), int(row["dataset_from_index"])
                first[file] = min(first.get(file, start), start)
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(
                f"{self.store.url}/meta/episodes lists an episode without {error}; repair the data set"
            ) from error
        return first

    @cached_property
    def _tasks(self) -> dict[str, str]:
        """Task index -> instruction."""
        old = self.version.startswith("v2.")
        rows = self._lines("meta/tasks.jsonl") if old else self.store.parquet("meta/tasks.parquet").read().to_pylist()
        texts = {"task", "__index_level_0__"}  # the name that pandas gives an index without one
        try:
            return {str(row["task_index"]): str(next(row[name] for name in row if name in texts)) for row in rows}
        except (KeyError, TypeError, StopIteration) as error:
            raise Corrupt(f"{self.store.url}/meta/tasks has no task_index and text: {error!r}; repair it") from error

    def _lines(self, key: str) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.store.read(key).splitlines() if line.strip()]
        except ValueError as error:
            raise Corrupt(f"{self.store.url}/{key}: {error}; the file was cut or edited") from error

    def _data_key(self, row: Mapping[str, Any]) -> str:
        return self._path("data_path", row, row.get("data/chunk_index"), row.get("data/file_index"))

    def _video_key(self, row: Mapping[str, Any], feature: str) -> str:
        chunk, file = (row.get(f"videos/{feature}/{name}_index") for name in ("chunk", "file"))
        return self._path("video_path", row, chunk, file, video_key=feature)

    def _path(self, template: str, row: Mapping[str, Any], chunk: Any, file: Any, **more: str) -> str:
        number = int(row["episode_index"])
        try:
            where = {"episode_index": number, "episode_chunk": number // int(self.info.get("chunks_size") or 1000)}
            return str(self.info[template]).format(**where, chunk_index=chunk, file_index=file, **more)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise Corrupt(
                f"{self.store.url}: {template} of meta/info.json does not fit episode {number}: {error!r}"
            ) from error

    # ------------------------------------------------------------------------------------------------- one episode

    def _rows(self, key: str, row: Mapping[str, Any]) -> pa.Table:
        """The episode's rows, read through the row groups that hold them."""
        file = self._data_key(row)
        columns = {self._state, self._action, "timestamp", "frame_index", "episode_index", "task_index"}
        columns |= set(self.cameras.values()) - set(self._video_features())
        try:
            parquet = self.store.parquet(file)
            present = [name for name in parquet.schema_arrow.names if name in columns]
            if self.version.startswith("v2."):
                return parquet.read(columns=present)
            start = int(row["dataset_from_index"]) - self._first_rows[file]
            stop = start + int(row["length"])
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            if stop > parquet.metadata.num_rows:
                raise BadEpisode("frame_count", f"{key}: rows [{start}, {stop}) of {file}, which has {sum(sizes)}")
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            part = parquet.read_row_groups(list(range(int(first), int(last) + 1)), columns=present)
            return part.slice(start - int(ends[first] - sizes[first]), stop - start)
        except NotFound as error:
            raise BadEpisode("missing_frame", f"{key}: {error}") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise BadEpisode("unreadable_frame", f"{key}: {self.store.url}/{file}: {error}") from error

    def _check_rows(self, key: str, row: Mapping[str, Any], table: pa.Table) -> None:
        if len(table) != int(row["length"]):
            raise BadEpisode("frame_count", f"{key}: {len(table)} rows, its description says {row['length']}")
        owners = pc.unique(_column(table, "episode_index", key)).to_pylist()
        if owners != [int(row["episode_index"])]:
            raise BadEpisode("frame_count", f"{key}: its rows belong to episodes {owners[:4]}; the index is shifted")
        numbers = _column(table, "frame_index", key).to_numpy(zero_copy_only=False).reshape(-1)
        if not np.array_equal(numbers, np.arange(len(table))):
            raise BadEpisode("frame_count", f"{key}: frame_index is not 0 to {len(table) - 1}")

    def _pictures(self, key: str, table: pa.Table, feature: str) -> list[bytes]:
        frames = []
        for step, value in enumerate(_column(table, feature, key).to_pylist()):
            data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if data is None:
                try:
                    data = self.store.read(str(path))
                except UpvlaError as error:
                    raise BadEpisode("missing_frame", f"{key}: {feature} at step {step}: {error}") from error
            if not isinstance(data, bytes):
                raise BadEpisode("dtype", f"{key}: {feature} at step {step} is {type(data).__name__}, not bytes")
            frames.append(data)
        return frames

    def _video(self, key: str, row: Mapping[str, Any], feature: str, times: np.ndarray) -> Iterator[bytes]:
        file = self._video_key(row, feature)
        start = float(row.get(f"videos/{feature}/from_timestamp") or 0.0)
        if self._videos.get(feature, ("",))[0] != file:
            if feature in self._videos and self._videos[feature][1].is_relative_to(self._scratch.name):
                self._videos.pop(feature)[1].unlink()
            try:
                self._videos[feature] = (file, self.store.local_copy(file, self._scratch.name))
            except NotFound as error:
                raise BadEpisode("missing_frame", f"{key}: {error}") from error
        for frame in decode_video(self._videos[feature][1], start + times, 0.5 / self.rate_hz, f"{key}: {file}"):
            yield encode_jpeg(frame)

    def _spans(self, key: str, table: pa.Table) -> tuple[Span, ...]:
        """Runs of steps with one instruction."""
        if "task_index" not in table.column_names:
            return ()
        tasks = _column(table, "task_index", key).to_numpy(zero_copy_only=False).reshape(-1)
        edges = [0, *(np.flatnonzero(np.diff(tasks)) + 1).tolist(), len(tasks)]
        spans = []
        for start, end in itertools.pairwise(edges):
            text = self._tasks.get(str(int(tasks[start])))
            if text is None:
                raise BadEpisode("schema", f"{key}: task_index {tasks[start]} at step {start} is not in meta/tasks")
            spans.append(Span(start, end, text, text))
        return tuple(spans)


def decode_video(path: Path, times: np.ndarray, tolerance_s: float, name: str) -> Iterator[np.ndarray]:
    """The frames shown at `times` (s, increasing) as u8[H,W,3]. Raises `BadEpisode` where one is not there."""
    import av

    step = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            if stream.width * stream.height > MAX_PIXELS:
                raise BadEpisode("zip_bomb", f"{name} claims frames of {stream.width}x{stream.height} pixels")
            container.seek(max(0, int(times[0] / stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                shown = float((frame.pts or 0) * stream.time_base)
                if shown < times[step] - tolerance_s:
                    continue
                if shown > times[step] + tolerance_s:
                    raise BadEpisode(
                        "time", f"{name} shows no frame at {times[step]:.3f} s, the next is at {shown:.3f} s"
                    )
                yield frame.to_ndarray(format="rgb24")
                step += 1
                if step == len(times):
                    return
    except (av.FFmpegError, IndexError) as error:
        raise BadEpisode("unreadable_image", f"{name}: {error}") from error
    raise BadEpisode("missing_frame", f"{name} ends before {times[step]:.3f} s: {step} of {len(times)} frames")


def _column(table: pa.Table, name: str, key: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise BadEpisode("schema", f"{key}: there is no column {name!r}; there is: {', '.join(table.column_names)}")
    if table[name].null_count:
        raise BadEpisode("schema", f"{key}: {name} has {table[name].null_count} empty rows")
    return table[name]


def _matrix(table: pa.Table, name: str, length: int, key: str) -> np.ndarray:
    """Lists of one length -> f32[T,D]."""
    column = _column(table, name, key).combine_chunks()
    lists = (
        pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or pa.types.is_large_list(column.type)
    )
    flat = column.flatten() if lists else column
    try:
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise BadEpisode("dtype", f"{key}: {name} holds {flat.type}, not numbers") from error
    if length == 0 or len(values) % length:
        raise BadEpisode("shape", f"{key}: {name} has {len(values)} values in {length} rows")
    if lists and len(set(pc.list_value_length(column).to_pylist())) > 1:
        raise BadEpisode("shape", f"{key}: {name} changes its width")
    return values.reshape(length, -1)
