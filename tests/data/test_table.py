from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from upvla.data import shards, versions
from upvla.data.commit import commit, remove
from upvla.data.identity import Hashing, episode_id
from upvla.data.shards import Layout, Rejection, Staged, stage
from upvla.data.table import Dataset, load_manifest
from upvla.data.versions import dataset_root
from upvla.errors import Corrupt, Mismatch, NotFound
from upvla.images import decode_image
from upvla.store import Store, open_store
from upvla.types import CALVIN_RELATIVE, Episode, Manifest, Span

OPTIONS = {"format": "synthetic"}


def make_episode(number: int, steps: int = 12, *, scene: str = "A", size: int = 16) -> Episode:
    rng = np.random.Generator(np.random.Philox(number))
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 6] = np.sign(actions[:, 6])
    return Episode(
        id=f"key-{number}",
        source="synthetic",
        embodiment="arm",
        scene=scene,
        action_space=CALVIN_RELATIVE,
        rate_hz=30.0,
        timestamps=np.arange(steps) / 30,
        images={"static": rng.integers(0, 255, (steps, size, size, 3), np.uint8)},
        state=rng.normal(size=(steps, 15)).astype(np.float32),
        actions=actions,
        spans=(Span(0, steps, f"do {number}", "do"), Span(2, steps, "again", "again")),
        scene_state=np.zeros((steps, 24), np.float32),
    )


def put(store: Store, numbers: Sequence[int], *, layout: Layout | None = None, fraction: float = 0.2) -> Manifest:
    staged = staged_of(store, [make_episode(number) for number in numbers], layout)
    return commit(store, "d", [staged], validation_fraction=fraction, options=OPTIONS)


def staged_of(store: Store, episodes: Sequence[Episode], layout: Layout | None = None) -> Staged:
    return stage(dataset_root(store, "d"), [(episode, "token") for episode in episodes], layout=layout)


def test_what_is_read_is_what_was_written(store: Store) -> None:
    dataset = Dataset(store, put(store, range(5)))
    assert [episode.source_key for episode in dataset.episodes] != [f"key-{i}" for i in range(5)]  # sorted by content
    for row, episode in enumerate(dataset.episodes):
        original = make_episode(int(episode.source_key[4:]))
        assert (episode.length, episode.spans, episode.scene) == (12, original.spans, "A")
        found = dataset.read(row, [11, 3, 3], ["action", "state", "timestamp", "step", "image_static"])
        assert np.array_equal(found["action"], original.actions[[11, 3, 3]])
        assert np.array_equal(found["state"], original.state[[11, 3, 3]])
        assert np.array_equal(found["timestamp"], original.timestamps[[11, 3, 3]])
        assert found["step"].tolist() == [11, 3, 3]
        assert decode_image(found["image_static"][1]).shape == (16, 16, 3)
        with pytest.raises(IndexError, match=f"{episode.source_key}: rows 12 to 12 of 12"):
            dataset.read(row, [12], ["action"])
    assert (dataset.manifest.num_episodes, dataset.manifest.num_steps, dataset.manifest.num_spans) == (5, 60, 10)


@pytest.mark.parametrize(
    ("hashing", "identity"),
    [("blake3", "2a94c86b959e18eeb81fa83b018ed983"), ("blake2b", "e76bf0e3ae77f27646b8a99e0b7f0499")],
)
def test_an_id_stays_what_it_is(hashing: Hashing, identity: str) -> None:
    """Datasets, splits, mixtures and codes hang on it."""
    frames = {"static": [b"first", b"second"]}
    episode = replace(
        make_episode(1, 2),
        images=frames,
        actions=np.full((2, 7), 0.5, np.float32),
        state=np.arange(30, dtype=np.float32).reshape(2, 15),
    )
    assert episode_id(episode, {"static": b"firstsecond"}, hashing) == identity


def test_recordings_of_other_ids_do_not_come_in(store: Store) -> None:
    staged = stage(dataset_root(store, "d"), [(make_episode(1), "token")], hashing="blake2b")
    assert Staged.from_json(staged.to_json()) == staged
    with pytest.raises(Mismatch, match=r"by blake3, the new came by blake2b: .* run the ingest again"):
        commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS)
    assert put(store, range(2)).format == 3


def test_any_parquet_reader_can_open_a_shard(tmp_path: Path) -> None:
    manifest = put(open_store(str(tmp_path)), range(3))
    table = pq.read_table(tmp_path / "datasets" / "d" / manifest.shards[0].key)
    assert table.num_rows == 36 and not any(field.nullable for field in table.schema)
    assert table["action"].to_pylist()[0] == make_episode(0).actions[0].tolist()


def test_long_recordings_span_row_groups_and_shards_roll_between_recordings(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    layout = Layout(row_group_bytes=4_000, max_row_group_bytes=8_000, shard_bytes=30_000)
    manifest = put(store, range(6), layout=layout)
    dataset = Dataset(store, manifest, pool_mb=1)
    assert len(manifest.shards) > 1
    files = [dataset.root.parquet(shard.key).metadata for shard in manifest.shards]
    assert all(file.num_rows % 12 == 0 for file in files)
    assert any(file.num_row_groups > file.num_rows // 12 for file in files)
    for row, episode in enumerate(dataset.episodes):
        original = make_episode(int(episode.source_key[4:]))
        assert np.array_equal(dataset.read(row, range(12), ["action"])["action"], original.actions)
    assert manifest.content_id == put(open_store(str(tmp_path / "other")), range(6)).content_id  # packing is no content


def test_pictures_beyond_one_array_are_written_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [make_episode(number) for number in range(3)]
    whole = staged_of(open_store(str(tmp_path / "whole")), episodes)
    monkeypatch.setattr(shards, "_ARRAY_BYTES", 1)  # as if a recording's pictures were 2 GB
    assert staged_of(open_store(str(tmp_path / "apart")), episodes) == whole


def test_committing_again_changes_nothing_and_new_recordings_make_a_version(store: Store) -> None:
    first = put(store, range(6))
    objects = store.list()
    assert put(store, range(6)) == first and store.list() == objects
    assert put(store, [2, 3]) == first
    second = put(store, [5, 6, 7])
    assert (second.version, second.parent, second.num_episodes) == (2, 1, 8)
    assert second.content_id != first.content_id and load_manifest(store, "d", 1) == first
    assert load_manifest(store, "d") == second
    old, new = Dataset(store, first), Dataset(store, second)
    sides = {episode.id: episode.split for episode in new.episodes}
    assert all(sides[episode.id] == episode.split for episode in old.episodes)


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (2, 0.99), (40, 0.2), (3, 0.0)])
def test_both_splits_have_a_recording_wherever_there_are_two(tmp_path: Path, count: int, fraction: float) -> None:
    manifest = put(open_store(str(tmp_path)), range(count), fraction=fraction)
    sides = [episode.split for episode in Dataset(open_store(str(tmp_path)), manifest).episodes]
    if fraction:
        assert {"train", "validation"} == set(sides)
        assert abs(sides.count("validation") - fraction * count) <= max(1, 0.15 * count)
    else:
        assert set(sides) == {"train"}


def test_statistics_are_of_the_training_split_only(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    dataset = Dataset(store, put(store, range(10)))
    training = [make_episode(int(e.source_key[4:])).actions for e in dataset.episodes if e.split == "train"]
    assert np.allclose(dataset.stats.features["action"].mean, np.concatenate(training).mean(0), atol=1e-5)
    assert dataset.stats.features["action"].count == 12 * len(training)


def test_equal_content_is_stored_once_and_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    twin = replace(make_episode(1), id="twin")
    staged = staged_of(store, [make_episode(0), make_episode(1), twin])
    manifest = commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS)
    assert (manifest.num_episodes, dict(manifest.quarantined)) == (2, {"duplicate": 1})
    assert Dataset(store, manifest).quarantine == [Rejection("twin", "duplicate", "the same content as key-1", "token")]


def test_unlike_recordings_and_options_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, range(3))
    with pytest.raises(Mismatch, match="validation_fraction"):
        put(store, [9], fraction=0.5)
    with pytest.raises(Mismatch, match="format='synthetic', not 'other'"):
        staged = staged_of(store, [make_episode(9)])
        commit(store, "d", [staged], validation_fraction=0.2, options={"format": "other"})
    slow = replace(make_episode(9), action_space=replace(CALVIN_RELATIVE, dt_s=0.1))
    blind = replace(make_episode(9), scene_state=None)
    for odd, message in ((slow, "dt_s"), (blind, "scene_state")):
        with pytest.raises(Mismatch, match=message):
            commit(store, "d", [staged_of(store, [odd])], validation_fraction=0.2, options=OPTIONS)
        with pytest.raises(Mismatch, match=message):
            staged_of(store, [make_episode(0), odd])
    assert load_manifest(store, "d").version == 1


@pytest.mark.parametrize("elsewhere", ["a commit", "a removal", "all deleted"])
def test_a_commit_after_somebody_elses_starts_from_theirs(store: Store, elsewhere: str) -> None:
    """This process remembers a version; another one has moved on, and told nobody."""
    known = put(store, range(3))
    root, remembered = dataset_root(store, "d"), versions._newest.copy()
    if elsewhere == "a commit":
        put(store, [3])
    elif elsewhere == "a removal":
        remove(store, "d", {Dataset(store, known).episodes[0].id}, "a test")
    else:
        for key in root.list():
            root.delete(key)
    versions._newest.clear()
    versions._newest.update(remembered)
    made = put(store, [4])
    expected = {"a commit": (3, 5), "a removal": (3, 3), "all deleted": (1, 1)}[elsewhere]
    assert (made.version, made.num_episodes) == expected
    assert len(Dataset(store, load_manifest(store, "d")).episodes) == made.num_episodes


def test_too_few_accepted_stops_the_commit(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    bad = [Rejection(f"bad-{i}", "non_finite", "NaN", "token") for i in range(3)]
    staged = stage(dataset_root(store, "d"), [(make_episode(0), "token"), *bad])
    with pytest.raises(Corrupt, match=r"3 of 4 recordings rejected.*non_finite.*quarantine/") as caught:
        commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS, min_accept_ratio=0.5)
    with pytest.raises(NotFound):
        load_manifest(store, "d")
    listing = str(caught.value).split("listed in ")[1].split(";")[0]
    assert pq.read_table(listing).num_rows == 3
    manifest = commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS, min_accept_ratio=0.2)
    assert manifest.quarantined == {"non_finite": 3}


def test_a_bad_delivery_onto_a_large_good_set_stops_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    before = put(store, range(9))
    bad = [Rejection(f"bad-{i}", "non_finite", "NaN", "token") for i in range(3)]
    staged = stage(dataset_root(store, "d"), [(make_episode(10), "token"), *bad])
    append = partial(commit, store, "d", [staged], validation_fraction=0.2, options=OPTIONS)
    with pytest.raises(Corrupt, match=r"3 of 4 recordings that came now rejected.*\{'non_finite': 3\}.*quarantine/"):
        append(min_accept_ratio=0.5)  # ten of thirteen are good
    assert load_manifest(store, "d") == before
    after = append(min_accept_ratio=0.25)
    assert (after.num_episodes, after.quarantined) == (10, {"non_finite": 3})
    assert append(min_accept_ratio=0.5) == after  # again: what was accepted before is not judged twice


def test_concurrent_committers_lose_nothing(store: Store) -> None:
    def work(number: int) -> None:
        barrier.wait()
        for i in range(2):
            put(store, [10 * number + i, 10 * number + i + 1])

    workers = 4
    barrier = threading.Barrier(workers)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    newest = load_manifest(store, "d")
    assert newest.num_episodes == 3 * workers
    versions = [load_manifest(store, "d", version) for version in range(1, newest.version + 1)]
    assert [manifest.parent for manifest in versions] == [None, *range(1, newest.version)]
    counts = [manifest.num_episodes for manifest in versions]
    assert counts == sorted(set(counts))


def test_damaged_objects_are_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = put(store, range(3))
    path = tmp_path / "datasets" / "d" / manifest.shards[0].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF  # among the pixels; the page's checksum knows
    path.write_bytes(data)
    dataset = Dataset(store, manifest)
    with pytest.raises(Corrupt, match=manifest.shards[0].key):
        for row in range(3):
            dataset.read(row, range(12), ["image_static"])
    for name, text in (("v00000001.json", "{}"), ("v00000001.json", "{")):
        (tmp_path / "datasets" / "d" / "_manifest" / name).write_text(text)
        with pytest.raises(Corrupt, match=name):
            load_manifest(store, "d")


def test_threads_share_a_dataset(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    layout = Layout(row_group_bytes=2_000, max_row_group_bytes=4_000, shard_bytes=20_000)
    dataset = Dataset(store, put(store, range(8), layout=layout), pool_mb=0)  # nothing stays: every read reads

    def check(seed: int) -> bool:
        rng = np.random.Generator(np.random.Philox(seed))
        for _ in range(40):
            row, steps = int(rng.integers(8)), rng.integers(0, 12, 3).tolist()
            original = make_episode(int(dataset.episodes[row].source_key[4:]))
            if not np.array_equal(dataset.read(row, steps, ["action"])["action"], original.actions[steps]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))
