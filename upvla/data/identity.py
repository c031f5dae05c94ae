"""What a recording is known by: a hash over everything that training can see of it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from upvla.store import canonical_json, text_hash
from upvla.types import ActionSpace, Episode

Hashing = Literal["blake3", "blake2b"]
"""What a dataset's recordings are identified by: `blake3` from format 3 of its manifest on, `blake2b` before."""

_ID_BYTES = 16


def episode_id(episode: Episode, frames: Mapping[str, bytes], hashing: Hashing) -> str:
    """128 bits over everything that training can see: the same recording has one id wherever it comes from.

    `frames` has the encoded ones of each camera, end to end."""
    spans = [[span.start, span.end, span.text, span.task] for span in episode.spans]
    rest = [episode.rate_hz, spans, *([talk.step, talk.topic, talk.turns] for talk in episode.talks)]
    first, last = canonical_json([episode.embodiment, episode.scene])[:-1], canonical_json(rest)[1:]
    digest: Any = blake3() if hashing == "blake3" else hashlib.blake2b(digest_size=_ID_BYTES)
    digest.update(text_hash(f"{first},{_space_text(episode.action_space)},{last}").encode())  # of one list
    for name, values in {"timestamp": episode.timestamps, **numbers_of(episode)}.items():
        digest.update(f"{name}{_named(values.dtype)}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    for camera, joined in sorted(frames.items()):
        digest.update(f"{camera}{len(episode)}".encode())
        digest.update(joined)
    return str(digest.digest()[:_ID_BYTES].hex())


def numbers_of(episode: Episode) -> dict[str, np.ndarray]:
    """The columns of numbers that there are: Parquet has no lists of no width."""
    found = {"action": episode.actions, "state": episode.state}
    optional = {"absolute_action": episode.absolute_actions, "scene_state": episode.scene_state}
    found |= {name: values for name, values in optional.items() if values is not None}
    return {name: values for name, values in found.items() if values.shape[1]}


@functools.lru_cache(maxsize=16)
def _space_text(space: ActionSpace) -> str:
    return canonical_json(space.to_json())


_named = functools.lru_cache(str)  # numpy makes a dtype's name anew each time it is asked
