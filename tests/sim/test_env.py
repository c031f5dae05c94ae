from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from upvla.errors import ConfigError, Mismatch, UpvlaError
from upvla.sim import contract as c
from upvla.sim.playtable.chains import sample_chains
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import Expert, run
from upvla.sim.playtable.scene import LAYOUTS
from upvla.types import Env


@pytest.fixture(scope="module")
def env() -> Iterator[PlaytableEnv]:
    made = PlaytableEnv("A")
    yield made
    made.close()


def trace(scene: str = "B") -> str:
    """Hash of the states and last frames of a rollout with contacts."""
    env, digest = PlaytableEnv(scene), hashlib.sha256()
    for chain in sample_chains(scene, 2, seed=9):
        env.reset(chain.robot_state, chain.scene_state)
        run(env, chain.tasks[0], np.random.default_rng(1), noise=0.3)
        digest.update(env.robot_state().tobytes() + env.scene_state().tobytes())
    for frame in env.observe().images.values():
        digest.update(frame.tobytes())
    env.close()
    return digest.hexdigest()


def test_the_same_actions_give_the_same_bits_in_another_process() -> None:
    code = "from tests.sim.test_env import trace; print(trace())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert other.stdout.strip() == trace()


def test_reset_gives_back_the_state_it_was_given(env: PlaytableEnv) -> None:
    protocol: Env = env
    for chain in sample_chains("A", 5, seed=0):
        protocol.reset(chain.robot_state, chain.scene_state)
        np.testing.assert_allclose(env.robot_state(), chain.robot_state, atol=1e-12)
        np.testing.assert_allclose(env.scene_state(), chain.scene_state, atol=1e-12)


def test_sampled_scenes_are_at_rest(env: PlaytableEnv) -> None:
    for chain in sample_chains("A", 4, seed=1):
        env.reset(chain.robot_state, chain.scene_state)
        for _ in range(30):
            env.step(np.array((0, 0, 0, 0, 0, 0, 1.0)))
        np.testing.assert_allclose(env.scene_state(), chain.scene_state, atol=4e-3)
        np.testing.assert_allclose(env.robot_state()[:3], chain.robot_state[:3], atol=3e-3)


@pytest.mark.parametrize("axis", range(3))
def test_one_unit_is_two_centimetres_and_larger_actions_are_clipped(env: PlaytableEnv, axis: int) -> None:
    ends = []
    for size in (1.0, 7.0):
        env.reset(*env.rest_state())
        start, action = env.robot_state(), np.array((0, 0, 0, 0, 0, 0, 1.0))
        action[axis] = -size if axis == 2 else size
        for _ in range(5):
            env.step(action)
        for _ in range(10):
            env.step(np.array((0, 0, 0, 0, 0, 0, 1.0)))
        ends.append(env.robot_state())
        moved = ends[-1][:3] - start[:3]
        assert abs(abs(moved[axis]) - 0.10) < 0.01
        assert np.abs(np.delete(moved, axis)).max() < 0.01
    np.testing.assert_array_equal(*ends)


def test_one_unit_of_rotation_is_a_twentieth_of_a_radian(env: PlaytableEnv) -> None:
    env.reset(*env.rest_state())
    start = env.robot_state()
    for _ in range(6):
        env.step(np.array((0, 0, 0, 0, 0, 1.0, 1.0)))
    for _ in range(10):
        env.step(np.array((0, 0, 0, 0, 0, 0, 1.0)))
    assert abs(env.robot_state()[5] - start[5] - 0.3) < 0.02


def test_a_held_button_toggles_once_and_the_next_press_turns_the_led_off(env: PlaytableEnv) -> None:
    env.reset(*env.rest_state())
    assert run(env, "turn_on_led")[0]
    expert, lit = Expert(env), []
    for _ in range(10):
        env.step(expert.action("turn_on_led"))
        lit.append(env.info()["lights"]["led"])
    assert all(lit)
    for vertical in (1.0,) * 6 + (-1.0,) * 6:
        env.step(np.array((0, 0, vertical, 0, 0, 0, -1.0)))
        lit.append(env.info()["lights"]["led"])
    assert [(a, b) for a, b in pairwise(lit) if a != b] == [(1, 0)]


def test_a_lifted_block_falls_when_let_go(env: PlaytableEnv) -> None:
    env.reset(*env.rest_state())
    assert run(env, "lift_red_block_table")[0]
    assert env.info()["blocks"]["red"]["contacts"] == {"robot"}
    for _ in range(20):
        env.step(np.array((0, 0, 0, 0, 0, 0, 1.0)))
    assert abs(env.scene_state()[c.BLOCK_POSE["red"]][2] - 0.46) < 0.01
    assert env.info()["blocks"]["red"]["contacts"] == {"table"}


def test_cameras_show_the_lamps(env: PlaytableEnv) -> None:
    robot, scene = env.rest_state()
    env.reset(robot, scene)
    dark = env.observe().images
    scene[[c.LED, c.LIGHTBULB, c.SWITCH]] = 1, 1, 0.088
    env.reset(robot, scene)
    lit = env.observe()
    assert dark["static"].shape == (200, 200, 3)
    assert dark["gripper"].shape == (84, 84, 3)
    assert dark["static"].dtype == np.uint8
    assert (lit.state.shape, lit.scene_state is not None and lit.scene_state.shape) == ((15,), (24,))

    def pixels(image: np.ndarray, red: bool) -> int:
        r, g, b = np.int32(image).transpose(2, 0, 1)
        return int(((g > 180) & (b < 100) & ((r > 180) if red else (r < 100))).sum())

    for red in (True, False):  # yellow bulb, green LED
        assert pixels(lit.images["static"], red) - pixels(dark["static"], red) > 40


def test_scenes_look_different() -> None:
    frames = []
    for name in LAYOUTS:
        env = PlaytableEnv(name)
        frames.append(env.observe().images["static"].astype(float))
        assert env.fingerprint()["env"] == f"playtable-{name.lower()}"
        env.close()
    assert all(np.abs(a - b).mean() > 8 for i, a in enumerate(frames) for b in frames[:i])


def test_bad_input_is_refused_by_name(env: PlaytableEnv) -> None:
    robot, scene = env.rest_state()
    with pytest.raises(Mismatch, match=r"action has non-finite values at \[2\]"):
        env.step(np.array((0, 0, np.nan, 0, 0, 0, 1.0)))
    with pytest.raises(Mismatch, match=r"shape \(6,\), must be \(7,\)"):
        env.step(np.zeros(6))
    for dim, value, name in ((c.DRAWER, 0.4, "drawer"), (c.SLIDER, -0.2, "slider"), (8, 3.0, "red_z")):
        broken = scene.copy()
        broken[dim] = value
        with pytest.raises(ConfigError, match=f"{name} = .* lies outside"):
            env.reset(robot, broken)
    folded = robot.copy()
    folded[10] = 1.0
    with pytest.raises(ConfigError, match=r"arm_4 = 1\.0"):
        env.reset(folded, scene)
    with pytest.raises(ConfigError, match=r"no scene 'E'; choose one of A, B, C, D"):
        PlaytableEnv("E")
    with pytest.raises(ConfigError, match="cannot reach"):
        env.robot_state_at(np.array((0.9, 0.5, 0.6)))


def test_a_missing_gl_library_is_answered_with_what_to_install() -> None:
    code = """
import ctypes
class Absent(ctypes.CDLL):  # a machine without the package
    def __init__(self, name, *rest, **options):
        if "osmesa" in str(name).lower():
            raise OSError(f"{name}: cannot open shared object file")
        super().__init__(name, *rest, **options)
ctypes.CDLL = ctypes.cdll._dlltype = Absent
from upvla.sim.playtable.env import PlaytableEnv
PlaytableEnv("A").observe()
"""
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 1
    assert "ConfigError" in found.stderr.splitlines()[-1]
    assert "apt-get install -y --no-install-recommends libosmesa6" in found.stderr


def test_unstable_physics_is_an_error_until_the_next_reset(env: PlaytableEnv) -> None:
    env.reset(*env.rest_state())
    env.data.qvel[-1] = 1e12
    for _ in range(2):
        with pytest.raises(UpvlaError, match="playtable-a: physics became unstable"):
            env.step(np.zeros(7))
    env.reset(*env.rest_state())
    env.step(np.zeros(7))


@pytest.mark.parametrize("scene", ["A", "B"])
def test_a_world_that_closes_takes_nothing_from_another(scene: str) -> None:
    """Textures belong to a GL context; the one that was used last may be another world's, or shared with it."""
    closing, staying = PlaytableEnv("A"), PlaytableEnv(scene)
    try:
        closing.step(np.ones(7))
        closing.observe()
        before = staying.observe().images
        closing.close()
        after = staying.observe().images
    finally:
        staying.close()
    for name, image in before.items():
        np.testing.assert_array_equal(after[name], image)
