"""CALVIN's raw layout, which the playtable writes too: one npz a frame, recordings as inclusive id ranges.

    <split>/episode_0000000.npz ...        actions, rel_actions (7), robot_obs (15), scene_obs (24), rgb_<camera>
            ep_start_end_ids.npy           i64[recordings, 2], both ends inclusive
            scene_info.npy                 pickled {"calvin_scene_A": [first, last], ...}; optional
            embodiment.json                {embodiment, action_space, arrays: {name: shape}} of another robot; optional
            lang_annotations/auto_lang_ann.npy   pickled {language: {ann, task}, info: {indx: [(start, end)]}}; optional

Errata of the public set are recognised and counted in `notes`: annotations and frames outside of every recording
(leftovers) are ignored; where `scene_info.npy` puts a recording into two scenes, its scene is unknown.
Frames are encoded as they are read, so memory holds one recording's JPEGs, never its pixels.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from upvla.data.sources.pickles import UnsafePickle, read_object_npy
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound
from upvla.images import encode_jpeg
from upvla.store import Store, content_hash, open_store
from upvla.types import CALVIN_RELATIVE, ActionSpace, Episode, Span

_ARRAYS = {"rel_actions": (7,), "actions": (7,), "robot_obs": (15,), "scene_obs": (24,)}
_FRAME = re.compile(r"episode_\d{7}\.npz")
_MAX_STEPS = 1_000_000  # of one recording: nine hours
_MAX_MEMBER_BYTES = 64 << 20  # a frame's largest array is 0.2 MB; more is a zip bomb or no CALVIN frame

log = logging.getLogger(__name__)


class _Robot(NamedTuple):
    """Whose recordings these are, and the shapes of a frame's numbers."""

    embodiment: str
    action_space: ActionSpace
    arrays: Mapping[str, tuple[int, ...]]


class CalvinSource:
    """The recordings of one split. `url` is the split's folder, or its parent together with `split`.

    span_end: whether an annotation's second id is the last frame or the one after. CALVIN's own loader takes it as
    exclusive (the default), the published UP-VLA code as inclusive.
    """

    format = "calvin"

    def __init__(
        self,
        url: str,
        *,
        split: str = "",
        span_end: Literal["exclusive", "inclusive"] = "exclusive",
        cameras: Sequence[str] = ("static", "gripper"),
        embodiment: str = "franka_panda",
    ):
        if span_end not in ("exclusive", "inclusive"):
            raise ConfigError(f"span_end is 'exclusive' or 'inclusive', not {span_end!r}")
        self.store = open_store(url).sub(split) if split else open_store(url)
        self.cameras = tuple(cameras)
        self.notes: dict[str, int] = {}
        self._unsafe = ""
        try:
            ranges = _read_npy(self.store.read("ep_start_end_ids.npy"))
        except NotFound as error:
            raise NotFound(f"{error}: the URL must be a split's folder, such as .../training") from error
        except ValueError as error:
            raise Corrupt(f"{self.store.url}/ep_start_end_ids.npy: {error}; record or download it again") from error
        ordered = self._ordered(ranges)
        self._ranges = {f"{start:07d}-{end:07d}": (start, end) for start, end in ordered}
        self._robot = self._read_robot(embodiment)
        self._scenes: dict[str, Any] = self._pickled("scene_info.npy")
        self._spans = self._read_spans(last=1 if span_end == "inclusive" else 0)
        doubtful = sum(len(self._scenes_of(key)) > 1 for key in self._ranges)
        if doubtful:
            self._note("recordings in two scenes of scene_info.npy", doubtful)

    @staticmethod
    def recognises(store: Store) -> bool:
        return store.exists("ep_start_end_ids.npy")

    def _ordered(self, ranges: np.ndarray) -> list[tuple[int, int]]:
        """(first frame, last frame) of every recording."""
        where = f"{self.store.url}/ep_start_end_ids.npy"
        if ranges.dtype.kind not in "iu" or ranges.size % 2:
            raise Corrupt(f"{where} holds {ranges.dtype}{list(ranges.shape)}, not pairs of frame numbers")
        ordered = sorted((int(start), int(end)) for start, end in ranges.reshape(-1, 2))
        for start, end in ordered:
            if not 0 <= start <= end < start + _MAX_STEPS:
                raise Corrupt(f"{where} says that a recording goes from frame {start} to {end}; download it again")
        return ordered

    def keys(self) -> Sequence[str]:
        return list(self._ranges)

    def num_steps(self, key: str) -> int:
        return len(self._frame_ids(key))

    def token(self, key: str) -> str:
        frames = [self._tokens.get(_frame_key(i), "") for i in self._frame_ids(key)]
        spans = [[span.start, span.end, span.text, span.task] for span in self._spans[key]]
        return content_hash([frames, spans, self._scene(key), self.cameras, self._robot.embodiment, self._unsafe])

    def read(self, key: str) -> Episode:
        if self._unsafe:
            raise BadEpisode("unsafe_pickle", f"{key}: {self._unsafe}")
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self._robot.arrays}
        images: dict[str, list[bytes]] = {camera: [] for camera in self.cameras}
        sizes: dict[str, tuple[int, ...]] = {}
        for i in self._frame_ids(key):
            frame = self._read_frame(_frame_key(i))
            for name, rows in columns.items():
                rows.append(frame[name].astype(np.float32))
            for camera, encoded in images.items():
                picture = frame[f"rgb_{camera}"]
                if sizes.setdefault(camera, picture.shape) != picture.shape:
                    where = f"{self.store.url}/{_frame_key(i)}"
                    raise BadEpisode("shape", f"{where}: {camera} is {picture.shape}, before it {sizes[camera]}")
                encoded.append(encode_jpeg(picture))
        rate_hz = round(1 / self._robot.action_space.dt_s, 6)
        return Episode(
            id=key,
            source=self.format,
            embodiment=self._robot.embodiment,
            scene=self._scene(key),
            action_space=self._robot.action_space,
            rate_hz=rate_hz,
            timestamps=np.arange(len(columns["actions"])) / rate_hz,
            images=images,
            state=np.stack(columns["robot_obs"]),
            actions=np.stack(columns["rel_actions"]),
            spans=self._spans[key],
            absolute_actions=np.stack(columns["actions"]),
            scene_state=np.stack(columns["scene_obs"]),
        )

    @cached_property
    def _tokens(self) -> dict[str, str]:
        """Of every frame. The listing shows what no recording covers, so it is counted here."""
        tokens = self.store.tokens("episode_")
        frames = np.array([int(key[8:15]) for key in tokens if _FRAME.fullmatch(key)], np.int64)
        starts, ends = np.array(list(self._ranges.values()), np.int64).reshape(-1, 2).T
        last = np.r_[-1, np.maximum.accumulate(ends)]  # of the recordings that begin before or at a frame
        homeless = int((frames > last[np.searchsorted(starts, frames, side="right")]).sum())
        if homeless:
            self._note("frames outside of every recording", homeless)
        return tokens

    def _read_robot(self, embodiment: str) -> _Robot:
        """CALVIN's, unless the folder says whose recordings these are."""
        try:
            about = self.store.read_json("embodiment.json")
        except NotFound:
            return _Robot(embodiment, CALVIN_RELATIVE, _ARRAYS)
        try:
            shapes = {name: tuple(about["arrays"][name]) for name in _ARRAYS}
            return _Robot(about["embodiment"], ActionSpace.from_json(about["action_space"]), shapes)
        except (KeyError, TypeError) as error:
            raise Corrupt(f"{self.store.url}/embodiment.json lacks or misstates {error}; record again") from error

    def _frame_ids(self, key: str) -> range:
        start, end = self._ranges[key]
        return range(start, end + 1)

    def _scene(self, key: str) -> str:
        names = self._scenes_of(key)
        return names[0] if len(names) == 1 else "unknown"

    def _scenes_of(self, key: str) -> list[str]:
        first = self._ranges[key][0]
        return [name for name, (low, high) in self._scenes.items() if int(low) <= first <= int(high)]

    def _note(self, what: str, count: int) -> None:
        self.notes[what] = count
        log.warning("%s: %d %s", self.store.url, count, what)

    def _pickled(self, key: str) -> dict[str, Any]:
        """A pickled dict. One that wants to run something spoils every recording: none of it can be trusted."""
        try:
            value = read_object_npy(self.store.read(key), f"{self.store.url}/{key}")
        except NotFound:
            return {}
        except UnsafePickle as error:
            self._unsafe = str(error)
            return {}
        if not isinstance(value, dict):
            raise Corrupt(f"{self.store.url}/{key} holds a {type(value).__name__}, not a dict")
        return value

    def _read_spans(self, last: int) -> dict[str, tuple[Span, ...]]:
        """Annotations by recording, in its own steps; `last` is added to each end."""
        key = "lang_annotations/auto_lang_ann.npy"
        annotations = self._pickled(key) or {"language": {"ann": (), "task": ()}, "info": {"indx": ()}}
        keys, starts = list(self._ranges), np.array([start for start, _ in self._ranges.values()])
        spans: dict[str, list[Span]] = {key: [] for key in keys}
        homeless = 0
        try:
            language, where = annotations["language"], annotations["info"]["indx"]
            for text, task, (first, after) in zip(language["ann"], language["task"], where, strict=True):
                if not (isinstance(text, str) and isinstance(task, str)):
                    raise TypeError(f"an annotation is {type(text).__name__} and {type(task).__name__}, not text")
                start, end = int(first), int(after)
                place = int(np.searchsorted(starts, start, side="right")) - 1
                low, high = self._ranges[keys[place]] if place >= 0 else (0, -1)
                if start > high:
                    homeless += 1
                else:
                    spans[keys[place]].append(Span(start - low, end - low + last, str(text), str(task)))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise Corrupt(f"{self.store.url}/{key} is no annotation file: {error!r}; export it again") from error
        if homeless:
            self._note("annotations outside of every recording", homeless)
        return {key: tuple(found) for key, found in spans.items()}

    def _read_frame(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of one npz, CRC-checked. `BadEpisode` names the file and what is wrong with it."""
        where = f"{self.store.url}/{key}"
        try:
            data = self.store.read(key)
        except NotFound as error:
            raise BadEpisode("missing_frame", str(error)) from error
        frame: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for name in (*_ARRAYS, *(f"rgb_{camera}" for camera in self.cameras)):
                    member = archive.getinfo(f"{name}.npy")
                    if member.file_size > _MAX_MEMBER_BYTES:
                        raise BadEpisode("zip_bomb", f"{where}: {name} claims {member.file_size} bytes")
                    frame[name] = _read_npy(archive.read(member))
        except KeyError as error:
            raise BadEpisode("missing_array", f"{where}: {error.args[0]}") from error
        except UnsafePickle as error:
            raise BadEpisode("unsafe_pickle", f"{where}: {error}") from error
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise BadEpisode("unreadable_frame", f"{where}: {error}") from error
        for name, array in frame.items():
            expected = self._robot.arrays.get(name)
            if array.dtype.kind not in "fiu" if expected else array.dtype != np.uint8:
                raise BadEpisode(
                    "dtype", f"{where}: {name} is {array.dtype}, must be {'numbers' if expected else 'uint8'}"
                )
            if array.shape != expected if expected else array.ndim != 3 or array.shape[2] != 3:
                raise BadEpisode("shape", f"{where}: {name} is {array.shape}, must be {expected or '(H, W, 3)'}")
        return frame


def _frame_key(i: int) -> str:
    return f"episode_{i:07d}.npz"


def _read_npy(data: bytes) -> np.ndarray:
    """The array of one .npy file, over the same memory. Frames share a few headers, so those are parsed once.
    `ValueError` where it is none."""
    length = 2 if data[6:7] == b"\x01" else 4
    start = 8 + length + int.from_bytes(data[8 : 8 + length], "little")
    try:
        shape, is_fortran, dtype = _npy_header(data[:start])
        array = np.frombuffer(data, dtype, math.prod(shape), start)
        return array.reshape(shape, order="F" if is_fortran else "C")
    except UnsafePickle:
        raise
    except Exception as error:  # numpy parses headers as Python: a damaged one may raise anything
        raise ValueError(f"it is no .npy array: {error}") from error


@functools.lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise UnsafePickle("it holds pickled objects, a frame has none")
    return shape, is_fortran, dtype
