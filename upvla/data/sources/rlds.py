"""RLDS episodes in TFRecord files as TFDS writes them (BridgeData V2, DROID, Open X-Embodiment), without TensorFlow.

    <url>/features.json, dataset_info.json, <name>-<split>.tfrecord-00000-of-00010 ...

One record is one episode; the features of its steps lie flat under `steps/...`, a value a step. What they are called
differs from set to set, so a `FeatureMap` says it: by name for known sets, or written out in the import options.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upvla.data.actions import declared_space, joined, require_rate
from upvla.data.sources.tfrecord import RecordFile, parse_example
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound, problems_of
from upvla.store import Store, content_hash, open_store
from upvla.types import ActionSpace, Episode, Span

_SHARD = re.compile(r"-(?P<split>[^-/]+)\.tfrecord-(?P<number>\d+)-of-(?P<of>\d+)$")
_FILES_WALKED = 16  # at a time


class FeatureMap(BaseModel):
    """Which features of an episode are what; keys as in the file, `steps/observation/image_0`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cameras: dict[str, str] = Field(min_length=1)
    state: tuple[str, ...] = Field(min_length=1)
    action: tuple[str, ...] = Field(min_length=1)
    instruction: str = ""
    rate_hz: float = Field(gt=0)
    embodiment: str = "unknown"
    action_space: str | dict[str, Any] | None = None


_OBSERVATION = "steps/observation"
LAYOUTS = {
    "bridge_v2": FeatureMap(
        cameras={"static": f"{_OBSERVATION}/image_0"},
        state=(f"{_OBSERVATION}/state",),
        action=("steps/action",),
        instruction="steps/language_instruction",
        rate_hz=5,
        embodiment="widowx",
        action_space="bridge_v2",
    ),
    "droid": FeatureMap(
        cameras={"static": f"{_OBSERVATION}/exterior_image_1_left", "gripper": f"{_OBSERVATION}/wrist_image_left"},
        state=tuple(f"{_OBSERVATION}/{name}" for name in ("cartesian_position", "gripper_position", "joint_position")),
        action=("steps/action_dict/cartesian_position", "steps/action_dict/gripper_position"),
        instruction="steps/language_instruction",
        rate_hz=15,
        embodiment="franka_panda",
        action_space="droid",
    ),
    "fractal": FeatureMap(
        cameras={"static": f"{_OBSERVATION}/image"},
        state=(f"{_OBSERVATION}/base_pose_tool_reached", f"{_OBSERVATION}/gripper_closed"),
        action=tuple(
            f"steps/action/{name}" for name in ("world_vector", "rotation_delta", "gripper_closedness_action")
        ),
        instruction=f"{_OBSERVATION}/natural_language_instruction",
        rate_hz=3,
        embodiment="google_robot",
    ),
}
"""Feature maps by name. One without an action space (Open X's sets differ) needs it declared beside the name."""


class RLDSSource:
    """The episodes of one TFDS version folder. layout: a name of `LAYOUTS`, or a `FeatureMap` written out.

    split: "train" or another of the set's splits; all by default.
    """

    format = "rlds"

    def __init__(
        self,
        url: str,
        *,
        layout: str | Mapping[str, Any] | None = None,
        action_space: str | Mapping[str, Any] | None = None,
        split: str = "",
    ):
        self.store = open_store(url)
        self.notes: Mapping[str, int] = {}
        self.layout = _feature_map(layout, url)
        self.space: ActionSpace = declared_space(action_space or self.layout.action_space, f"RLDS set {url}")
        require_rate(self.space, self.layout.rate_hz, f"{url}: the layout")
        self._tokens = _record_files(self.store, split)
        if not self._tokens:
            raise NotFound(f"{url} holds no TFRecord files{f' of split {split!r}' if split else ''}")
        self._open: RecordFile | None = None

    @staticmethod
    def recognises(store: Store) -> bool:
        return store.exists("features.json") and bool(_record_files(store, ""))

    def keys(self) -> Sequence[str]:
        """As many a file as `dataset_info.json` says; files that it does not know are walked, several at a time."""
        unknown = [file for file in self._tokens if file not in self._described]
        with ThreadPoolExecutor(_FILES_WALKED) as pool:
            walked = pool.map(lambda file: RecordFile(self.store, file).count(), unknown)
            counts = self._described | dict(zip(unknown, walked, strict=True))
        return [f"{file}/{n:06d}" for file in self._tokens for n in range(counts[file])]

    def token(self, key: str) -> str:
        return content_hash([self._tokens[key.rpartition("/")[0]], self.layout.model_dump(), self.space.to_json()])

    def read(self, key: str) -> Episode:
        file, _, number = key.rpartition("/")
        example = parse_example(self._record(file, int(number)), key)
        images = {name: _frames(example, feature, key) for name, feature in self.layout.cameras.items()}
        steps = len(next(iter(images.values())))
        return Episode(
            id=key,
            source=self.format,
            embodiment=self.layout.embodiment,
            scene="unknown",
            action_space=self.space,
            rate_hz=self.layout.rate_hz,
            timestamps=np.arange(steps) / self.layout.rate_hz,
            images=images,
            state=joined([_numbers(example, feature, steps, key) for feature in self.layout.state]),
            actions=joined([_numbers(example, feature, steps, key) for feature in self.layout.action]),
            spans=self._spans(example, steps, key),
        )

    @cached_property
    def _described(self) -> dict[str, int]:
        """Records of each file that the set's own description counts. TFDS itself trusts it."""
        try:
            splits = self.store.read_json("dataset_info.json")["splits"]
            lengths = {str(split["name"]): [int(length) for length in split["shardLengths"]] for split in splits}
        except (NotFound, Corrupt, KeyError, TypeError, ValueError):
            return {}
        found = {}
        for file in self._tokens:
            name = _SHARD.search(file)
            shards = lengths.get(name["split"], []) if name else []
            if name and len(shards) == int(name["of"]) and int(name["number"]) < len(shards):
                found[file] = shards[int(name["number"])]
        return found

    def _record(self, file: str, number: int) -> bytes:
        opened = self._file(file)
        data = opened.read(number)
        if number + 1 == self._described.get(file) and not opened.ends_with(number):
            raise Corrupt(
                f"{self.store.url}/{file} goes on after the {number + 1} records that dataset_info.json says; correct "
                "or remove that description, and the file's records are counted"
            )
        return data

    def _file(self, key: str) -> RecordFile:
        if self._open is None or self._open.key != key:
            self._open = RecordFile(self.store, key)
        return self._open

    def _spans(self, example: Mapping[str, Any], steps: int, key: str) -> tuple[Span, ...]:
        """Runs of steps with one instruction; steps without words have none."""
        if not self.layout.instruction:
            return ()
        texts = [text.decode("utf-8", "replace").strip() for text in _frames(example, self.layout.instruction, key)]
        texts = texts * steps if len(texts) == 1 else texts
        if len(texts) != steps:
            raise BadEpisode("frame_count", f"{key}: {len(texts)} instructions for {steps} steps")
        edges = [0, *(i for i in range(1, steps) if texts[i] != texts[i - 1]), steps]
        runs = itertools.pairwise(edges)
        return tuple(Span(start, end, texts[start], texts[start]) for start, end in runs if texts[start])


def _record_files(store: Store, split: str) -> dict[str, str]:
    """TFRecord objects with their tokens; TFDS puts the split before the extension."""
    names = {key: token for key, token in store.tokens().items() if ".tfrecord" in key.rpartition("/")[2]}
    return {key: token for key, token in names.items() if not split or f"-{split}.tfrecord" in key}


def _feature_map(layout: str | Mapping[str, Any] | None, url: str) -> FeatureMap:
    if isinstance(layout, str) and layout in LAYOUTS:
        return LAYOUTS[layout]
    fields = ", ".join(FeatureMap.model_fields)
    if not isinstance(layout, Mapping):
        raise ConfigError(
            f"RLDS set {url}: say which features are what with the option layout: one of {', '.join(LAYOUTS)}, or a "
            f"mapping of {fields}" + (f" (not {layout!r})" if layout else "")
        )
    try:
        return FeatureMap.model_validate(layout)
    except ValidationError as error:
        raise ConfigError(f"RLDS set {url}: layout: {problems_of(error)}") from error


def _feature(example: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in example:
        close = ", ".join(sorted(example))[:400]
        raise BadEpisode("schema", f"{key}: there is no feature {name!r}; there is: {close}")
    return example[name]


def _frames(example: Mapping[str, Any], name: str, key: str) -> list[bytes]:
    values = _feature(example, name, key)
    if not isinstance(values, list):
        raise BadEpisode("dtype", f"{key}: {name} holds numbers, not bytes")
    return values


def _numbers(example: Mapping[str, Any], name: str, steps: int, key: str) -> np.ndarray:
    values = _feature(example, name, key)
    if isinstance(values, list):
        raise BadEpisode("dtype", f"{key}: {name} holds bytes, not numbers")
    if steps == 0 or len(values) == 0 or len(values) % steps:
        raise BadEpisode("frame_count", f"{key}: {name} has {len(values)} values for {steps} frames")
    return np.asarray(values, np.float32).reshape(steps, -1)
