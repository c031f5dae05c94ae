from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upvla.data.stats import Statistics, Summary, _added, _Fold


def _statistics(*parts: np.ndarray) -> Statistics:
    return Statistics.merged({"x": Summary.of(part)} for part in parts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 1000))
def test_merged_figures_are_those_of_the_whole(lengths: list[int], seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    parts = [rng.normal((0, 50, -3), (1, 20, 0.1), (length, 3)).astype(np.float32) for length in lengths]
    whole = np.concatenate(parts).astype(np.float64)
    figures = _statistics(*parts).features["x"]
    assert figures.count == len(whole)
    for name, expected in (
        ("mean", whole.mean(0)),
        ("std", whole.std(0)),
        ("low", whole.min(0)),
        ("high", whole.max(0)),
    ):
        assert np.allclose(getattr(figures, name), expected, rtol=1e-5, atol=1e-5), name
    assert _statistics(*parts).features["x"].q01 == _statistics(*reversed(parts)).features["x"].q01


def test_recordings_in_any_order_give_the_same_bits_and_are_not_all_held() -> None:
    def summaries() -> Iterator[tuple[int, dict[str, Summary]]]:
        for place in (*range(1, 600, 2), *range(0, 600, 2)):
            rng = np.random.Generator(np.random.Philox(place))
            spread = 10.0 ** rng.uniform(-4, 4, (400, 7))  # every step in a bucket of its own
            yield place, {"x": Summary.of((spread * rng.choice([-1, 1], (400, 7))).astype(np.float32))}

    ordered = [summary["x"] for _, summary in sorted(summaries(), key=lambda placed: placed[0])]
    held = sum(part.buckets.nbytes for part in ordered)
    counts = np.array([part.count for part in ordered], np.float64)[:, None]
    means = np.stack([part.mean for part in ordered])
    mean = (means * counts).sum(0) / counts.sum()
    expected = Summary(
        int(counts.sum()),
        mean,
        np.stack([part.m2 for part in ordered]).sum(0) + ((means - mean) ** 2 * counts).sum(0),
        np.min([part.low for part in ordered], axis=0),
        np.max([part.high for part in ordered], axis=0),
        _added(np.concatenate([part.buckets for part in ordered])),
    )
    del ordered
    fold = _Fold()
    tracemalloc.start()
    for place, summary in summaries():
        fold.add(place, summary["x"])
    found = fold.merged()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.count == expected.count and np.array_equal(found.buckets, expected.buckets)
    for name in ("mean", "m2", "low", "high"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
    assert peak < 0.5 * held
    assert Statistics.folded(summaries()) == Statistics.merged(s for _, s in sorted(summaries(), key=lambda p: p[0]))


def test_few_buckets_and_many_are_added_alike() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    few = np.stack([np.sort(rng.choice(200_000, 40, replace=False)), rng.integers(1, 9, 40)], axis=1)
    many = np.tile(few, (1000, 1))
    assert np.array_equal(_added(many), few * (1, 1000))  # counted
    assert np.array_equal(_added(np.concatenate([few, few])), few * (1, 2))  # sorted


def test_quantiles_are_within_one_per_cent() -> None:
    values = np.random.Generator(np.random.Philox(1)).normal((0, 5), (1, 0.5), (20000, 2)).astype(np.float32)
    figures = _statistics(values).features["x"]
    assert np.allclose(figures.q01, np.quantile(values, 0.01, 0), rtol=0.015)
    assert np.allclose(figures.q99, np.quantile(values, 0.99, 0), rtol=0.015)


def test_a_small_deviation_survives_a_large_mean() -> None:
    values = 1000 + np.random.Generator(np.random.Philox(1)).normal(0, 0.01, (5000, 1)).astype(np.float32)
    figures = _statistics(*np.split(values.astype(np.float32), 10)).features["x"]
    assert figures.std[0] == pytest.approx(values.astype(np.float64).std(), rel=1e-3)


def test_identity_is_the_content() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    one = _statistics(values)
    again = Statistics.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one and again.stats_id == one.stats_id
    assert _statistics(values + 1).stats_id != one.stats_id
    summary = Summary.of(values)
    back = Summary.from_json(json.loads(json.dumps(summary.to_json())))
    assert np.array_equal(back.buckets, summary.buckets) and np.array_equal(back.m2, summary.m2)


def test_only_a_dimension_that_does_not_move_is_constant() -> None:
    rng = np.random.Generator(np.random.Philox(2))
    values = np.c_[rng.normal(3, 2, 500), np.full(500, 7.0), np.zeros(500), rng.normal(0, 1e-3, 500)].astype(np.float32)
    assert _statistics(values).features["x"].constant == (False, True, True, False)
