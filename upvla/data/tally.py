"""The statistics of a dataset's training split as its versions follow each other: only what changed is counted.

What was counted last is kept, by the process and, where it is much, in the store (`tally/`, for the next process; safe
to delete). The next version has nearly the same recordings, and what comes or goes is added or taken away. That is
exact: buckets are integers, and moments are kept a recording, so that they are summed in one order. All is counted from
the start (5,000 recordings a second) where nothing is kept, or where the summary of a recording that went is gone too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from upvla.data.objects import Kept, read_index, read_summaries
from upvla.data.stats import Folded, Statistics, Summary, folded
from upvla.errors import NotFound
from upvla.store import Store
from upvla.types import ShardRef

_LEFT = "tally/1-"  # the number is of `_packed` and of `Summary`'s meaning
_MUCH = 1_000  # recordings
_DIGEST_BYTES = hashlib.sha256().digest_size
_ID_BYTES = 16


class _Tally(NamedTuple):
    ids: frozenset[str]
    features: Mapping[str, Folded]


_NOTHING = _Tally(frozenset(), {})
_tallies: Kept[_Tally] = Kept(200_000)  # a kB a recording


def statistics_of(root: Store, index: Sequence[ShardRef], ids: frozenset[str]) -> Statistics:
    """Of these recordings, all of which `index` has."""
    before = _tallies.get(root, "") or (_left_behind(root) if len(ids) > _MUCH else _NOTHING)
    gone = dict(_summaries(root, index, before.ids - ids))
    if len(gone) < len(before.ids - ids):
        before, gone = _NOTHING, {}
    came, went = folded(_summaries(root, index, ids - before.ids)), folded(gone.items())
    features = dict(before.features)
    for name, part in came.items():
        features[name] = features[name].plus(part) if name in features else part
    for name, part in went.items():
        features[name] = features[name].minus(part)
    features = {name: feature for name, feature in features.items() if len(feature.places)}
    now, statistics = _Tally(ids, features), Statistics.of(features)
    _tallies.put(root, "", now, len(ids))
    if len(ids - before.ids) > _MUCH:
        root.write(f"{_LEFT}{statistics.stats_id}.safetensors", _packed(now))
    return statistics


def _summaries(
    root: Store, index: Sequence[ShardRef], ids: frozenset[str]
) -> Iterator[tuple[str, Mapping[str, Summary]]]:
    """(id, summary) of these recordings, each once, with one index at a time in memory. A recording that is in two of
    them says the same in both; what is looked for is mostly in the latest."""
    left = set(map(bytes.fromhex, ids))
    for ref in reversed(index):
        if not left:
            break
        here = left.intersection(row["episode_id"] for row in read_index(root, ref))
        if here:
            yield from read_summaries(root, ref, [identity.hex() for identity in here]).items()
        left -= here


def _left_behind(root: Store) -> _Tally:
    """The latest that is whole: of whichever version it is, it is a beginning."""
    written = root.modified(_LEFT)
    for key in sorted(written, key=lambda key: -written[key]):
        with suppress(NotFound):  # `gc` was here
            tally = _unpacked(root.read(key))
            if tally is not None:
                return tally
    return _NOTHING


def _packed(tally: _Tally) -> bytes:
    """Its sha256, and safetensors."""
    arrays = {"ids": _id_bytes(tally.ids)}
    for name, feature in tally.features.items():
        plain = feature._replace(places=_id_bytes(feature.places))
        arrays |= {f"{name}/{field}": np.ascontiguousarray(value) for field, value in plain._asdict().items()}
    body = save(arrays)
    return hashlib.sha256(body).digest() + body


def _unpacked(data: bytes) -> _Tally | None:
    """What `_packed` was given; None where these are not the bytes that it gave."""
    body = data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:_DIGEST_BYTES]:
        return None
    arrays = load(body)
    ids = frozenset(_ids_of(arrays.pop("ids")))
    features = dict[str, Folded]()
    for name in {key.rpartition("/")[0] for key in arrays}:
        found = Folded(**{field: arrays[f"{name}/{field}"] for field in Folded._fields})
        features[name] = found._replace(places=np.array(_ids_of(found.places)))
    return _Tally(ids, features)


def _id_bytes(ids: Iterable[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, _ID_BYTES)


def _ids_of(values: np.ndarray) -> list[str]:
    return [row.tobytes().hex() for row in values]
