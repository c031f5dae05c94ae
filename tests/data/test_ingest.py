from __future__ import annotations

import base64
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.data.test_sources import shared, write_libero
from tests.factories import write_calvin
from upvla.data.ingest import IngestConfig, ingest, portions_of
from upvla.data.report import render_summary
from upvla.data.sources.calvin import CalvinSource
from upvla.data.table import Dataset, load_manifest
from upvla.errors import Corrupt, Mismatch, NotFound
from upvla.images import decode_image
from upvla.store import LocalStore, Store, open_store
from upvla.types import Episode, EpisodeSource

CONFIG = IngestConfig(format="calvin", dataset="table", recordings_per_task=2, validation_fraction=0.3)
LENGTHS = (6, 8, 5, 7, 6)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calvin(tmp_path_factory.mktemp("raw"), LENGTHS, static=(48, 48, 3), gripper=(32, 32, 3))


def test_recordings_become_a_version_and_again_the_same(store: Store, recordings: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = ingest(store, CONFIG, str(recordings), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]
    assert {key: first[key] for key in ("version", "recordings", "segments", "steps", "quarantined")} == {
        "version": 1,
        "recordings": 5,
        "segments": 10,
        "steps": sum(LENGTHS),
        "quarantined": {},
    }
    objects = store.tokens()
    again = ingest(store, CONFIG, str(recordings), progress=lambda done, total: seen.append((done, total)))
    assert (again | {"seconds": 0}) == (first | {"seconds": 0})
    assert len(seen) == 5  # nothing was staged
    assert store.tokens() == objects  # nor written
    dataset = Dataset(store, load_manifest(store, "table"))
    assert dataset.qa and {row.template_split for row in dataset.qa} == {"train", "held_out"}
    assert all(0 <= row.step < dataset.episodes[row.episode].length for row in dataset.qa)


def test_portions_are_even_in_length(tmp_path: Path) -> None:
    class Lengths:
        format, notes = "lengths", dict[str, int]()

        def __init__(self, *lengths: int):
            self.lengths = lengths

        def keys(self) -> list[str]:
            return [str(i) for i in range(len(self.lengths))]

        def token(self, key: str) -> str:
            return "token"

        def read(self, key: str) -> Episode:
            raise AssertionError("portions are made without reading")

    class Measured(Lengths):
        def num_steps(self, key: str) -> int:
            return self.lengths[int(key)]

    def sizes(source: EpisodeSource, size: int) -> list[int]:
        fresh = [(key, source.token(key)) for key in source.keys()]
        portions = list(portions_of(source, fresh, size))
        assert [recording for portion in portions for recording in portion] == fresh  # each once, in order
        return [len(portion) for portion in portions]

    assert sizes(Lengths(*[9000] * 5), 2) == sizes(Measured(*[200] * 5), 2) == [2, 2, 1]
    assert sizes(Measured(200, 200, 9000, 1000, 200, 200, 200), 4) == [2, 1, 3, 1]
    assert sizes(Measured(*[1] * 300), 2) == [128, 128, 44]
    assert sizes(Measured(), 2) == []


def test_a_restart_reads_only_what_no_receipt_is_of(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ingest(open_store(str(tmp_path / "calm")), CONFIG, str(recordings))
    store, keys = open_store(str(tmp_path / "store")), CalvinSource(str(recordings), span_end="exclusive").keys()
    real, read = CalvinSource.read, list[str]()

    def noted(self: CalvinSource, key: str) -> Episode:
        read.append(key)
        if len(read) == 4:  # the second of the second portion
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(CalvinSource, "read", noted)
    with pytest.raises(KeyboardInterrupt):
        ingest(store, CONFIG, str(recordings))
    assert read == keys[:4]
    assert ingest(store, CONFIG, str(recordings))["content_id"] == expected["content_id"]
    assert read[4:] == keys[2:]


def test_an_empty_source_is_said(tmp_path: Path) -> None:
    raw = write_calvin(tmp_path / "raw", (3,))
    np.save(raw / "ep_start_end_ids.npy", np.zeros((0, 2), int))
    with pytest.raises(NotFound, match="holds no recordings"):
        ingest(open_store(str(tmp_path / "store")), CONFIG, str(raw))


def test_new_recordings_are_appended(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    sizes: dict[str, Any] = {"static": (48, 48, 3), "gripper": (32, 32, 3), "scenes": ("calvin_scene_A",)}
    ingest(store, CONFIG, str(write_calvin(tmp_path / "raw", (6, 7), **sizes)))
    staged: list[int] = []
    grown = write_calvin(tmp_path / "grown", (6, 7, 8), **sizes)
    for path in (tmp_path / "raw").rglob("*.npz"):
        shutil.copy2(path, grown / path.name)
    after = ingest(store, CONFIG, str(grown), progress=lambda done, total: staged.append(total))
    assert (after["version"], after["recordings"], after["steps"]) == (2, 3, 21)
    assert staged == [1]


def test_a_corrupt_frame_costs_one_recording_until_it_is_repaired(tmp_path: Path, recordings: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    raw = tmp_path / "raw"
    shutil.copytree(recordings, raw)
    broken = raw / "episode_0000008.npz"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    found = ingest(store, CONFIG, str(raw))
    assert (found["recordings"], found["quarantined"]) == (4, {"unreadable_frame": 1})
    (row,) = Dataset(store, load_manifest(store, "table")).quarantine
    assert row.key == "0000006-0000013" and str(broken) in row.detail
    assert str(broken) in Path(found["report"]).read_text()
    assert "| unreadable_frame | 1 |" in render_summary(Dataset(store, load_manifest(store, "table")))
    assert ingest(store, CONFIG, str(raw))["version"] == 1
    broken.write_bytes(good)
    repaired = ingest(store, CONFIG, str(raw))
    assert (repaired["version"], repaired["recordings"], repaired["quarantined"]) == (2, 5, {})
    nan = np.load(broken)
    np.savez(broken, **{**nan, "rel_actions": nan["rel_actions"] * np.nan})
    strict = CONFIG.model_copy(update={"dataset": "strict", "min_accept_ratio": 0.9})
    with pytest.raises(Corrupt, match=r"1 of 5 recordings rejected.*non_finite"):
        ingest(store, strict, str(raw))


def _die_at(call: int, before: bool, url: str, source: str) -> None:
    """Run the ingest in this process, but be killed at the n-th time that the store is written."""
    count = 0

    def deadly(method: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == call and before:
                os.kill(os.getpid(), signal.SIGKILL)
            method(*args)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

        return called

    for name in ("write", "create", "upload", "adopt"):
        setattr(LocalStore, name, deadly(getattr(LocalStore, name)))
    ingest(open_store(url), CONFIG, source)


def test_killed_anywhere_and_rerun_it_gives_the_same_dataset(tmp_path: Path, recordings: Path) -> None:
    calm = open_store(str(tmp_path / "calm"))
    expected = ingest(calm, CONFIG, str(recordings))
    shards = {key for key in calm.list() if "/data/" in key}
    fork, call, exits = multiprocessing.get_context("fork"), 0, [1]
    while any(exits):
        call += 1
        url, exits = str(tmp_path / f"killed-{call}"), []
        for before in (True, False):  # two kills into one store: the second run finds the first one's leavings
            child = fork.Process(target=_die_at, args=(call, before, url, str(recordings)))
            child.start()
            child.join()
            exits.append(child.exitcode)
        store = open_store(url)
        found = ingest(store, CONFIG, str(recordings))
        assert (found["version"], found["content_id"]) == (1, expected["content_id"]), f"killed at write {call}"
        assert {key for key in store.list() if "/data/" in key} == shards
        assert load_manifest(store, "table") == load_manifest(calm, "table")
    assert call > 12


def test_other_options_are_refused_before_anything_is_read(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    ingest(store, CONFIG.model_copy(update={"options": {"span_end": "exclusive"}}), str(recordings))
    more = write_calvin(tmp_path / "more", (6, 7), seed=1, static=(48, 48, 3), gripper=(32, 32, 3))
    monkeypatch.setattr(CalvinSource, "read", lambda self, key: pytest.fail("read"))
    for other, message in (
        (CONFIG, r"table was imported with options=\{'span_end': 'exclusive'\}, not \{\}; keep it"),
        (CONFIG.model_copy(update={"validation_fraction": 0.5}), "options="),
        (CONFIG.model_copy(update={"qa_per_episode": 3, "options": {"span_end": "exclusive"}}), "qa_per_episode=16"),
    ):
        with pytest.raises(Mismatch, match=message):
            ingest(store, other, str(more))
    monkeypatch.undo()
    assert load_manifest(store, "table").version == 1


@pytest.mark.parametrize("break_it", [b"no HDF5 any more", None])
def test_a_file_that_opens_again_leaves_nothing_in_quarantine(tmp_path: Path, break_it: bytes | None) -> None:
    """Neither while it is broken nor afterwards does another source's file of the same name decide about it."""
    config = IngestConfig(format="hdf5", dataset="d", qa_per_episode=0, min_accept_ratio=0.1)
    store, raw, other = open_store(str(tmp_path / "store")), tmp_path / "raw", tmp_path / "other"
    write_libero(raw / "a.hdf5", [5, 6])
    path = write_libero(raw / "b.hdf5", [7, 8])
    write_libero(other / "b.hdf5", [9])
    good = path.read_bytes()
    if break_it is None:
        with h5py.File(path, "a") as file:
            del file["data"]
    else:
        path.write_bytes(good[:8] + break_it)
    assert sum(ingest(store, config, str(raw))["quarantined"].values()) == 1
    assert ingest(store, config, str(raw))["version"] == 1
    added = ingest(store, config, str(other))
    assert (added["recordings"], sum(added["quarantined"].values())) == (3, 1)
    path.write_bytes(good)
    back = ingest(store, config, str(raw))
    assert (back["version"], back["recordings"], back["quarantined"]) == (3, 5, {})
    assert ingest(store, config, str(raw))["version"] == 3


def test_the_report_shows_what_is_in_it(tmp_path: Path, recordings: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    page = Path(ingest(store, CONFIG, str(recordings))["report"]).read_text()
    assert page.startswith("<!doctype html>") and "http" not in page
    for expected in ("5 (", "calvin_scene_B", "turn_on_led", "Nothing was rejected", "<rect", "data:;base64,"):
        assert expected in page
    dataset = Dataset(store, load_manifest(store, "table"))
    short = render_summary(dataset)
    strips = re.findall(r"!\[frames\]\(data:image/jpeg;base64,([^)]+)\)", short)
    assert [decode_image(base64.b64decode(strip)).shape[0] for strip in strips] == [64] * 4
    figures, first = dataset.stats.features["action"], dataset.manifest.action_space.dims[0].name
    assert f"| action | {first} | {figures.mean[0]:.3g} | {figures.std[0]:.3g} | {figures.low[0]:.3g} |" in short
    for expected in ("| recordings | 5 (", "Nothing was rejected.", "`calvin_scene_B: "):
        assert expected in short


@pytest.mark.parametrize(
    ("format", "folder", "options", "counts"),
    [
        ("calvin", "calvin_mini/training", {"span_end": "inclusive"}, (3, 9, 446)),
        ("lerobot", "lerobot_v3_image", {"action_space": "calvin_relative"}, (4, 4, 154)),
        ("lerobot", "lerobot_v3_video", {"action_space": "calvin_relative"}, (4, 4, 154)),
    ],
)
def test_the_small_real_sets_have_their_counts(
    tmp_path: Path, format: str, folder: str, options: dict[str, str], counts: tuple[int, int, int]
) -> None:
    name, _, split = folder.partition("/")
    store = open_store(str(tmp_path))
    config = IngestConfig(format=format, dataset="real", options=options, qa_per_episode=160)  # more than a draw's luck
    found = ingest(store, config, str(shared(name) / split))
    assert (found["recordings"], found["segments"], found["steps"]) == counts
    assert (found["quarantined"], found["notes"]) == ({}, {})
    dataset = Dataset(store, load_manifest(store, "real"))
    assert dataset.manifest.options["source"]["options"] == options
    assert format != "calvin" or {row.topic for row in dataset.qa} >= {"drawer", "led"}
