"""Recordings that were read, judged and encoded for a portion that is not finished: a restart need not do it again.

A shard takes many recordings, and its file is nothing before its end. Whoever works on one for longer than some seconds
leaves in the store what it has so far, one object a recording: a restart, on whatever machine, repeats these seconds
and the recording in hand. Portions that are done sooner leave nothing. Where frames come faster than memory holds for
so long, the oldest are let go, and a restart reads them again, as fast as they came.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from upvla.errors import NotFound
from upvla.store import Store, content_hash
from upvla.types import ActionSpace, Episode, Span, Talk

_FOLDER = "pieces/"
_FORMAT = 1  # of `packed`; nobody finds what was written in another one
_EVERY_S = 5.0
_HELD_BYTES = 64 << 20  # of frames that wait to be written
_DIGEST_BYTES = hashlib.sha256().digest_size
_PLAIN = ("id", "source", "embodiment", "scene", "rate_hz")
_ARRAYS = ("timestamps", "state", "actions", "absolute_actions", "scene_state")


class Pieces:
    """Of one portion of the dataset at `root`; `meaning` is what a recording's content depends on beside its source."""

    def __init__(self, root: Store, meaning: Any):
        self._root, self._meaning = root, meaning
        self._there = set(root.list(_FOLDER))
        self._used = set[str]()
        self._held = deque[tuple[str, Episode]]()
        self._held_bytes = 0
        self._since = time.monotonic()

    def find(self, key: str, token: str) -> Episode | None:
        """The recording, its frames encoded, if it was left here and is as it was written."""
        name = self._name(key, token) if self._there else ""
        if name not in self._there:
            return None
        episode = None
        with suppress(NotFound):  # who finished the same portion meanwhile had no more use for it
            episode = unpacked(self._root.read(name))
        if episode is not None:
            self._used.add(name)
        return episode

    def add(self, episode: Episode, token: str) -> None:
        """A recording with its frames encoded, which the portion's shards will have when they are finished."""
        self._held.append((self._name(episode.id, token), episode))
        self._held_bytes += _num_bytes(episode)
        while self._held_bytes > _HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= _num_bytes(self._held.popleft()[1])
        if time.monotonic() - self._since >= _EVERY_S:
            self._leave()

    def clear(self) -> None:
        """The portion is finished: what was found and what was left here is in its shards."""
        for name in self._used:
            self._root.delete(name)

    def _leave(self) -> None:
        for name, episode in self._held:
            if name not in self._used:
                self._root.write(name, packed(episode))
                self._used.add(name)
        self._held.clear()
        self._held_bytes, self._since = 0, time.monotonic()

    def _name(self, key: str, token: str) -> str:
        return f"{_FOLDER}{content_hash([_FORMAT, self._meaning, key, token])}.safetensors"


def packed(episode: Episode) -> bytes:
    """A recording with encoded frames as its sha256 and safetensors: arrays as they are, a camera's frames end to end
    and where each of them ends, and the rest as JSON."""
    rest = {name: getattr(episode, name) for name in _PLAIN} | {
        "action_space": episode.action_space.to_json(),
        "cameras": list(episode.images),
        "spans": [vars(span) for span in episode.spans],
        "talks": [vars(talk) for talk in episode.talks],
    }
    arrays = {name: value for name in _ARRAYS if (value := getattr(episode, name)) is not None}
    arrays["rest"] = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    for camera, frames in episode.images.items():
        arrays[f"frames/{camera}"] = np.frombuffer(b"".join(frames), np.uint8)
        arrays[f"ends/{camera}"] = np.cumsum([len(frame) for frame in frames], dtype=np.int64)
    body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    return hashlib.sha256(body).digest() + body


def unpacked(data: bytes) -> Episode | None:
    """What `packed` was given; None where these are not the bytes that it gave."""
    body = data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:_DIGEST_BYTES]:
        return None
    arrays: dict[str, Any] = load(body)
    rest = json.loads(arrays["rest"].tobytes())
    images = dict[str, list[bytes]]()
    for camera in rest["cameras"]:
        frames, edges = arrays[f"frames/{camera}"].tobytes(), [0, *arrays[f"ends/{camera}"].tolist()]
        images[camera] = [frames[start:end] for start, end in itertools.pairwise(edges)]
    return Episode(
        **{name: rest[name] for name in _PLAIN},
        **{name: arrays[name] for name in _ARRAYS if name in arrays},
        action_space=ActionSpace.from_json(rest["action_space"]),
        images=images,
        spans=tuple(Span(**span) for span in rest["spans"]),
        talks=tuple(Talk(**talk | {"turns": tuple(map(tuple, talk["turns"]))}) for talk in rest["talks"]),
    )


def _num_bytes(episode: Episode) -> int:
    return sum(len(frame) for frames in episode.images.values() for frame in frames)
