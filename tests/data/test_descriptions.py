"""Descriptions as sidecars: one a bucket, found from any step of it, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.factories import write_calvin
from upvla.data.descriptions import DescriptionTable, write_descriptions
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset, load_manifest
from upvla.errors import NotFound
from upvla.images import Resize
from upvla.store import Store


@pytest.fixture
def dataset(store: Store, tmp_path: Path) -> Dataset:
    write_calvin(tmp_path / "raw", (12, 9))
    ingest(store, IngestConfig(format="calvin", dataset="toy", validation_fraction=0.0), str(tmp_path / "raw"))
    return Dataset(store, load_manifest(store, "toy"))


def brightness(frames: np.ndarray) -> list[str]:
    assert frames.shape[1:] == (2, 16, 16, 3)
    return [f"{frame.mean():.4f}" for frame in frames]


def test_every_step_reads_what_was_said_of_the_first_of_its_bucket(dataset: Dataset) -> None:
    settings = {"cameras": ["static", "gripper"], "resize_to": Resize(size=16), "every_steps": 5}
    with pytest.raises(NotFound, match="has no descriptions abc; describe it first"):
        DescriptionTable(dataset, "abc", 5)
    (key,) = write_descriptions(dataset, brightness, description_id="abc", batch=2, **settings)
    assert "derived/descriptions-abc/" in key
    assert write_descriptions(dataset, brightness, description_id="abc", **settings) == []
    table = DescriptionTable(dataset, "abc", 5)
    for episode, row in enumerate(dataset.episodes):
        said = [table.get(episode, step) for step in range(row.length)]
        buckets = [said[start : start + 5] for start in range(0, row.length, 5)]
        assert all(len(set(bucket)) == 1 for bucket in buckets)
        assert len({bucket[0] for bucket in buckets}) == len(buckets)
    assert table.get(0, 0) != table.get(1, 0)
