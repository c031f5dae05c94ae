"""ingest/watch: what lands under a prefix becomes a version once, and not while it is being written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.factories import write_calvin
from upvla.config import RunConfig, SiteConfig, load
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
