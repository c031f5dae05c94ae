"""The order in which one source's samples come: a pure function of a seed, made piece by piece where it is asked for.

Samples are numbered so that those of a row group are neighbours. An epoch's row groups, permuted, make one stream of
samples that is cut into equal parts, one a lane. A lane walks its part in segments; within one, a sample's rank is its
row group's plus a random number below `spread`: so a lane has about `spread` row groups open at a time, and reads each
once. Neighbouring lanes run in opposite directions, because then a row group that was cut is read by both at one time.

Nothing as long as the source is ever made: beyond 131,072 row groups neighbours travel together as one, and a segment
is 32,768 samples, however many a lane has. Random numbers are raw Philox words keyed by a hash of their purpose:
stable over platforms and numpy versions.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

_Key = TypeVar("_Key")
_MAX_UNITS = 1 << 17
_SEGMENT = 1 << 15


class Groups(NamedTuple):
    """Row groups of a source. `edges` maps group numbers i64[n], up to `num_groups`, to the first sample of each."""

    num_groups: int
    edges: Callable[[np.ndarray], np.ndarray]

    @property
    def num_samples(self) -> int:
        return int(self.edges(np.array([self.num_groups]))[0]) if self.num_groups else 0


class Order:
    """Of one source, dealt to `lanes`. `name` keeps the sources of one plan apart. Threads may share it."""

    def __init__(self, groups: Groups, *, seed: int, name: str, lanes: int, spread: float):
        self._groups, self._seed, self._name, self._spread = groups, seed, name, spread
        self.num_samples, self._lanes = groups.num_samples, lanes
        self._unit = -(-groups.num_groups // _MAX_UNITS)  # row groups that travel together
        self._deals = _Cache(self._deal, size=2)
        self._segments = _Cache(self._segment, size=2 * lanes)

    def number(self, lane: int, nth: int) -> int:
        """The sample that is the lane's `nth` draw, over all epochs."""
        first, last = self.part(lane)
        epoch, place = divmod(nth, last - first)
        return int(self._segments[epoch, lane, place // _SEGMENT][place % _SEGMENT])

    def part(self, lane: int) -> tuple[int, int]:
        """The part of the stream that a lane walks; lanes share parts where there are fewer samples."""
        parts = min(self._lanes, self.num_samples)
        return lane % parts * self.num_samples // parts, (lane % parts + 1) * self.num_samples // parts

    def _deal(self, key: tuple[int]) -> np.ndarray:
        """i64[2, units]: the units in this epoch's order, and where in the stream each ends."""
        (epoch,) = key
        count = -(-self._groups.num_groups // self._unit)
        order = permutation(count, self._seed, self._name, epoch)
        edges = self._groups.edges(np.minimum(np.arange(count + 1) * self._unit, self._groups.num_groups))
        return np.stack([order, np.cumsum(np.diff(edges)[order])])

    def _segment(self, key: tuple[int, int, int]) -> np.ndarray:
        """The sample numbers of one segment of a lane's epoch, in order."""
        epoch, lane, number = key
        first, last = self.part(lane)
        begin = number * _SEGMENT
        end = min(begin + _SEGMENT, last - first)
        backwards = lane % 2 == 1
        places = np.arange(last - end, last - begin) if backwards else np.arange(first + begin, first + end)
        groups, ends = self._stream(epoch, int(places[0]), int(places[-1]))
        rank = np.searchsorted(ends, places, side="right")
        numbers = self._groups.edges(groups + 1)[rank] - (ends[rank] - places)
        distance = rank[-1] - rank if backwards else rank - rank[0]
        purpose = ("lane", lane) if last - first <= _SEGMENT else ("lane", lane, number)
        key_of = distance + words(len(places), self._seed, self._name, epoch, *purpose) / 2.0**64 * self._spread
        return np.asarray(numbers[np.argsort(key_of, kind="stable")])

    def _stream(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the epoch's stream, the row groups that hold its places first..last, and where in it each ends."""
        units, ends = self._deals[(epoch,)]
        low, high = np.searchsorted(ends, [first, last], side="right")
        begin = ends[low - 1] if low else 0
        groups = np.concatenate([self._groups_of(int(unit), epoch) for unit in units[low : high + 1]])
        return groups, begin + np.cumsum(self._groups.edges(groups + 1) - self._groups.edges(groups))

    def _groups_of(self, unit: int, epoch: int) -> np.ndarray:
        if self._unit == 1:
            return np.array([unit])
        start = unit * self._unit
        count = min(self._unit, self._groups.num_groups - start)
        return start + permutation(count, self._seed, self._name, epoch, "unit", unit)


class _Cache(Generic[_Key]):
    """The last few results of a pure function; threads that miss together compute together, to the same result."""

    def __init__(self, compute: Callable[[_Key], np.ndarray], size: int):
        self._compute, self._size = compute, size
        self._values: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, key: _Key) -> np.ndarray:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._compute(key)
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


def permutation(size: int, seed: int, *purpose: str | int) -> np.ndarray:
    """i64[size], a function of the arguments alone."""
    return np.argsort(words(size, seed, *purpose), kind="stable")


def words(size: int, seed: int, *purpose: str | int) -> np.ndarray:
    """u64[size]"""
    key = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()[:16]
    return np.asarray(np.random.Philox(key=int.from_bytes(key, "big")).random_raw(size))
