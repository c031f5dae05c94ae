"""Scripted experts: the next action is a function of what can be seen now and of how the subtask began.

There is no clock and no hidden phase, so an expert recovers from whatever noise or another hand did to the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from upvla.sim import contract as c
from upvla.sim.playtable import block_skills as blocks
from upvla.sim.playtable import furniture_skills as furniture
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.env import DOWN, PlaytableEnv
from upvla.sim.playtable.motion import CLOSE, OPEN, Plan, View, angle_between, look, rise
from upvla.sim.playtable.tasks import Info, succeeded
from upvla.sim.playtable.tasks import task as task_row

_SIDES = (("right", 1.0), ("left", -1.0))
_TURN_GAIN = 0.4  # of the angle a step

_EXPERTS: Mapping[str, Callable[[View], Plan]] = {
    "open_drawer": furniture.open_drawer,
    "close_drawer": furniture.close_drawer,
    **{f"move_slider_{side}": partial(furniture.slide, sign) for side, sign in _SIDES},
    **{f"turn_{word}_led": furniture.press_button for word in ("on", "off")},
    "turn_on_lightbulb": partial(furniture.push_switch, 1.0),
    "turn_off_lightbulb": partial(furniture.push_switch, -1.0),
    **{f"push_{b}_block_{side}": partial(blocks.push, b, sign) for b in s.BLOCKS for side, sign in _SIDES},
    **{f"rotate_{b}_block_{side}": partial(blocks.rotate, b, -sign) for b in s.BLOCKS for side, sign in _SIDES},
    **{f"lift_{b}_block_table": partial(blocks.lift, b) for b in s.BLOCKS},
    **{f"lift_{b}_block_slider": partial(blocks.lift_from_slider, b) for b in s.BLOCKS},
    **{f"lift_{b}_block_drawer": partial(blocks.lift_from_drawer, b) for b in s.BLOCKS},
    "push_into_drawer": blocks.push_into_drawer,
    "place_in_slider": blocks.place_in_slider,
    "place_in_drawer": blocks.place_in_drawer,
    "stack_block": blocks.stack,
    "unstack_block": blocks.unstack,
}
_ANY_IN_HAND = ("place_in_slider", "place_in_drawer", "push_into_drawer", "stack_block", "unstack_block")


def _plan(task: str, view: View) -> Plan:
    held, grasps = blocks.in_hand(view), task in _ANY_IN_HAND or task.startswith(("lift", "rotate"))
    if held is not None and task not in _ANY_IN_HAND and not (grasps and f"_{held}_" in task):
        return blocks.put_down(view, held)
    plan = _EXPERTS[task](view)
    if plan.gripper == CLOSE and not (grasps or view.closing) and blocks.between_fingers(view):
        return rise(view, OPEN)  # else it would take along what the last task let go of
    return plan


class Expert:
    """Acts on privileged state of one environment, through its actions only.

    `noise` is the standard deviation of white noise on the six motion values. It is zero-mean and uncorrelated, so
    recordings hold recoveries while their mean action in a state stays the expert's.
    """

    def __init__(self, env: PlaytableEnv, rng: np.random.Generator | None = None, noise: float = 0.0) -> None:
        self.env, self.noise = env, noise
        self._rng = rng if rng is not None else np.random.default_rng(0)

    def action(self, task: str, start: Info | None = None) -> np.ndarray:
        """f64[7] to take now towards `task`, which began at `start` (now where not given)."""
        task_row(task)
        info, robot = self.env.info(), self.env.robot_state()
        view = look(robot, self.env.scene_state(), self.env.layout, info, info if start is None else start)
        plan = _plan(task, view)
        tilt = [
            angle_between(goal, now) for goal, now in zip((DOWN[0], DOWN[1], plan.yaw), robot[c.TCP_EULER], strict=True)
        ]
        motion = np.concatenate([plan.velocity, np.clip(_TURN_GAIN * np.array(tilt) / 0.05, -1, 1)])
        if self.noise:
            motion += self.noise * self._rng.standard_normal(6)
        return np.array((*np.clip(motion, -1, 1), plan.gripper))

    def actions(self, task: str, max_steps: int = c.MAX_STEPS, follow_through: int = 0) -> Iterator[np.ndarray]:
        """Actions until the oracle sees success or `max_steps` are spent, and `follow_through` more after success.

        The caller steps the environment with each.
        """
        start: Mapping[str, Any] = self.env.info()
        for _ in range(max_steps):
            yield self.action(task, start)
            if succeeded(task, start, self.env.info()):
                for _ in range(follow_through):
                    yield self.action(task, start)
                return


def run(
    env: PlaytableEnv, task: str, rng: np.random.Generator | None = None, noise: float = 0.0,
    max_steps: int = c.MAX_STEPS,
) -> tuple[bool, int]:  # fmt: skip
    """Let the expert try `task` from where the environment stands: (whether it succeeded, steps taken)."""
    start, steps = env.info(), 0
    for action in Expert(env, rng, noise).actions(task, max_steps):
        env.step(action)
        steps += 1
    return succeeded(task, start, env.info()), steps
