from __future__ import annotations

import numpy as np
import pytest

from upvla.sim.playtable.chains import sample_chains, sample_starts
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import Expert, run
from upvla.sim.playtable.scene import LAYOUTS
from upvla.sim.playtable.tasks import TASKS, succeeded


@pytest.fixture(scope="module")
def envs() -> dict[str, PlaytableEnv]:
    return {scene: PlaytableEnv(scene) for scene in LAYOUTS}


def successes(envs: dict[str, PlaytableEnv], task: str, per_scene: int, noise: float) -> int:
    done = 0
    for scene, env in envs.items():
        for i, start in enumerate(sample_starts(scene, task, per_scene, seed=20_000)):
            env.reset(start.robot_state, start.scene_state)
            done += run(env, task, np.random.default_rng(i), noise, max_steps=200)[0]
    return done


def chain_length(env: PlaytableEnv, count: int) -> float:
    lengths = []
    for chain in sample_chains(env.scene, count, seed=3):
        env.reset(chain.robot_state, chain.scene_state)
        lengths.append(0)
        for task in chain.tasks:
            if not run(env, task)[0]:
                break
            lengths[-1] += 1
    return float(np.mean(lengths))


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed(envs: dict[str, PlaytableEnv], task: str) -> None:
    assert successes({"A": envs["A"], "D": envs["D"]}, task, per_scene=1, noise=0.15) == 2


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed_on_held_out_seeds_in_every_scene(envs: dict[str, PlaytableEnv], task: str) -> None:
    """A sample of the table of `benchmarks/playtable.py`, with the noise that recordings have."""
    assert successes(envs, task, per_scene=6, noise=0.1) >= 23


def test_experts_do_whole_chains_in_the_unseen_scene(envs: dict[str, PlaytableEnv]) -> None:
    assert chain_length(envs["D"], count=6) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("scene", LAYOUTS)
def test_chains_of_five_are_long(envs: dict[str, PlaytableEnv], scene: str) -> None:
    """200 chains a scene, and 4.5, are the benchmark's; this many find a broken skill."""
    assert chain_length(envs[scene], count=16) >= 4.3


def test_an_expert_recovers_what_a_hand_undid(envs: dict[str, PlaytableEnv]) -> None:
    """It drops the block that it carries when the gripper is forced open, and fetches it again."""
    env = envs["C"]
    start = sample_starts("C", "place_in_slider", 1, seed=8)[0]
    env.reset(start.robot_state, start.scene_state)
    expert, before, fallen = Expert(env), env.info(), False
    (held,) = before["robot"]["contacts"]
    for step, action in enumerate(expert.actions("place_in_slider")):
        env.step(np.append(action[:6], 1.0) if 2 <= step < 8 else action)
        fallen |= "table" in env.info()["blocks"][held.removeprefix("block_")]["contacts"]
    assert fallen
    assert succeeded("place_in_slider", before, env.info())


def test_nothing_is_taken_along_from_the_task_before(envs: dict[str, PlaytableEnv]) -> None:
    """After a block was let go, closing the fingers for the next task must not grasp it again."""
    env = envs["B"]
    for start in sample_starts("B", "place_in_slider", 3, seed=5):
        env.reset(start.robot_state, start.scene_state)
        assert run(env, "place_in_slider")[0]
        shelved = {b: row["position"] for b, row in env.info()["blocks"].items() if "plank" in row["contacts"]}
        assert run(env, "turn_off_led" if env.info()["lights"]["led"] else "turn_on_led")[0]
        for block, place in shelved.items():
            assert np.linalg.norm(env.info()["blocks"][block]["position"] - place) < 0.02


def test_the_action_is_a_function_of_the_state_alone(envs: dict[str, PlaytableEnv]) -> None:
    env = envs["A"]
    start = sample_starts("A", "open_drawer", 1, seed=4)[0]
    env.reset(start.robot_state, start.scene_state)
    expert = Expert(env)
    for step, action in enumerate(expert.actions("open_drawer")):
        if step % 8 == 0:
            np.testing.assert_array_equal(action, Expert(env).action("open_drawer"))
        assert np.abs(action).max() <= 1
        env.step(action)


def test_follow_through_goes_beyond_success(envs: dict[str, PlaytableEnv]) -> None:
    env = envs["A"]
    start = sample_starts("A", "open_drawer", 1, seed=4)[0]
    counts = []
    for extra in (0, 5):
        env.reset(start.robot_state, start.scene_state)
        before = env.info()
        steps = 0
        for action in Expert(env).actions("open_drawer", follow_through=extra):
            env.step(action)
            steps += 1
        assert succeeded("open_drawer", before, env.info())
        counts.append(steps)
    assert counts[1] == counts[0] + 5
