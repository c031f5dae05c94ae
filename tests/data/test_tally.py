from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.test_table import make_episode, put, staged_of
from upvla.data import objects, tally
from upvla.data.commit import remove
from upvla.data.stats import Statistics, Summary, folded
from upvla.data.table import Dataset, load_manifest
from upvla.data.tally import statistics_of
from upvla.data.upkeep import collect_garbage
from upvla.data.versions import dataset_root
from upvla.store import open_store


def test_what_came_and_went_gives_the_same_bits_as_counting_from_the_start(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    root = dataset_root(store, "d")
    parts = [
        staged_of(store, [make_episode(number) for number in numbers]) for numbers in ((0, 1, 2), (3,), range(4, 20))
    ]
    index = [ref for part in parts for ref in part.index]
    known: dict[str, dict[str, Summary]] = {}
    for ref in index:
        ids = [row["episode_id"].hex() for row in objects.read_index(root, ref)]
        known |= objects.read_summaries(root, ref, ids)
    rng = np.random.Generator(np.random.Philox(0))
    for _ in range(30):
        ids = frozenset(rng.choice(sorted(known), int(rng.integers(1, 21)), replace=False).tolist())
        expected = folded((identity, known[identity]) for identity in ids)
        assert statistics_of(root, index, ids) == Statistics.of(expected)
        held = tally._tallies.get(root, "")
        assert held is not None and held.features.keys() == expected.keys()
        for name, feature in held.features.items():
            assert [part.tobytes() for part in feature] == [part.tobytes() for part in expected[name]]
            sums, others = feature.merged(), expected[name].merged()
            assert all(
                np.asarray(vars(sums)[key]).tobytes() == np.asarray(vars(others)[key]).tobytes() for key in vars(sums)
            )
    assert statistics_of(root, index, frozenset()) == Statistics({})
    of_the_last = frozenset(row["episode_id"].hex() for row in objects.read_index(root, index[2]))
    statistics_of(root, index, frozenset(known))
    expected = folded((identity, known[identity]) for identity in of_the_last)
    assert statistics_of(root, index[2:], of_the_last) == Statistics.of(
        expected
    )  # the rest has gone with its summaries


def test_a_commit_parses_no_summary_but_those_of_what_it_adds_or_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calm, parsed = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "calm")), list[str]()
    put(store, range(12))
    real = objects.read_summaries

    def told(root: objects.Store, ref: objects.ShardRef, ids: list[str]) -> dict[str, dict[str, Summary]]:
        objects._summaries._values.clear()  # as if they were more than are kept
        parsed.extend(ids)
        return real(root, ref, ids)

    monkeypatch.setattr(tally, "read_summaries", told)
    put(store, [12])
    assert len(parsed) == 1
    (gone,) = [row.id for row in Dataset(store, load_manifest(store, "d")).episodes if row.source_key == "key-4"]
    remove(store, "d", [gone], "test")
    last = put(store, [13])
    assert len(parsed) <= 3
    monkeypatch.undo()
    put(calm, [number for number in range(14) if number != 4])
    assert load_manifest(calm, "d").stats_id == last.stats_id


def test_the_next_process_goes_on_from_what_was_left_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calm, parsed = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "calm")), list[str]()
    root, real = dataset_root(store, "d"), objects.read_summaries

    def told(root: objects.Store, ref: objects.ShardRef, ids: list[str]) -> dict[str, dict[str, Summary]]:
        parsed.extend(ids)
        return real(root, ref, ids)

    def commit_in_a_new_process(number: int) -> int:
        for kept in (objects._rows, objects._summaries, tally._tallies):
            kept._values.clear()
        parsed.clear()
        put(store, [number])
        return len(parsed)

    expected = put(calm, range(16)).stats_id
    monkeypatch.setattr(tally, "_MUCH", 5)
    monkeypatch.setattr(tally, "read_summaries", told)
    put(store, range(12))
    (key,) = root.list("tally/")
    assert commit_in_a_new_process(12) <= 1 and root.list("tally/") == [key]
    damaged = bytearray(root.read(key))
    damaged[-3] ^= 1
    root.write(key, bytes(damaged))
    assert commit_in_a_new_process(13) > 5 and len(root.list("tally/")) == 2
    assert commit_in_a_new_process(14) <= 2
    assert {name for name in collect_garbage(store, "d", grace_s=0)["objects"] if name.startswith("tally/")}
    assert commit_in_a_new_process(15) > 5 and load_manifest(store, "d").stats_id == expected
