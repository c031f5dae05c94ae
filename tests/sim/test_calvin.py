"""Real CALVIN from a checkout. Facts and refusals run everywhere; the rest where UPVLA_CALVIN names a checkout."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from upvla.data.language import BLOCK_ORDER
from upvla.data.sources import open_source
from upvla.errors import ConfigError
from upvla.rollout.benchmarks import Places, open_suite
from upvla.sim import calvin
from upvla.sim.contract import BLOCK_POSE
from upvla.sim.recording import record_suite
from upvla.sim.remote.calvin_world import pyhash_fnv1_32
from upvla.sim.suite import World
from upvla.types import CALVIN_RELATIVE, Chain

real = pytest.mark.skipif(
    "UPVLA_CALVIN" not in os.environ or importlib.util.find_spec("pybullet") is None,
    reason="real CALVIN: set UPVLA_CALVIN to a checkout and `pip install upvla[calvin]` (docs/benchmarks.md)",
)


def test_the_data_layer_knows_the_same_order_of_blocks() -> None:
    known = {name: order for name, order in BLOCK_ORDER.items() if name.startswith("calvin")}
    assert {f"calvin_scene_{scene}": order for scene, order in calvin.BLOCKS.items()} == known


@pytest.mark.parametrize(("text", "expected"), [("test", 3910690890), ("", 0)])
def test_the_hash_that_seeds_initial_states_is_pyhash_s(text: str, expected: int) -> None:
    """3910690890 is what pyfasthash's own test states for `fnv1_32` of the text `test`."""
    assert pyhash_fnv1_32(text) == expected


def test_a_folder_that_is_no_checkout_is_told_what_to_clone(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in calvin.inspect(tmp_path)}
    assert not findings["calvin_env (package and configuration)"].found
    assert "git clone https://github.com/mees/calvin_env" in findings["calvin_env (package and configuration)"].detail
    assert "git clone https://github.com/mees/calvin" in findings["chains (calvin_agent)"].detail
    assert "a world opens" not in findings  # nothing is started where something is missing
    suite = open_suite("calvin-d", Places(calvin=str(tmp_path), cache=str(tmp_path)))
    with pytest.raises(ConfigError, match="upvla doctor calvin"):
        suite.chains(1)
    assert list(tmp_path.iterdir()) == []


def test_an_official_state_is_placed_by_name_in_another_scene() -> None:
    official = np.arange(24, dtype=np.float64)
    official[[7, 13, 19]] = -0.12, 0.09, 0.09  # y: red on the table, blue and pink behind the slider's door
    by_name = {block: official[where] for block, where in BLOCK_POSE.items()}
    np.testing.assert_array_equal(calvin._placed(list(official), "D"), official)
    for scene, order in calvin.BLOCKS.items():
        placed = calvin._placed(list(official), scene)
        np.testing.assert_array_equal(placed[:6], official[:6])
        for block, pose in zip(order, placed[6:].reshape(3, 6), strict=True):
            shift = 0.18 if scene in "BC" and block != "red" else 0.0
            np.testing.assert_allclose(pose, by_name[block] + [shift, 0, 0, 0, 0, 0])


@real
@pytest.mark.slow
def test_equal_actions_give_equal_states_whatever_ran_before() -> None:
    env = _suite().open("D", cameras=False)
    robot, scene = _start()
    try:
        ends = []
        for before in (0, 40):
            env.reset(robot, scene)
            for _ in range(before):  # another episode in the same world
                env.step(np.array([1, -1, -1, 0, 0, 1, -1.0]))
            env.reset(robot, scene)
            for action in np.random.default_rng(0).uniform(-1, 1, (60, 7)):
                env.step(action)
            ends.append(np.concatenate([env.state(), env.truth()]))
        np.testing.assert_array_equal(*ends)
        for bad in (np.full(7, np.nan), np.zeros(6)):
            with pytest.raises(ConfigError, match="7 finite numbers"):
                env.step(bad)
        with pytest.raises(ConfigError, match="a scene state is 24 finite numbers"):
            env.reset(robot, scene[:23])
    finally:
        env.close()


@real
@pytest.mark.slow
@pytest.mark.parametrize("scene", calvin.SCENES)
def test_blocks_stand_where_their_names_say(scene: str) -> None:
    env = _suite().open(scene, cameras=False)
    try:
        env.reset(_start()[0], calvin._placed(list(_start()[1]), scene))
        for block, pose in zip(calvin.BLOCKS[scene], env.truth()[6:].reshape(3, 6), strict=True):
            np.testing.assert_allclose(pose[:3], env.places()[f"block_{block}"], atol=1e-6)
    finally:
        env.close()


@real
@pytest.mark.slow
def test_an_expert_plug_in_records_what_calvin_s_own_reader_takes(tmp_path: Path) -> None:
    def still(env: World, task: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for _ in range(3):
            yield np.array([0, 0, 0, 0, 0, 0, 1.0])

    robot, scene = _start()
    chain = Chain("A", robot, calvin._placed(list(scene), "A"), ("turn_on_led",), 0)
    suite = dataclasses.replace(_suite(), name="calvin-a")
    found = record_suite(suite, [chain], tmp_path, expert=still)
    assert found == {"recordings": 1, "frames": 3, "spans": 0, "tasks": {"turn_on_led": [1, 0]}}
    source = open_source("calvin", str(tmp_path / "training"))
    (episode,) = [source.read(key) for key in list(source.keys())]
    assert (episode.scene, episode.rate_hz, episode.action_space) == ("calvin_scene_A", 30.0, CALVIN_RELATIVE)
    assert episode.state.shape == (3, 15) and episode.scene_state is not None
    np.testing.assert_allclose(episode.scene_state[0, 6:9], scene[18:21], atol=2e-3)  # A's first block is the pink one
    with pytest.raises(ConfigError, match="--expert module:function"):
        suite.expert(None, "turn_on_led")


@real
@pytest.mark.slow
def test_the_checkout_is_whole_and_seen() -> None:
    findings = calvin.inspect(os.environ["UPVLA_CALVIN"])
    assert [finding for finding in findings if not finding.found] == []
    assert "'static': (200, 200, 3), 'gripper': (84, 84, 3)" in findings[-1].detail


def _suite() -> calvin.CalvinSuite:
    return calvin.CalvinSuite(calvin.Checkout(Path(os.environ["UPVLA_CALVIN"]).resolve()), Path("unused"))


def _start() -> tuple[np.ndarray, np.ndarray]:
    """CALVIN's resting arm, one block on the table and two behind the door."""
    robot = np.zeros(15)
    robot[6:] = 0.08, -1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534, 1.0
    scene = np.zeros(24)
    scene[6:] = 0.05, -0.12, 0.46, 0, 0, 1.5, 0.07, 0.092, 0.461, 0, 0, 1.5, -0.24, 0.092, 0.461, 0, 0, 1.5
    return robot, scene
