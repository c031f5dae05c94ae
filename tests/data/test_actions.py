from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upvla.data.actions import (
    BRIDGE_V2,
    CALVIN_ABSOLUTE,
    DROID,
    LIBERO,
    ROTATIONS,
    ActionMap,
    declared_space,
    from_matrix,
    to_matrix,
)
from upvla.errors import ConfigError, Mismatch
from upvla.types import CALVIN_RELATIVE, ActionDim, ActionSpace


def at_rate(space: ActionSpace, dt_s: float) -> ActionSpace:
    return replace(space, dt_s=dt_s)


def test_a_source_that_does_not_say_is_told_the_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        declared_space(None, "lerobot at /data/x")
    for field in ("dt_s", "unit", "frame", "mode", "scale", "low", "high", "convention", "bridge_v2"):
        assert field in str(caught.value)
    assert declared_space("libero", "here") is LIBERO
    with pytest.raises(ConfigError, match="there is: bridge_v2"):
        declared_space("libre", "here")


def _without(key: str) -> dict[str, Any]:
    value = CALVIN_RELATIVE.to_json()
    value["dims"] = [dict(dim) for dim in value["dims"]]
    del value["dims"][2][key]
    return value


@pytest.mark.parametrize("key", ["name", "unit", "frame", "mode"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"dims\.2\.{key}"):
        declared_space(_without(key), "here")


def test_a_whole_declaration_is_taken_and_a_wrong_one_is_not() -> None:
    assert declared_space(CALVIN_RELATIVE.to_json(), "here") == CALVIN_RELATIVE
    for change, message in (
        ({"spam": 1}, "spam"),
        ({"dt_s": 0}, "dt_s"),
        ({"dims": [asdict(CALVIN_RELATIVE.dims[0]) | {"unit": "inch"}]}, r"dims\.0\.unit"),
        ({"dims": [asdict(CALVIN_RELATIVE.dims[3]) | {"convention": "zyx"}]}, "euler_xyz, axis_angle"),
        ({"dims": [asdict(CALVIN_RELATIVE.dims[3])]}, "takes 3 neighbouring"),
        ({"dims": [asdict(CALVIN_RELATIVE.dims[6]) | {"convention": "open"}]}, "gripper"),
        ({"dims": [asdict(CALVIN_RELATIVE.dims[0]) | {"low": 2}]}, "low < high"),
    ):
        with pytest.raises(ConfigError, match=message):
            declared_space(CALVIN_RELATIVE.to_json() | change, "here")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_rotation_layouts_round_trip_and_agree(seed: int) -> None:
    vectors = np.random.Generator(np.random.Philox(seed)).normal(0, 1, (20, 3))
    matrices = to_matrix(vectors, "axis_angle")
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    for layout, width in ROTATIONS.items():
        values = from_matrix(matrices, layout)
        assert values.shape == (20, width)
        assert np.allclose(to_matrix(values, layout), matrices, atol=1e-7)
    assert (from_matrix(matrices, "quat_xyzw")[:, 3] >= 0).all()


def test_a_quarter_turn_about_z_in_every_layout() -> None:
    quarter = to_matrix(np.array([[0, 0, np.pi / 2]]), "euler_xyz")
    assert np.allclose(quarter[0] @ [1, 0, 0], [0, 1, 0])
    half = np.sqrt(0.5)
    assert np.allclose(from_matrix(quarter, "quat_xyzw"), [[0, 0, half, half]])
    assert np.allclose(from_matrix(quarter, "rot6d"), [[0, 1, 0, -1, 0, 0]])


def test_units_polarity_and_layout_are_converted_and_back() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    actions = rng.uniform(-0.09, 0.09, (50, 7)).astype(np.float32)
    actions[:, 6] = rng.choice([-1.0, 1.0], 50)
    calvin = at_rate(CALVIN_RELATIVE, LIBERO.dt_s)
    there = ActionMap(LIBERO, calvin)(actions)
    assert np.allclose(there[:, :3], actions[:, :3] * 0.05 / 0.02, atol=1e-6)
    assert np.array_equal(there[:, 6], -actions[:, 6])  # LIBERO closes at +1, CALVIN at -1
    turned = to_matrix(actions[:, 3:6] * 0.5, "axis_angle")
    assert np.allclose(to_matrix(there[:, 3:6] * 0.05, "euler_xyz"), turned, atol=1e-4)
    assert (abs(there) < 1).sum() > 100  # most were not cut at the range
    assert np.allclose(ActionMap(calvin, LIBERO)(there), actions, atol=1e-5)


def test_a_half_closed_gripper_goes_to_the_nearer_end_and_values_stay_in_range() -> None:
    actions = np.zeros((3, 7), np.float32)
    actions[:, 0] = (0.01, 0.5, -0.5)
    actions[:, 6] = (0.9, 0.4, 0.0)
    there = ActionMap(at_rate(BRIDGE_V2, 1 / 30), CALVIN_RELATIVE)(actions)
    assert there[:, 6].tolist() == [1.0, -1.0, -1.0]
    assert np.allclose(there[:, 0], [0.5, 1.0, -1.0])
    between = ActionMap(
        at_rate(BRIDGE_V2, DROID.dt_s),
        replace(at_rate(BRIDGE_V2, DROID.dt_s), dims=(*BRIDGE_V2.dims[:6], DROID.dims[6])),
    )(actions)
    assert np.allclose(between[:, 6], [0.1, 0.6, 1.0])


def test_absolute_poses_become_relative_actions_by_calvins_rule(calvin_mini: Path) -> None:
    frames = [np.load(path) for path in sorted((calvin_mini / "training").glob("episode_*.npz"))[:100]]
    absolute, robot = (
        np.stack([frame[name] for frame in frames]).astype(np.float32) for name in ("actions", "robot_obs")
    )
    convert = ActionMap(CALVIN_ABSOLUTE, CALVIN_RELATIVE)
    assert convert.needs_pose
    found = convert(absolute, robot[:, :6])
    turned = np.arctan2(np.sin(absolute[:, 3:6] - robot[:, 3:6]), np.cos(absolute[:, 3:6] - robot[:, 3:6]))
    assert np.allclose(found[:, :3], np.clip((absolute - robot[:, :7])[:, :3] * 50, -1, 1), atol=1e-4)
    assert np.allclose(found[:, 3:6], np.clip(turned * 20, -1, 1), atol=1e-4)
    assert np.array_equal(found[:, 6], absolute[:, 6])
    moved = np.abs(found[:, :6]) < 1  # where nothing was cut, the way back leads to the same pose
    back = ActionMap(CALVIN_RELATIVE, CALVIN_ABSOLUTE)(found, robot[:, :6])
    wrapped = (back[:, :6] - absolute[:, :6] + np.pi) % (2 * np.pi) - np.pi
    assert moved.any() and np.abs(wrapped[moved]).max() < 1e-5
    with pytest.raises(Mismatch, match="needs the tool pose"):
        convert(absolute)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_s": 0.2}, "dt_s differs"),
        ({"dims": CALVIN_RELATIVE.dims[:6]}, r"nothing gives dimension 6 \(gripper"),
        (
            {"dims": (replace(CALVIN_RELATIVE.dims[0], frame="tcp"), *CALVIN_RELATIVE.dims[1:])},
            "dimension 0 .* 'tcp'|'world', dx in 'tcp'",
        ),
        (
            {"dims": (*CALVIN_RELATIVE.dims, ActionDim("j", "rad", "joint", "absolute"))},
            r"dimension 7 \(j\) has no target",
        ),
    ],
)
def test_what_would_need_a_guess_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mismatch, match=message):
        ActionMap(replace(CALVIN_RELATIVE, **change), CALVIN_RELATIVE)
