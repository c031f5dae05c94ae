"""A robot that asks a policy server what to do; here the robot is the playtable.

    upvla serve models:/upvla-tiny@champion
    export UPVLA_POLICY_TOKEN=$(cat .upvla/secrets/policy_token)
    python examples/control_loop.py ws://127.0.0.1:8600 open_drawer

For a robot of your own, replace `observe` and `command`: everything else stays. `control` keeps to the action space's
rate, clips to its limits, and raises instead of commanding when the server falls silent.
"""

from __future__ import annotations

import sys

import numpy as np

from upvla.errors import UpvlaError
from upvla.rollout.client import RemotePolicy, control
from upvla.sim.playtable import tasks
from upvla.sim.playtable.chains import sample_starts
from upvla.sim.playtable.env import PlaytableEnv
from upvla.types import Observation

STEPS = 360


def main(url: str, task: str) -> int:
    (start,) = sample_starts("D", task, 1, seed=7)
    env = PlaytableEnv(start.scene)
    env.reset(start.robot_state, start.scene_state)
    before = env.info()

    def observe() -> Observation:
        return env.observe()

    def command(action: np.ndarray) -> None:
        env.step(action)

    try:
        with RemotePolicy(url, deadline_s=0.5) as policy:
            env.action_space.require_equal(policy.action_space, ours="this robot", theirs=f"policy {policy.name}")
            made = control(policy, tasks.instruction(task), observe, command, steps=STEPS)
    except UpvlaError as error:  # a real robot brakes here
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    finally:
        done = tasks.succeeded(task, before, env.info())
        env.close()
    print(f"{task}: {'done' if done else 'not done'} after {made} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
