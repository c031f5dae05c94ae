from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories import write_calvin
from tests.launch.conftest import RayHead
from upvla.data.ingest import IngestConfig, ingest
from upvla.launch.ingest import run_ingest
from upvla.store import open_store

CONFIG = IngestConfig(format="calvin", dataset="table", recordings_per_task=2, validation_fraction=0.3)


@pytest.mark.seam
def test_ray_tasks_give_the_same_dataset(ray_head: RayHead, tmp_path: Path) -> None:
    recordings = write_calvin(tmp_path / "raw", (6, 8, 5, 7, 6), static=(48, 48, 3), gripper=(32, 32, 3))
    seen: list[tuple[int, int]] = []
    expected = ingest(open_store(str(tmp_path / "here")), CONFIG, str(recordings))
    found = run_ingest(open_store(str(tmp_path / "ray")), CONFIG, str(recordings), lambda *step: seen.append(step))
    assert found["content_id"] == expected["content_id"]
    assert seen[-1] == (5, 5) and len(seen) == 3
