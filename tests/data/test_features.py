"""Patch features as sidecars: row for row those of the frames, made once, read in place of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.factories import write_calvin
from upvla.data.features import FeatureTable, encode_features
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.mixture import Mixture, MixtureConfig
from upvla.data.samples import Collator, SampleReader
from upvla.data.table import Dataset, load_manifest
from upvla.errors import Mismatch, NotFound
from upvla.images import Resize, decode_image, resize
from upvla.store import Store, open_store

CAMERAS, SIZE = ("static", "gripper"), Resize(size=16)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    store: Store = open_store(str(tmp_path / "store"))
    write_calvin(tmp_path / "raw", (12, 9))
    ingest(store, IngestConfig(format="calvin", dataset="toy", validation_fraction=0.0), str(tmp_path / "raw"))
    return Dataset(store, load_manifest(store, "toy"))


def quarters(frames: np.ndarray) -> np.ndarray:
    """Four patches, three features: the mean colour of each quarter."""
    return frames.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).reshape(-1, 4, 3)


def test_features_are_those_of_the_frames_and_take_their_place_in_a_batch(dataset: Dataset) -> None:
    settings = {"cameras": CAMERAS, "resize_to": SIZE, "tower_id": "abc"}
    with pytest.raises(NotFound, match="has no patch features of tower abc"):
        FeatureTable(dataset, "abc", CAMERAS, SIZE)
    assert len(encode_features(dataset, quarters, batch=5, **settings)) == 1
    assert encode_features(dataset, quarters, **settings) == []
    other = Resize(size=16, filter="cubic")
    with pytest.raises(Mismatch, match=r"features-abc/.*filter='area'.*asks for .*filter='cubic'.* or delete .*s-abc "):
        FeatureTable(dataset, "abc", CAMERAS, other)
    with pytest.raises(Mismatch, match=r"made of cameras \['static', 'gripper'\]"):
        encode_features(dataset, quarters, **settings | {"resize_to": other})
    table = FeatureTable(dataset, "abc", CAMERAS, SIZE)
    assert table.shape == (4, 3)
    for episode, step in ((0, 0), (0, 8), (1, 4)):
        frames = dataset.read(episode, [step], [f"image_{camera}" for camera in CAMERAS])
        for camera, found in table.get(episode, step, CAMERAS).items():
            frame = resize(decode_image(frames[f"image_{camera}"][0]), SIZE)
            np.testing.assert_allclose(found, quarters(frame[None])[0], rtol=1e-3)
    sources = [{"dataset": "toy", "kind": kind, "weight": 0.5} for kind in ("robot", "qa")]
    plan = MixtureConfig.model_validate({"sources": sources, "global_batch": 8}).plan(dataset.store, "train")
    mixture = Mixture(plan, {"toy": dataset})
    reader = SampleReader(mixture, chunk=4, cameras=CAMERAS, resize=SIZE, features={"toy": table})
    collate = Collator(reader.shape, lambda text: [1], lambda turns: ([1], [1]), 0)
    batch = collate([reader.read(mixture.sample_at(position), position) for position in range(8)])
    assert batch.images.shape[1:] == batch.qa_images.shape[1:] == (2, 4, 3)
    assert batch.images.dtype == np.float32 and len(batch.images) + len(batch.qa_images) == 8
    first = next(p for p in range(8) if mixture.sample_at(p).kind == "robot")
    ref = mixture.sample_at(first)
    expected = np.stack(list(table.get(ref.episode, ref.step, CAMERAS).values()))
    np.testing.assert_array_equal(batch.images[0], expected)
