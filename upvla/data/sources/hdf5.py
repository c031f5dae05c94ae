"""Demonstrations in HDF5 files as robomimic writes them and LIBERO after it.

    data/                      attributes: env_args (JSON: the controller's settings), LIBERO: problem_info (JSON)
    data/demo_0/actions        f[T,7];  data/demo_0/obs/<key>  u8[T,H,W,3] or f[T,n]
    mask/<split>               names of demonstrations; optional

The controller's settings say what the actions mean, so they are not asked for. LIBERO's pictures are stored upside
down and are turned. Frames are read and encoded in blocks: memory holds a few pictures, whatever the file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upvla.data.actions import agreed_space, declared_space, joined, require_rate
from upvla.data.sources.ranges import RangeFile
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound, problems_of
from upvla.images import encode_jpeg
from upvla.store import Store, content_hash, open_store
from upvla.types import ActionDim, ActionSpace, Episode, Span

_MAGIC = b"\x89HDF\r\n\x1a\n"
_UNREADABLE = "unreadable"  # the one demonstration of a file that does not say which it has
_BLOCK = 32  # frames read at a time
_MAX_BYTES = 1 << 30  # of what is read at once: an array of numbers, a block of frames, a stored chunk
_MAX_VIDEO_BYTES = 64 << 30  # of one camera's frames in a demonstration


class DemoMap(BaseModel):
    """Which arrays of a demonstration are what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cameras: dict[str, str] = Field(min_length=1)
    state: tuple[str, ...] = Field(min_length=1)
    action: str = "actions"
    upside_down: bool = False
    embodiment: str = "franka_panda"


LAYOUTS = {
    "libero": DemoMap(
        cameras={"static": "obs/agentview_rgb", "gripper": "obs/eye_in_hand_rgb"},
        state=("obs/ee_states", "obs/gripper_states", "obs/joint_states"),
        upside_down=True,
    ),
    "robomimic": DemoMap(
        cameras={"static": "obs/agentview_image", "gripper": "obs/robot0_eye_in_hand_image"},
        state=("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"),
    ),
}


class HDF5Source:
    """Every demonstration of every HDF5 file under `url`, or of one file.

    layout: a name of `LAYOUTS` or a `DemoMap`; by default the one whose arrays are there. instruction: for sets that
    carry none. mask: take only the demonstrations that `mask/<mask>` lists.
    """

    format = "hdf5"

    def __init__(
        self,
        url: str,
        *,
        layout: str | Mapping[str, Any] | None = None,
        action_space: str | Mapping[str, Any] | None = None,
        instruction: str = "",
        mask: str = "",
    ):
        self.store = open_store(url)
        self._layout, self._space, self._instruction, self._mask = layout, action_space, instruction, mask
        self._tokens, misnamed = _hdf5_files(self.store)
        folder, _, name = self.store.url.rpartition("/")
        if not (self._tokens or misnamed) and folder and name:  # one file
            self.store = open_store(folder)
            self._tokens, misnamed = _hdf5_files(self.store, name)
        if not self._tokens:
            raise NotFound(f"{url} holds no HDF5 files{f', {misnamed} are only called so' if misnamed else ''}")
        self.notes: Mapping[str, int] = {"files called HDF5 that are none": misnamed} if misnamed else {}
        self._scratch = tempfile.TemporaryDirectory(prefix="upvla-hdf5-")
        self._open: tuple[str, h5py.File, Path] | None = None

    @staticmethod
    def recognises(store: Store) -> bool:
        return bool(_hdf5_files(store)[0])

    def keys(self) -> Sequence[str]:
        return [f"{file}/{name}" for file in self._tokens for name in self._demos(file)]

    def token(self, key: str) -> str:
        options = [self._layout, self._space, self._instruction, self._mask]
        return content_hash([self._tokens[key.rpartition("/")[0]], options])

    def read(self, key: str) -> Episode:
        file, _, name = key.rpartition("/")
        try:
            opened = self._file(file)
            if name == _UNREADABLE:
                self._names(opened)
            demo, layout = opened[f"data/{name}"], self._map(opened)
            space = self._space_of(opened, file)
            steps = len(_array(demo, layout.action, key))
            images = {camera: _encoded(demo, path, layout, key) for camera, path in layout.cameras.items()}
            state = joined([_array(demo, path, key)[()] for path in layout.state])
            actions = np.asarray(_array(demo, layout.action, key)[()], np.float32)
            text = self._instruction or _language(opened)
        except (OSError, RuntimeError, MemoryError) as error:  # what h5py raises for damaged files
            raise BadEpisode("unreadable_frame", f"{self.store.url}/{file}: {error}") from error
        except KeyError as error:
            raise BadEpisode("schema", f"{self.store.url}/{file}: {name}: {error}") from error
        except (TypeError, ValueError) as error:
            raise BadEpisode("dtype", f"{self.store.url}/{file}: {name}: {error}") from error
        return Episode(
            id=key,
            source=self.format,
            embodiment=layout.embodiment,
            scene=file.rpartition("/")[2].rpartition(".")[0],
            action_space=space,
            rate_hz=1 / space.dt_s,
            timestamps=np.arange(steps) * space.dt_s,
            images=images,
            state=state,
            actions=actions,
            spans=(Span(0, steps, text, text),) if text else (),
        )

    def _file(self, key: str) -> h5py.File:
        if self._open is None or self._open[0] != key:
            if self._open is not None:
                self._open[1].close()
                if self._open[2].is_relative_to(self._scratch.name):
                    self._open[2].unlink()
            path = self.store.local_copy(key, self._scratch.name)
            self._open = None
            self._open = (key, h5py.File(path, "r"), path)
        return self._open[1]

    def _demos(self, file: str) -> list[str]:
        """Names in order of their numbers, read where the file lies: they are a few kilobytes of it. A file that does
        not say them counts as one, and reading that says why."""
        try:
            with h5py.File(RangeFile(self.store, file), "r") as opened:
                return self._names(opened)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError):
            return [_UNREADABLE]

    def _names(self, opened: h5py.File) -> list[str]:
        if not isinstance(opened["data"], h5py.Group):
            raise TypeError("'data' is no group of demonstrations")
        names = list(opened[f"mask/{self._mask}"] if self._mask else opened["data"])
        if not all(isinstance(name, bytes | str) for name in names):
            raise TypeError(f"mask/{self._mask} lists no names")
        texts = [name.decode() if isinstance(name, bytes) else name for name in names]
        return sorted(texts, key=lambda name: (len(name), name))

    def _map(self, opened: h5py.File) -> DemoMap:
        if isinstance(self._layout, str) and self._layout in LAYOUTS:
            return LAYOUTS[self._layout]
        if isinstance(self._layout, Mapping):
            try:
                return DemoMap.model_validate(self._layout)
            except ValidationError as error:
                raise ConfigError(f"{self.store.url}: layout: {problems_of(error)}") from error
        demo = opened["data"][next(iter(opened["data"]))]
        fits = [m for m in LAYOUTS.values() if all(path in demo for path in m.cameras.values())]
        if len(fits) != 1 or self._layout:
            raise ConfigError(
                f"{self.store.url}: say which arrays are what with the option layout: one of {', '.join(LAYOUTS)}, or "
                f"a mapping of {', '.join(DemoMap.model_fields)}"
            )
        return fits[0]

    def _space_of(self, opened: h5py.File, file: str) -> ActionSpace:
        """As declared, or as the recording's own controller settings say, which must agree."""
        where, settings = f"HDF5 file {self.store.url}/{file}", _settings(opened)
        stated = None
        try:
            stated = declared_space(controller_space(settings).to_json(), where)
        except (ConfigError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            where += f" (no OSC_POSE settings in data.attrs['env_args']: {error!r})"
        space = agreed_space(self._space, stated, where)
        with suppress(LookupError, TypeError, ValueError):  # other controllers state their rate, too
            require_rate(space, float(settings["control_freq"]), where)
        return space


def controller_space(settings: Mapping[str, Any]) -> ActionSpace:
    """The action space of robosuite's OSC_POSE controller in delta mode. `ValueError` for any other."""
    controller = settings["controller_configs"]
    controller = controller[0] if isinstance(controller, list) else controller
    controller = controller.get("body_parts", {}).get("right", controller)  # composite controllers, robosuite >= 1.5
    if controller["type"] != "OSC_POSE" or not controller.get("control_delta", True):
        raise ValueError(f"controller {controller['type']} is not OSC_POSE with deltas")
    scale = [float(value) / float(controller.get("input_max", 1)) for value in controller["output_max"]]
    low, high = float(controller.get("input_min", -1)), float(controller.get("input_max", 1))
    names, dt_s = ("dx", "dy", "dz", "drx", "dry", "drz"), 1 / float(settings["control_freq"])
    dims = [
        ActionDim(name, "m", "world", "relative", scale[i], low, high)
        if i < 3
        else ActionDim(name, "rad", "world", "relative", scale[i], low, high, "axis_angle")
        for i, name in enumerate(names)
    ]
    gripper = ActionDim("gripper", "gripper", "none", "absolute", convention="-1=open,+1=close,continuous")
    return ActionSpace("osc_pose", (*dims, gripper), dt_s)


def _hdf5_files(store: Store, only: str = "") -> tuple[dict[str, str], int]:
    """Objects that begin with HDF5's signature, with their tokens, and how many others are merely called HDF5. Names
    save looking into pictures and nothing else. only: the one object to look at."""
    plain = (".json", ".jpg", ".png", ".mp4", ".parquet", ".npz", ".npy", ".txt", ".md")
    found, misnamed = dict[str, str](), 0
    for key, token in store.tokens(only).items():
        if key == only or not (only or key.endswith(plain)):
            if _begins_so(store, key):
                found[key] = token
            else:
                misnamed += key.endswith((".hdf5", ".h5"))
    return found, misnamed


def _begins_so(store: Store, key: str) -> bool:
    try:
        return store.read_ranges(key, [(0, len(_MAGIC))])[0] == _MAGIC
    except Corrupt:  # shorter than the signature
        return False


def _array(demo: h5py.Group, path: str, key: str, most: int = _MAX_BYTES) -> h5py.Dataset:
    """An array that fits into memory: a file of a kilobyte may claim any shape."""
    array = demo.get(path)
    if not isinstance(array, h5py.Dataset):
        raise BadEpisode("schema", f"{key}: there is no array {path!r}")
    chunk = math.prod(array.chunks or ()) * array.dtype.itemsize
    if array.nbytes > most or chunk > _MAX_BYTES:
        raise BadEpisode(
            "zip_bomb",
            f"{key}: {path} claims {array.nbytes} bytes in chunks of {chunk}; the most is {most} in {_MAX_BYTES}",
        )
    return array


def _encoded(demo: h5py.Group, path: str, layout: DemoMap, key: str) -> list[bytes]:
    frames = _array(demo, path, key, _MAX_VIDEO_BYTES)
    if frames.dtype != np.uint8:
        raise BadEpisode("dtype", f"{key}: {path} is {frames.dtype}, pictures are uint8")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise BadEpisode("shape", f"{key}: {path} is {frames.shape}, must be (T, H, W, 3)")
    if math.prod(frames.shape[1:]) * _BLOCK > _MAX_BYTES:
        raise BadEpisode("zip_bomb", f"{key}: {path} claims frames of {frames.shape[1]}x{frames.shape[2]} pixels")
    turned = slice(None, None, -1 if layout.upside_down else 1)
    blocks = (frames[start : start + _BLOCK] for start in range(0, len(frames), _BLOCK))
    return [encode_jpeg(frame[turned]) for block in blocks for frame in block]


def _settings(opened: h5py.File) -> Mapping[str, Any]:
    """What robosuite was told; empty where the file does not say."""
    try:
        return dict(json.loads(opened["data"].attrs["env_args"])["env_kwargs"])
    except (KeyError, TypeError, ValueError):
        return {}


def _language(opened: h5py.File) -> str:
    """LIBERO's instruction; its writer wraps it in a list now and then, or in quotes."""
    try:
        text = json.loads(opened["data"].attrs["problem_info"])["language_instruction"]
    except (KeyError, TypeError, ValueError):
        return ""
    return str("".join(text) if isinstance(text, list) else text).strip().strip('"')
