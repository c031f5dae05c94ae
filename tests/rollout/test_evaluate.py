"""Statistics of scores, against values that others have published or that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from upvla.rollout.evaluate import bootstrap_mean, summarise, wilson
from upvla.types import ChainRecord


def test_wilson_matches_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I: 81/263 -> 0.2553..0.3662; 0/20 -> 0..0.1611
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_bootstrap_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        estimate = bootstrap_mean([float(n) for n in rng.binomial(5, 0.4, 60)], draws=400)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_summary_counts_chains_and_attempts() -> None:
    records = [
        ChainRecord(1, "D", ("a", "b"), 1, (3, 9)),
        ChainRecord(0, "D", ("a", "c"), 2, (3, 4)),
        ChainRecord(2, "D", ("b", "a"), 0, (9,)),
    ]
    report = summarise("p", "s", {}, {}, records)
    assert [e.value for e in report.success] == pytest.approx([2 / 3, 1 / 3])
    assert report.average_length.value == 1.0
    assert {t: e.value for t, e in report.per_task.items()} == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert [r.number for r in report.records] == [0, 1, 2]
