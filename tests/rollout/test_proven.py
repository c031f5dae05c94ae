"""A model answers as it did where it was trained, or is not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.test_policy import make_bundle, observation
from upvla.checkpoint import Bundle, Golden, export, load_bundle, read_marker
from upvla.errors import Mismatch
from upvla.rollout.golden import proven, record
from upvla.store import open_store

TOLD = ("open the drawer", "push the red block")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    made = make_bundle()
    seen = [observation(value).images for value in range(len(TOLD))]
    images = {camera: np.stack([frames[camera] for frames in seen]) for camera in seen[0]}
    return replace(made, golden=record(made, images, TOLD))


def golden_of(bundle: Bundle) -> Golden:
    assert bundle.golden is not None
    return bundle.golden


def test_it_travels_with_the_model_and_is_answered_again(bundle: Bundle, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    url = export(store, "with", bundle).url
    loaded, golden = load_bundle(url), golden_of(bundle)
    again = record(loaded, golden.images, golden.instructions)
    assert again.instructions == golden_of(loaded).instructions == TOLD
    assert np.abs(again.actions - golden.actions).max() <= 1e-6
    assert np.array_equal(golden_of(loaded).actions, golden.actions)
    for camera, frames in golden.images.items():
        assert np.array_equal(golden_of(loaded).images[camera], frames)
    assert proven(loaded, url, slots=4).name == url
    without = export(store, "without", replace(bundle, golden=None))
    assert without.model_id == read_marker(open_store(url)).model_id, "what it said is no part of what it is"
    proven(load_bundle(without.url), "an older one")


def test_another_answer_is_refused_by_its_dimension(bundle: Bundle) -> None:
    actions = golden_of(bundle).actions.copy()
    actions[1, 0, 4] += 0.01
    told = replace(bundle, golden=replace(golden_of(bundle), actions=actions))
    name = bundle.action_space.dims[4].name
    with pytest.raises(Mismatch, match=rf"golden observation 1 \('push the red block'\) with {name} .* at step 0"):
        proven(told, "m")
    broken = replace(golden_of(bundle), actions=np.full_like(actions, np.nan))
    with pytest.raises(Mismatch, match="golden observation 0"):
        proven(replace(bundle, golden=broken), "m")


def test_pixels_that_come_in_by_another_resize_are_noticed(bundle: Bundle) -> None:
    """The mistake that nothing else shows: shapes, statistics and hashes of weights are all as they were."""
    config = bundle.config.model_copy(update={"vision_filter": "pil_bicubic", "vq_filter": "pil_bicubic"})
    assert config.vision_resize != bundle.config.vision_resize
    with pytest.raises(Mismatch, match="something between there and here differs"):
        proven(replace(bundle, config=config), "m")
