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
            done += run(env, task, np.random.default_rng(i), noise, max_steps=150)[0]
    return done


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed(envs: dict[str, PlaytableEnv], task: str) -> None:
    assert successes(envs, task, per_scene=3, noise=0.15) >= 11


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed_on_a_hundred_held_out_seeds(envs: dict[str, PlaytableEnv], task: str) -> None:
    assert successes(envs, task, per_scene=25, noise=0.0) >= 95


def test_experts_do_whole_chains_in_the_unseen_scene(envs: dict[str, PlaytableEnv]) -> None:
    env, lengths = envs["D"], []
    for chain in sample_chains("D", 6, seed=3):
        env.reset(chain.robot_state, chain.scene_state)
        lengths.append(0)
        for task in chain.tasks:
            if not run(env, task, max_steps=200)[0]:
                break
            lengths[-1] += 1
    assert np.mean(lengths) >= 4.5


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
