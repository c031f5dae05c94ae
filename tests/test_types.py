from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from upvla.errors import BadEpisode, Mismatch
from upvla.types import CALVIN_RELATIVE, ActionSpace, Episode


def test_action_space_survives_json() -> None:
    assert ActionSpace.from_json(CALVIN_RELATIVE.to_json()) == CALVIN_RELATIVE


def test_action_space_mismatch_names_dimension_and_field() -> None:
    dims = list(CALVIN_RELATIVE.dims)
    dims[6] = dataclasses.replace(dims[6], convention="+1=close,-1=open")
    flipped = dataclasses.replace(CALVIN_RELATIVE, dims=tuple(dims))
    with pytest.raises(Mismatch, match=r"dimension 6 \(gripper\) differs in 'convention'.*data.*robot"):
        CALVIN_RELATIVE.require_equal(flipped, ours="data", theirs="robot")


def test_an_episode_with_unequal_lengths_cannot_exist() -> None:
    steps = 4
    with pytest.raises(BadEpisode, match=r"frame_count.*images\.static has 3 rows"):
        Episode(
            id="e",
            source="test",
            embodiment="panda",
            scene="A",
            action_space=CALVIN_RELATIVE,
            rate_hz=30,
            timestamps=np.arange(steps) / 30,
            images={"static": np.zeros((3, 8, 8, 3), np.uint8)},
            state=np.zeros((steps, 15), np.float32),
            actions=np.zeros((steps, 7), np.float32),
            spans=(),
        )
