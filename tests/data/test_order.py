from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from upvla.data import order
from upvla.data.order import Groups, Order


def even(count: int, size: int = 64) -> Groups:
    return Groups(count, lambda groups: groups * size)


def uneven(count: int, seed: int = 0) -> Groups:
    sizes = np.random.Generator(np.random.Philox(seed)).integers(1, 9, count)
    return Groups(count, np.concatenate([[0], np.cumsum(sizes)]).__getitem__)


def walk(found: Order, lane: int, epoch: int = 0) -> list[int]:
    first, last = found.part(lane)
    return [found.number(lane, epoch * (last - first) + n) for n in range(last - first)]


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("limits", [(1 << 17, 1 << 15), (10, 50), (7, 16)])
def test_an_epoch_has_every_sample_once_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, lanes: int, limits: tuple[int, int]
) -> None:
    monkeypatch.setattr(order, "_MAX_UNITS", limits[0])
    monkeypatch.setattr(order, "_SEGMENT", limits[1])
    found = Order(uneven(90), seed=3, name="x", lanes=lanes, spread=4.0)
    epochs = [[n for lane in range(lanes) for n in walk(found, lane, epoch)] for epoch in (0, 1)]
    for numbers in epochs:
        assert sorted(numbers) == list(range(found.num_samples))
    assert epochs[0] != epochs[1]
    again = Order(uneven(90), seed=3, name="x", lanes=lanes, spread=4.0)
    assert [again.number(lanes - 1, n) for n in (40, 3, 17)] == [found.number(lanes - 1, n) for n in (40, 3, 17)]


def test_segments_keep_few_row_groups_open_and_open_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_SEGMENT", 200)
    found, lanes = Order(even(120, 8), seed=0, name="x", lanes=4, spread=3.0), 4
    opened = Counter[int]()
    for lane in range(lanes):
        groups = [number // 8 for number in walk(found, lane)]
        first = {group: groups.index(group) for group in groups}
        last = {group: n for n, group in enumerate(groups)}
        opened.update(first.keys())
        assert max(sum(first[g] <= n <= last[g] for g in first) for n in range(len(groups))) <= 5
    assert sum(count - 1 for count in opened.values()) < lanes  # only groups cut between two lanes are in both


def test_a_billion_windows_begin_at_once_and_in_little_memory() -> None:
    tracemalloc.start()
    found = Order(even(16_000_000), seed=0, name="x", lanes=64, spread=4.0)
    batch = [found.number(lane, 0) for lane in range(64)]
    far = [found.number(lane, 10**9 + 7) for lane in range(64)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(batch)) == len(set(far)) == 64 and max(batch + far) < found.num_samples == 1_024_000_000
    assert peak < 100 << 20
