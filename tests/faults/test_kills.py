"""T6: an ingest that is killed at any moment leaves nothing half-done, and running it again gives the same dataset.

`make faults` does it 50 times and writes what it saw as JSON (`UPVLA_FAULT_TABLE`); the seeded kill before and after
every single write is in tests/data/test_ingest.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import S3Server
from tests.factories import write_calvin
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset
from upvla.data.upkeep import collect_garbage, verify
from upvla.data.versions import list_versions, load_manifest
from upvla.store import open_store

KILLS = int(os.environ.get("UPVLA_KILLS", "8"))
CONFIG = IngestConfig(format="calvin", dataset="d", recordings_per_task=1, qa_per_episode=4)


def _ingest(url: str, source: str, started: Any) -> None:
    store = open_store(url)
    store.list("datasets/d/_manifest")  # clients and imports are there when the clock starts
    started.set()
    ingest(store, CONFIG, source)


def _killed_after(moment: float | None, url: str, few: str, more: str) -> float:
    """Ingest the few undisturbed, then more in a process of its own that is killed so many seconds after it began;
    None lets it end. Seconds that it ran. What is unreferenced afterwards is of the second ingest."""
    store, spawn = open_store(url), multiprocessing.get_context("spawn")
    ingest(store, CONFIG, few)
    collect_garbage(store, "d", grace_s=0)
    started = spawn.Event()
    child = spawn.Process(target=_ingest, args=(url, more, started))
    child.start()
    assert started.wait(600)
    began = time.monotonic()
    child.join(moment)
    child.kill()
    child.join()
    return time.monotonic() - began


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a few recordings, the same and more)"""
    folder, sizes = tmp_path_factory.mktemp("raw"), {"static": (64, 64, 3), "gripper": (32, 32, 3)}
    few = write_calvin(folder / "few", (6, 7), scenes=("calvin_scene_A",), **sizes)
    more = write_calvin(folder / "more", (6, 7, 8, 5, 9, 6, 7), scenes=("calvin_scene_A",), **sizes)
    for path in few.rglob("*.npz"):
        shutil.copy2(path, more / path.name)
    return few, more


@pytest.mark.slow
@pytest.mark.seam
@pytest.mark.timeout(3600)
def test_killed_at_random_times_it_ends_the_same(
    s3_server: S3Server, recordings: tuple[Path, Path], tmp_path: Path
) -> None:
    few, more = map(str, recordings)
    calm = open_store(str(tmp_path / "calm"))
    old, new = ingest(calm, CONFIG, few)["content_id"], ingest(calm, CONFIG, more)["content_id"]
    rng, rows = np.random.Generator(np.random.Philox(6)), list[dict[str, Any]]()
    clean_s = _killed_after(None, s3_server.url(), few, more)
    for _ in range(KILLS):
        url, moment = s3_server.url(), float(rng.uniform(0, 1.2 * clean_s))
        store = open_store(url)
        _killed_after(moment, url, few, more)
        seen = load_manifest(store, "d")
        assert (seen.version, seen.content_id) in ((1, old), (2, new)) and verify(store, seen) == []
        left = collect_garbage(store, "d", grace_s=0, dry_run=True)["objects"]
        again = ingest(store, CONFIG, more)
        assert (again["version"], again["content_id"]) == (2, new)
        assert list_versions(store, "d") == [1, 2]
        collect_garbage(store, "d", grace_s=0)
        assert verify(store, load_manifest(store, "d")) == verify(store, load_manifest(store, "d", 1)) == []
        assert len(Dataset(store, load_manifest(store, "d")).episodes) == 7
        kinds = Counter(key.split("/")[0] for key in left)
        row = {
            "killed_after_s": round(moment, 3),
            "version_seen": seen.version,
            "unreferenced": dict(sorted(kinds.items())),
        }
        rows.append(row | {"same_content": again["content_id"] == new})
    assert any(row["unreferenced"] for row in rows) or KILLS < 8  # some kills came in the middle
    if table := os.environ.get("UPVLA_FAULT_TABLE"):
        text = {
            "test": "ingest killed at a random time",
            "kills": KILLS,
            "uninterrupted_s": round(clean_s, 3),
            "rows": rows,
        }
        Path(table).write_text(json.dumps(text, indent=1) + "\n")
