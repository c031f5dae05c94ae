"""ingest/watch: what lands under a prefix becomes a version once, and not while it is being written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.factories import write_calvin
from upvla.config import RunConfig, SiteConfig, load
from upvla.data.table import load_manifest
from upvla.errors import Corrupt
from upvla.launch.pretrain import Pretraining


def test_what_lands_is_imported_once_and_halves_are_left_alone(tmp_path: Path) -> None:
    site = SiteConfig(home=tmp_path, store_url=str(tmp_path / "store"), tracking_url="")
    line = Pretraining(site, load("pretrain/ci", RunConfig, ["data.ingest.options.span_end=exclusive"]))
    assert line.watch()["skipped"] == "nothing there yet"
    inbox = site.raw_folder / "inbox"
    small: dict[str, Any] = {"static": (32, 32, 3), "gripper": (16, 16, 3), "scenes": ("calvin_scene_A",)}
    write_calvin(inbox, (18, 20), **small)
    assert "still being written" in line.watch()["skipped"]
    first = line.watch(settle_s=0)
    assert (first["version"], first["recordings"], first["source_url"]) == (1, 2, str(inbox))
    began = time.process_time()
    again = line.watch(settle_s=0)
    assert (again["version"], again["content_id"]) == (1, first["content_id"])
    assert time.process_time() - began < 2.0  # a rerun that finds nothing new does nothing
    write_calvin(inbox, (18, 20, 22), **small)
    grown = line.watch(settle_s=0)
    assert (grown["version"], grown["recordings"]) == (2, 3)


def aged(folder: Path, by_s: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_atime - by_s, path.stat().st_mtime - by_s))


def test_a_set_that_is_being_written_to_keeps_no_other_waiting(tmp_path: Path) -> None:
    site = SiteConfig(home=tmp_path, store_url=str(tmp_path / "store"), tracking_url="")
    line = Pretraining(site, load("pretrain/ci", RunConfig, ["data.ingest.options.span_end=exclusive"]))
    inbox = site.raw_folder / "inbox"
    small: dict[str, Any] = {"static": (32, 32, 3), "gripper": (16, 16, 3), "scenes": ("calvin_scene_A",)}
    for seed, name in enumerate(("monday", "tuesday", "today")):
        write_calvin(inbox / name, (18, 20), seed=seed, **small)
    aged(inbox / "monday", 3600)
    aged(inbox / "tuesday", 120)
    found = line.watch()
    assert (found["recordings"], list(found["waiting"]), found["source_url"]) == (4, ["today"], str(inbox))
    assert found["waiting"]["today"].startswith(time.strftime("%Y-%m-%d", time.gmtime()))
    again = line.watch()
    assert (again["version"], again["recordings"]) == (found["version"], 4)
    (inbox / "tuesday/ep_start_end_ids.npy").write_bytes(b"half of a write")
    aged(inbox / "tuesday", 120)
    aged(inbox / "today", 120)
    with pytest.raises(Corrupt, match="tuesday/ep_start_end_ids"):
        line.watch()
    assert load_manifest(line.store, found["dataset"]).num_episodes == 6, "the rest is in"


def test_an_hdf5_file_that_is_being_written_to_keeps_no_other_waiting(tmp_path: Path) -> None:
    from tests.data.test_sources import write_libero

    site = SiteConfig(home=tmp_path, store_url=str(tmp_path / "store"), tracking_url="")
    options = ["data.ingest.format=hdf5", "data.ingest.options={}"]
    line = Pretraining(site, load("pretrain/ci", RunConfig, options))
    inbox = site.raw_folder / "inbox"
    (inbox / "rig").mkdir(parents=True)
    done = write_libero(inbox / "rig/done.hdf5", [6, 9])
    aged(inbox, 3600)
    (inbox / "rig/now.hdf5").write_bytes(done.read_bytes()[:4000])
    found = line.watch()
    assert (found["version"], found["recordings"], list(found["waiting"])) == (1, 2, ["rig/now.hdf5"])
    assert found["quarantined"] == {}, "half a file is not judged"
    write_libero(inbox / "rig/now.hdf5", [7, 8, 10])
    assert (line.watch()["version"], line.watch(settle_s=0)["recordings"]) == (1, 5)
