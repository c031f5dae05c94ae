from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.data.test_table import OPTIONS, make_episode, put, staged_of
from tests.factories import write_calvin
from upvla.data import objects, tally, versions
from upvla.data.commit import commit, remove
from upvla.data.export import export_lerobot
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.objects import put_table
from upvla.data.shards import stage
from upvla.data.sources import open_source
from upvla.data.stats import Statistics, Summary
from upvla.data.table import Dataset, EpisodeFilter
from upvla.data.upkeep import collect_garbage, diff, history, list_datasets, remove_where, repair, verify
from upvla.data.versions import list_tags, load_manifest, open_version, set_tag
from upvla.errors import AlreadyExists, ConfigError, Corrupt, Mismatch, NotFound, StoreError
from upvla.images import decode_image
from upvla.store import LocalStore, Store, open_store
from upvla.store.s3 import S3Store


def test_removed_recordings_stay_out_and_older_versions_keep_them(store: Store) -> None:
    first = put(store, range(6))
    row = Dataset(store, first).episodes[2]
    second = remove_where(store, "d", EpisodeFilter(keys=(row.source_key,)), "the lens was dirty")
    assert (second.version, second.num_episodes, dict(second.quarantined)) == (2, 5, {"removed": 1})
    assert second.operation == {"kind": "removed", "added": 0, "removed": 1, "because": "the lens was dirty"}
    assert row.id not in {episode.id for episode in Dataset(store, second).episodes}
    assert row.id in {episode.id for episode in Dataset(store, load_manifest(store, "d", 1)).episodes}
    assert put(store, range(6)) == second  # the same content does not come back
    third = put(store, range(8))
    assert (third.num_episodes, third.parent) == (7, 2)
    assert diff(store, "d@1", "d@3")["removed"] == [row.source_key]
    assert len(diff(store, "d@1", "d@3")["added"]) == 2
    changed = {key: value for key, value in diff(store, "d@1", "d@3").items() if key in ("steps", "quarantined")}
    assert changed == {"steps": 12, "quarantined": {"removed": 1}}
    assert [entry["operation"]["kind"] for entry in history(store, "d")] == ["append", "removed", "append"]
    assert list_datasets(store) == ["d"]


def test_statistics_forget_what_was_removed(tmp_path: Path) -> None:
    store, alone = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    put(store, range(6), fraction=0.0)
    gone = [
        row.id for row in Dataset(store, load_manifest(store, "d")).episodes if row.source_key in ("key-4", "key-5")
    ]
    assert remove(store, "d", gone, "test").stats_id == put(alone, range(4), fraction=0.0).stats_id


def test_filters_that_mean_everything_or_nothing_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, range(3))
    for where, message in (
        (EpisodeFilter(), "would remove everything"),
        (EpisodeFilter(scenes=("Z",)), "no recording fits"),
    ):
        with pytest.raises(ConfigError, match=message):
            remove_where(store, "d", where, "test")
    with pytest.raises(Corrupt, match="remove every recording"):
        remove_where(store, "d", EpisodeFilter(min_steps=1), "test")
    assert load_manifest(store, "d").version == 1


def test_tags_name_versions_and_move_only_on_purpose(store: Store) -> None:
    put(store, range(2))
    put(store, range(3))
    set_tag(store, "d", "golden", 1)
    set_tag(store, "d", "golden", 1)
    assert open_version(store, "d@golden").version == 1 and open_version(store, "d").version == 2
    with pytest.raises(AlreadyExists):
        set_tag(store, "d", "golden", 2)
    set_tag(store, "d", "golden", 2, move=True)
    assert list_tags(store, "d") == {"golden": 2} and open_version(store, "d@2").version == 2
    with pytest.raises(NotFound, match="no version or tag 'silver'; tags: golden"):
        open_version(store, "d@silver")
    with pytest.raises(NotFound):
        set_tag(store, "d", "late", 9)
    with pytest.raises(ConfigError, match="is no tag"):
        set_tag(store, "d", "7", 1)


def test_garbage_is_what_no_version_has(store: Store) -> None:
    put(store, [0, 1])
    put(store, [2])
    gone = [
        row.id for row in Dataset(store, load_manifest(store, "d")).episodes if row.source_key in ("key-0", "key-1")
    ]
    remove(store, "d", gone, "test")
    staged_of(store, [make_episode(9)])  # an ingest that never committed
    root = store.sub("datasets/d")
    before = set(root.list())
    assert collect_garbage(store, "d")["objects"] == []  # all of it is young
    orphans = collect_garbage(store, "d", grace_s=0, dry_run=True)["objects"]
    assert {key.split("/")[0] for key in orphans} == {"data", "index"} and set(root.list()) == before
    collect_garbage(store, "d", grace_s=0)
    assert set(root.list()) == before - set(orphans)
    assert [verify(store, load_manifest(store, "d", version)) for version in (1, 2, 3)] == [[], [], []]
    set_tag(store, "d", "keep", 1)
    found = collect_garbage(store, "d", grace_s=0, keep_versions=1)
    assert found["versions"] == [2] and root.list("_manifest/v") == [
        "_manifest/v00000001.json",
        "_manifest/v00000003.json",
    ]
    assert verify(store, load_manifest(store, "d", 1)) == verify(store, load_manifest(store, "d", 3)) == []
    assert put(store, [5]).version == 4


def _grow_old(folder: Path, days: float = 8) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, times=(path.stat().st_atime, path.stat().st_mtime - days * 24 * 3600))


def test_garbage_beside_a_rerun_leaves_what_it_relies_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = open_store(str(tmp_path / "store")), tmp_path / "store" / "datasets" / "d"
    raw = write_calvin(tmp_path / "raw", (4, 5, 6), static=(32, 32, 3), gripper=(32, 32, 3))
    config = IngestConfig(format="calvin", dataset="d", recordings_per_task=1, qa_per_episode=2)
    with monkeypatch.context() as dying:
        dying.setattr("upvla.data.ingest.commit", lambda *args, **more: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            ingest(store, config, str(raw))
    _grow_old(folder)

    def late(*args: Any, **more: Any) -> Any:
        assert collect_garbage(store, "d")["objects"] == []
        return commit(*args, **more)

    monkeypatch.setattr("upvla.data.ingest.commit", late)
    assert ingest(store, config, str(raw))["recordings"] == 3
    assert verify(store, load_manifest(store, "d")) == []


def test_what_is_staged_again_is_as_young_as_what_is_new(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, [0])
    staged_of(store, [make_episode(9)])
    _grow_old(tmp_path)
    again = staged_of(store, [make_episode(9)])  # no receipt vouches for it yet
    assert collect_garbage(store, "d")["objects"] == []
    assert verify(store, commit(store, "d", [again], validation_fraction=0.2, options=OPTIONS)) == []


def test_nothing_is_committed_that_garbage_took_and_a_rerun_stages_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    root = store.sub("datasets/d")
    raw = write_calvin(tmp_path / "raw", (4, 5, 6), static=(32, 32, 3), gripper=(32, 32, 3))
    config = IngestConfig(format="calvin", dataset="d", recordings_per_task=1, qa_per_episode=0)

    def late(*args: Any, **more: Any) -> Any:
        root.delete(root.list("data/")[1])
        return commit(*args, **more)

    with monkeypatch.context() as racing:
        racing.setattr("upvla.data.ingest.commit", late)
        with pytest.raises(NotFound, match=r"data/.* is gone.*nothing was committed, run the ingest again"):
            ingest(store, config, str(raw))
    assert root.list("_manifest/") == [] and len(root.list("staging/")) == 3
    assert ingest(store, config, str(raw))["recordings"] == 3
    assert verify(store, load_manifest(store, "d")) == []


def test_garbage_is_also_what_writes_left_that_never_ended(store: Store) -> None:
    put(store, [0])
    root = store.sub("datasets/d")
    if isinstance(root, LocalStore):
        cut = Path(root.url, "data", ".tmp-0123")
        cut.write_bytes(b"half a shard")
    else:
        assert isinstance(root, S3Store)
        root._client().create_multipart_upload(Bucket=root.bucket, Key=f"{root.prefix}data/half.parquet")
    assert collect_garbage(store, "d")["objects"] == []  # it may still be written
    (name,) = root.unfinished()
    assert name.startswith("data/") and name not in root.list()
    assert collect_garbage(store, "d", grace_s=0, dry_run=True)["objects"] == [name] and list(root.unfinished()) == [
        name
    ]
    assert collect_garbage(store, "d", grace_s=0)["objects"] == [name] and root.unfinished() == {}
    root.abandon(name)  # somebody else's `gc` was first
    assert verify(store, load_manifest(store, "d")) == []


def test_a_clock_that_is_wrong_deletes_nothing_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    put(store, [0])
    staged_of(store, [make_episode(9)])
    real = time.time
    for number, skew in enumerate((3600.0, -3600.0, 30 * 24 * 3600.0)):
        monkeypatch.setattr(time, "time", lambda skew=skew: real() + skew)
        assert collect_garbage(store, "d", grace_s=1800)["objects"] == []
        put(store, [1 + number])
    assert load_manifest(store, "d").version == 4  # versions are counted, not timed


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_found_and_repaired_from_the_source(tmp_path: Path, how: str) -> None:
    store = open_store(str(tmp_path / "store"))
    raw = write_calvin(tmp_path / "raw", (4, 5, 6), static=(32, 32, 3), gripper=(32, 32, 3))
    config = IngestConfig(format="calvin", dataset="d", recordings_per_task=1, qa_per_episode=0)
    ingest(store, config, str(raw))
    manifest = load_manifest(store, "d")
    assert verify(store, manifest) == [] and repair(store, "d") == (manifest, [])
    path = tmp_path / "store" / "datasets" / "d" / manifest.shards[1].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[:-9])
    (damage,) = verify(store, manifest)
    assert damage.key == manifest.shards[1].key and len(damage.episodes) == 1
    repaired, damages = repair(store, "d")
    assert (repaired.version, repaired.num_episodes, damages) == (2, 2, [damage])
    assert dict(repaired.quarantined) == {"damaged": 1} and verify(store, repaired) == []
    back = ingest(store, config, str(raw))
    assert (back["version"], back["recordings"], back["quarantined"]) == (3, 3, {})
    assert verify(store, load_manifest(store, "d")) == [] and verify(store, manifest) == []  # the old version too
    assert load_manifest(store, "d").content_id == manifest.content_id


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _forget() -> None:
    """As a process that has read nothing yet."""
    for kept in (objects._rows, objects._summaries, tally._tallies):
        kept._values.clear()
    versions._newest.clear()


@pytest.mark.parametrize("shard_too", [False, True])
def test_an_index_that_is_damaged_costs_its_shard_until_the_source_is_ingested_again(
    tmp_path: Path, shard_too: bool
) -> None:
    store, folder = open_store(str(tmp_path / "store")), tmp_path / "store" / "datasets" / "d"
    raw = write_calvin(tmp_path / "raw", (4, 5, 6), static=(32, 32, 3), gripper=(32, 32, 3))
    config = IngestConfig(format="calvin", dataset="d", recordings_per_task=1, qa_per_episode=0)
    ingest(store, config, str(raw))
    manifest = load_manifest(store, "d")
    broken = [manifest.index[1].key, *([manifest.shards[1].key] if shard_too else [])]
    for key in broken:
        _flip(folder / key)
    _forget()
    assert [damage.key for damage in verify(store, manifest)] == broken
    repaired, damages = repair(store, "d")
    assert (repaired.version, repaired.num_episodes) == (2, 2) and [damage.key for damage in damages] == broken
    assert dict(repaired.quarantined) == ({} if shard_too else {"damaged": 1})
    assert (repaired.operation["kind"], repaired.operation["removed"]) == ("damaged", 1)
    _forget()
    assert verify(store, repaired) == [] and len(Dataset(store, repaired).episodes) == 2
    back = ingest(store, config, str(raw))
    assert (back["version"], back["recordings"], back["quarantined"]) == (3, 3, {})
    assert verify(store, load_manifest(store, "d")) == verify(store, manifest) == []
    assert load_manifest(store, "d").content_id == manifest.content_id


def test_damaged_statistics_are_counted_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = put(store, range(3))
    path = tmp_path / "datasets" / "d" / f"stats/{manifest.stats_id}.json"
    good = path.read_bytes()
    for harm in (b"{}", good.replace(b"1", b"2", 1), None):
        path.unlink() if harm is None else path.write_bytes(harm)
        (damage,) = verify(store, manifest)
        assert damage.key == f"stats/{manifest.stats_id}.json"
        assert repair(store, "d") == (manifest, [damage]) and path.read_bytes() == good
    assert verify(store, manifest) == []


def test_damaged_descriptions_are_not_repaired_but_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, range(3))
    manifest = remove_where(store, "d", EpisodeFilter(keys=("key-1",)), "test")
    assert manifest.quarantine is not None
    _flip(tmp_path / "datasets" / "d" / manifest.quarantine.key)
    (damage,) = verify(store, manifest)
    assert damage.key == manifest.quarantine.key
    with pytest.raises(NotFound, match=r"quarantine/.*cannot be rebuilt"):
        repair(store, "d")


def test_anybodys_reader_opens_the_tables(tmp_path: Path) -> None:
    manifest = put(open_store(str(tmp_path)), range(3))
    path = tmp_path / "datasets" / "d" / manifest.shards[0].key
    expected = make_episode(0).actions
    assert np.array_equal(np.stack(pq.read_table(path)["action"].to_pylist()[:12]).astype(np.float32), expected)
    assert np.array_equal(np.stack(pd.read_parquet(path)["action"].to_list()[:12]), expected)
    rows = duckdb.sql(f"select step, action[1], octet_length(image_static) from '{path}' order by timestamp").fetchall()
    assert len(rows) == 36 and all(size > 100 for _, _, size in rows)
    assert sorted({round(value, 5) for step, value, _ in rows if step == 0}) == sorted(
        {round(float(make_episode(i).actions[0, 0]), 5) for i in range(3)}
    )


class _Forgetful(LocalStore):
    """A store that takes `create` for `write`, as some S3 clones do."""

    def create(self, key: str, data: bytes) -> str:
        self.write(key, data)
        return ""


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upvla.data.commit.open_store", _Forgetful)
    store = _Forgetful(str(tmp_path))
    with pytest.raises(StoreError, match="If-None-Match"):
        commit(store, "d", [staged_of(store, [make_episode(0)])], validation_fraction=0.2, options=OPTIONS)
    assert store.list("datasets/d/_manifest") == []


def test_descriptions_of_other_formats_are_read_or_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, range(2))
    root = store.sub("datasets/d")
    value = root.read_json("_manifest/v00000001.json")
    old = {key: part for key, part in value.items() if key not in ("format", "operation")}
    root.write_json("_manifest/v00000002.json", old | {"version": 2})
    assert Dataset(store, load_manifest(store, "d", 2)).episodes and load_manifest(store, "d", 2).format == 1
    root.write_json("_manifest/v00000003.json", value | {"format": 99})
    with pytest.raises(Mismatch, match=r"format 99.*upgrade upvla"):
        load_manifest(store, "d", 3)


def test_datasets_of_the_first_format_are_read_verified_and_added_to(tmp_path: Path) -> None:
    """tests/data/format1 was written by the code before this format: T33."""
    shutil.copytree(Path(__file__).parent / "format1", tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    old = load_manifest(store, "old")
    assert (old.format, old.num_episodes, dict(old.quarantined)) == (1, 2, {"missing_frame": 1})
    assert verify(store, old) == []
    dataset = Dataset(store, old)
    assert [row.length for row in dataset.episodes] == [6, 5] and len(dataset.qa) == sum(ref.rows for ref in old.qa)
    frames = dataset.read(0, range(6), ["image_static", "action"])
    assert frames["action"].shape == (6, 7) and decode_image(frames["image_static"][5]).shape == (24, 24, 3)
    counted = Statistics.merged(
        summary for row, summary in zip(dataset.episodes, dataset.summaries(), strict=True) if row.split == "train"
    )
    assert counted == dataset.stats
    raw = write_calvin(tmp_path / "raw", (5, 4, 6), static=(24, 24, 3), gripper=(16, 16, 3))
    config = IngestConfig(format="calvin", dataset="old", validation_fraction=0.5, qa_per_episode=4)
    assert ingest(store, config, str(raw))["recordings"] == 3
    new = load_manifest(store, "old")
    assert (new.format, new.version, new.parent, dict(new.quarantined)) == (2, 2, 1, {})
    assert {row.id for row in dataset.episodes} < {row.id for row in Dataset(store, new).episodes}
    assert verify(store, new) == []


def test_datasets_of_the_second_format_keep_their_ids_and_what_was_removed(tmp_path: Path) -> None:
    """tests/data/format2 was written by the code of f366410, the last before ids were BLAKE3: T33. The third of its
    four recordings was removed."""
    shutil.copytree(Path(__file__).parent / "format2", tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    root, old = store.sub("datasets/old"), load_manifest(store, "old")
    assert (old.format, old.version, old.num_episodes, dict(old.quarantined)) == (2, 2, 3, {"removed": 1})
    assert verify(store, old) == verify(store, load_manifest(store, "old", 1)) == []
    (listing,) = root.parquet(old.index[0].key).read(["summary", "row_groups"]).to_pylist()[:1]
    assert isinstance(json.loads(listing["summary"])["action"]["buckets"], str) and listing["row_groups"] == [0]
    dataset = Dataset(store, old)
    assert [row.id[:4] for row in dataset.episodes] == ["5e29", "cf9f", "f5f6"]
    assert [row.length for row in dataset.episodes] == [4, 5, 5] and dataset.qa
    frames = dataset.read(2, range(5), ["image_gripper", "state"])
    assert frames["state"].shape == (5, 15) and decode_image(frames["image_gripper"][4]).shape == (16, 16, 3)
    assert dataset.counted_stats() == dataset.stats
    sizes: dict[str, Any] = {"static": (24, 24, 3), "gripper": (16, 16, 3), "scenes": ("calvin_scene_A",)}
    raw = write_calvin(tmp_path / "raw", (5, 4, 6, 5, 8), **sizes)  # the four again, and one more
    config = IngestConfig(format="calvin", dataset="old", validation_fraction=0.5, qa_per_episode=4)
    assert ingest(store, config, str(raw))["recordings"] == 4
    new = load_manifest(store, "old")
    assert (new.format, new.version, new.parent, dict(new.quarantined)) == (2, 3, 2, {"removed": 1})
    found = {row.source_key: row.id for row in Dataset(store, new).episodes}
    assert {row.source_key: row.id for row in dataset.episodes}.items() < found.items()
    source = open_source("calvin", str(raw))
    alike = stage(store.sub("elsewhere"), [(source.read("0000020-0000027"), "token")], hashing="blake2b")
    (row,) = objects.read_index(store.sub("elsewhere"), alike.index[0])
    assert found["0000020-0000027"] == row["episode_id"].hex()
    assert verify(store, new) == [] and new.stats_id != old.stats_id
    assert Dataset(store, new).counted_stats().stats_id == new.stats_id


def test_an_index_that_misstates_row_groups_is_damage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest, root = put(store, range(3)), store.sub("datasets/d")
    table = root.parquet(manifest.index[0].key).read()
    place = table.schema.get_field_index("row_groups")
    shifted = [[start + 1 for start in starts] for starts in table["row_groups"].to_pylist()]
    wrong = put_table(root, "index", table.set_column(place, table.schema.field(place), [shifted]))
    (damage,) = verify(store, replace(manifest, index=(wrong,)))
    assert damage.key == manifest.shards[0].key and "row groups do not begin" in damage.what


def _nudge(figures: list[float], dim: int) -> None:
    figures[dim] = float(np.nextafter(figures[dim], 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _nudge(s["action"]["mean"], 2), "action dimension 2 differs in mean"),
        (lambda s: s["action"]["q99"].reverse(), "action dimension 0 differs in q99"),
        (lambda s: s["state"]["std"].pop(), "state has 14 dimensions"),
        (lambda s: s.pop("state"), "'state' is only in the recordings"),
        (lambda s: s["state"].pop("q01"), "lack or misstate"),
        (lambda s: s["action"]["q01"].__setitem__(3, s["action"]["q99"][3]), "action dimension 3 differs in q01"),
    ],
)  # fmt: skip
def test_figures_that_are_not_the_recordings_are_refused_by_dimension(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """T23: another data set's figures, permuted ones, one bit of one."""
    store = open_store(str(tmp_path))
    manifest = put(store, range(4))
    root, key = store.sub("datasets/d"), f"stats/{manifest.stats_id}.json"
    figures = root.read_json(key)
    change(figures)
    root.write_json(key, figures)
    with pytest.raises((Mismatch, Corrupt), match=message):
        Dataset(store, manifest).stats  # noqa: B018
    (damage,) = verify(store, manifest)
    assert damage.key == key


def test_figures_that_would_spoil_training_are_refused(tmp_path: Path) -> None:
    stats = Dataset(open_store(str(tmp_path)), put(open_store(str(tmp_path)), range(4))).stats
    stats.require_usable("the data")
    action = stats.features["action"]
    for change, message in (
        ({"std": (float("nan"), *action.std[1:])}, "action dimension 0 has figures that are not finite"),
        ({"low": (*action.low[:5], 9.0, action.low[6])}, "action dimension 5 has figures that contradict"),
    ):
        broken = Statistics({**stats.features, "action": replace(action, **change)})  # type: ignore[arg-type]
        with pytest.raises(Mismatch, match=rf"of the data would spoil training: {message}.*stats check"):
            broken.require_usable("the data")


def test_an_export_is_read_back_by_the_lerobot_source(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    manifest = put(store, range(3))
    dataset, target = Dataset(store, manifest), open_store(str(tmp_path / "out"))
    found = export_lerobot(dataset, target)
    assert (found["recordings"], found["steps"]) == (3, 36)
    source = open_source("lerobot", target.url)  # it says itself what its actions mean
    for number, key in enumerate(source.keys()):
        row, episode = dataset.episodes[number], source.read(key)
        original = dataset.read(number, range(row.length), ["action", "state", "image_static"])
        assert np.array_equal(episode.actions, original["action"]) and np.array_equal(episode.state, original["state"])
        assert episode.images["static"] == original["image_static"] and episode.action_space == manifest.action_space
        assert episode.spans[0].text == row.spans[0].text
    tasks = pd.read_parquet(tmp_path / "out" / "meta" / "tasks.parquet")
    assert list(tasks.columns) == ["task_index"] and tasks.iloc[0].name == dataset.episodes[0].spans[0].text
    stats = target.read_json("meta/stats.json")
    everything = np.concatenate([dataset.read(i, range(12), ["action"])["action"] for i in range(3)])
    assert np.allclose(stats["action"]["mean"], everything.mean(0), atol=1e-5)
    assert np.allclose(stats["action"]["std"], everything.std(0), atol=1e-5)
    frame = decode_image(dataset.read(0, [0], ["image_static"])["image_static"][0])
    assert np.shape(stats["observation.images.static"]["mean"]) == (3, 1, 1) and frame.shape[2] == 3
    with pytest.raises(AlreadyExists, match="not empty"):
        export_lerobot(dataset, target)


def test_statistics_name_the_dimension_that_differs() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    values = rng.normal(0, 1, (500, 3)).astype(np.float32)
    stats = Statistics.merged([{"action": Summary.of(values)}])
    stats.require_equal(stats, ours="a", theirs="b")
    feature = stats.features["action"]
    for change, message in (
        (
            {"mean": (*feature.mean[:2], float(np.nextafter(feature.mean[2], 9)))},
            "action dimension 2 differs in mean: the model",
        ),
        ({"q99": feature.q99[::-1]}, "action dimension 0 differs in q99"),
        ({"mean": feature.mean[:2]}, "action has 3 dimensions in the model, 2 in the data"),
    ):
        other = Statistics({"action": replace(feature, **change)})  # type: ignore[arg-type]
        with pytest.raises(Mismatch, match=message):
            stats.require_equal(other, ours="the model", theirs="the data")
    with pytest.raises(Mismatch, match="'state' is only in the data"):
        stats.require_equal(Statistics({**stats.features, "state": feature}), ours="the model", theirs="the data")
    values[:, 1] = 0
    values[3, 1] = 3.2  # a dimension that moves once in 500 steps
    values[:, 2] = 7
    sparse = Statistics.merged([{"action": Summary.of(values)}])
    assert [(f.dim, f.fatal) for f in sparse.check()] == [(1, False), (2, False)]
    broken = Statistics({"action": replace(feature, std=(float("nan"), *feature.std[1:]))})
    assert [(f.dim, f.fatal) for f in broken.check()] == [(0, True)]
