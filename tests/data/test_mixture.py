from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from upvla.data.mixture import Mixture, MixtureConfig, _chairman, _permutation, make_plan, plan_from_json
from upvla.data.table import Dataset
from upvla.errors import ConfigError, Mismatch, NotFound
from upvla.types import MixtureSource


def config(*weights: float, global_batch: int = 16, seed: int = 0) -> MixtureConfig:
    kinds = ("robot", "qa")
    sources = [{"dataset": "table", "kind": kind, "weight": w} for kind, w in zip(kinds, weights, strict=False)]
    return MixtureConfig.model_validate({"sources": sources, "global_batch": global_batch, "seed": seed})


def mixture(dataset: Dataset, *weights: float, split: str = "train", **options: int) -> Mixture:
    return Mixture(config(*weights, **options).plan(dataset.store, split), {"table": dataset})  # type: ignore[arg-type]


def test_every_window_is_seen_once_an_epoch_in_another_order_each_time(dataset: Dataset) -> None:
    found = mixture(dataset, 1.0, global_batch=8)
    (size,) = found.sizes
    expected = {
        (row, i, step)
        for row, episode in enumerate(dataset.episodes)
        if episode.split == "train"
        for i, span in enumerate(episode.spans)
        for step in range(span.start, span.end)
    }
    assert len(expected) == size
    # a batch's slots are shuffled, so an epoch is exact up to the batch that it ends in
    period = size * 8
    seen = Counter((r.episode, r.span, r.step) for r in map(found.sample_at, range(period)))
    assert seen == Counter(dict.fromkeys(expected, 8))
    first, second = ([found.sample_at(p) for p in range(start, start + 40)] for start in (0, size))
    assert first != second


def test_shares_are_exact_in_every_batch_that_allows_it(dataset: Dataset) -> None:
    found = mixture(dataset, 3, 1)
    for batch in range(50):
        kinds = Counter(found.sample_at(p).kind for p in range(16 * batch, 16 * batch + 16))
        assert kinds == {"robot": 12, "qa": 4}
    assert found.share(0, 160) == {"table/robot": 0.75, "table/qa": 0.25}


def test_every_ranks_stride_gets_every_source(dataset: Dataset) -> None:
    found = mixture(dataset, 3, 1)
    for rank in range(4):
        kinds = Counter(found.sample_at(p).kind for p in range(rank, 1600, 4))
        assert kinds["qa"] == pytest.approx(100, abs=25)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_no_source_is_ever_a_draw_away_from_its_share(weights: list[int]) -> None:
    turns, ranks, counts = _chairman(tuple(map(float, weights)))
    shares = np.array(weights) / sum(weights)
    drawn = np.zeros(len(weights), int)
    for n, (turn, rank) in enumerate(zip(turns, ranks, strict=True), start=1):
        assert rank == drawn[turn]
        drawn[turn] += 1
        assert np.abs(drawn - shares * n).max() < 1
    assert tuple(drawn) == counts


def test_awkward_weights_still_come_true() -> None:
    for weights in ((0.1, 0.2, 0.7), (1e-4, 1.0), (np.pi, np.e), (1 / 3, 2 / 3)):
        _, _, counts = _chairman(weights)
        assert np.allclose(np.array(counts) / sum(counts), np.array(weights) / sum(weights), atol=2e-4)
        assert min(counts) >= 1 and sum(counts) <= 20_000


def test_the_order_is_pure_and_no_global_generator_matters(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a global random generator was used")

    positions = [*range(60), 10_000, 10**9, 5]
    expected = [mixture(dataset, 2, 1).sample_at(p) for p in positions]
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    for name in ("seed", "random", "rand", "randint", "permutation", "shuffle", "choice", "default_rng"):
        monkeypatch.setattr(np.random, name, refuse)
    for name in ("random", "randint", "shuffle", "choice", "sample", "getrandbits"):
        monkeypatch.setattr(random, name, refuse)
    other = mixture(dataset, 2, 1)
    assert [other.sample_at(p) for p in reversed(positions)][::-1] == expected


def test_the_order_itself_is_pinned() -> None:
    """Runs resume across releases: a change here is a change of every plan that was ever written down."""
    assert _permutation(10, 3, "a", 1).tolist() == [6, 8, 7, 0, 1, 4, 9, 5, 2, 3]
    assert _chairman((3.0, 2.0, 1.0))[0].tolist() == [0, 1, 0, 2, 1, 0]


def test_seeds_batches_and_sources_make_other_plans(dataset: Dataset) -> None:
    plans = [
        config(1, 1).plan(dataset.store),
        config(1, 1, seed=1).plan(dataset.store),
        config(1, 2).plan(dataset.store),
        config(1, 1, global_batch=8).plan(dataset.store),
        config(1, 1).plan(dataset.store, "validation"),
    ]
    assert len({plan.plan_id for plan in plans}) == len(plans)
    assert plan_from_json(json.loads(json.dumps(asdict(plans[0])))) == plans[0]
    with pytest.raises(Mismatch, match="changed after"):
        plan_from_json(asdict(plans[0]) | {"seed": 9})


def test_splits_and_wordings_do_not_mix(dataset: Dataset) -> None:
    for split, wording in (("train", "train"), ("validation", "held_out")):
        found = mixture(dataset, 1, 1, split=split)
        refs = [found.sample_at(p) for p in range(2000)]
        assert {dataset.episodes[ref.episode].split for ref in refs} == {split}
        questions = [dataset.qa[ref.qa] for ref in refs if ref.kind == "qa"]
        assert questions and {row.template_split for row in questions} == {wording}
        assert all(
            (q.episode, q.step) == (r.episode, r.step)
            for q, r in zip(questions, (r for r in refs if r.qa >= 0), strict=True)
        )


def test_what_cannot_be_drawn_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValidationError):
        config(0.0)
    with pytest.raises(NotFound, match="no dataset"):
        MixtureConfig.model_validate(
            {"sources": [{"dataset": "none", "kind": "robot", "weight": 1}], "global_batch": 2}
        ).plan(dataset.store)
    plan = config(1).plan(dataset.store)
    with pytest.raises(ConfigError, match="given: \\[\\]"):
        Mixture(plan, {})
    stale = replace(plan, sources=(replace(plan.sources[0], content_id="other"),))
    with pytest.raises(Mismatch, match="made for content other"):
        Mixture(stale, {"table": dataset})
    mute = Dataset(dataset.store, replace(dataset.manifest, qa=()))
    with pytest.raises(ConfigError, match="no qa samples"):
        Mixture(config(1, 1).plan(dataset.store), {"table": mute})
    source = MixtureSource("table", 1, "x", "robot", -1.0)
    with pytest.raises(ConfigError, match="not positive"):
        make_plan([source], 0, 4)
    with pytest.raises(ConfigError, match="global batch"):
        make_plan([], 0, 4)
