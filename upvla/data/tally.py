"""The statistics of a dataset's training split as its versions follow each other: only what changed is counted.

A process remembers what it counted last of a dataset. The next version has nearly the same recordings, and what comes
or goes is added or taken away. That is exact: buckets are integers, and moments are kept a recording, so that they are
summed in one order. It counts from the start where it remembers nothing (5,000 recordings a second), or where the
summary of a recording that went is gone too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from upvla.data.objects import Kept, read_index, read_summaries
from upvla.data.stats import Folded, Statistics, Summary, folded
from upvla.store import Store
from upvla.types import ShardRef


class _Tally(NamedTuple):
    ids: frozenset[str]
    features: Mapping[str, Folded]


_tallies: Kept[_Tally] = Kept(200_000)  # a kB a recording


def statistics_of(root: Store, index: Sequence[ShardRef], ids: frozenset[str]) -> Statistics:
    """Of these recordings, all of which `index` has."""
    before = _tallies.get(root, "") or _Tally(frozenset(), {})
    gone = dict(_summaries(root, index, before.ids - ids))
    if len(gone) < len(before.ids - ids):
        before, gone = _Tally(frozenset(), {}), {}
    came, went = folded(_summaries(root, index, ids - before.ids)), folded(gone.items())
    features = dict(before.features)
    for name, part in came.items():
        features[name] = features[name].plus(part) if name in features else part
    for name, part in went.items():
        features[name] = features[name].minus(part)
    features = {name: feature for name, feature in features.items() if len(feature.places)}
    _tallies.put(root, "", _Tally(ids, features), len(ids))
    return Statistics.of(features)


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
