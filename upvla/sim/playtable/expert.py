"""Scripted experts: the next action is a function of what can be seen now, never of a clock or a hidden phase.

Every task is "reach a contact point from above, then move in one direction". The reach is a funnel: far from the
point the gripper travels at a safe height, and comes down as it gets over the point; whatever is in its way is
cleared by rising first. Motions are proportional to the distance and capped, so a cloned policy sees smooth actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.env import DOWN, PlaytableEnv
from upvla.sim.playtable.tasks import succeeded
from upvla.sim.playtable.tasks import task as task_row

TRAVEL_Z = 0.60  # gripper height that clears blocks, button, switch and door handle
_GAIN, _SPEED = 0.4, 0.8  # of the distance a step; cap in action units (0.02 m)
_OPEN, _CLOSE = 1.0, -1.0
_SIDES = (("right", 1.0), ("left", -1.0))


class Plan(NamedTuple):
    """Where the gripper should go now (m, world), and what its fingers should do."""

    velocity: np.ndarray  # f64[3], action units
    gripper: float


def _towards(error: np.ndarray) -> np.ndarray:
    """Proportional motion (action units) that closes `error` (m), capped in length."""
    motion = _GAIN * error / 0.02
    return motion * min(1.0, _SPEED / max(1e-9, float(np.linalg.norm(motion))))


def _reach(position: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Motion towards `point` through the funnel above it; sideways only as far as the height is right."""
    aside = point[:2] - position[:2]
    height = point[2] + (TRAVEL_Z - point[2]) * np.clip((np.linalg.norm(aside) - 0.012) / 0.05, 0, 1)
    clear = np.clip((position[2] - height + 0.035) / 0.03, 0, 1)
    return np.concatenate([clear * _towards(aside), _towards(np.array([height - position[2]]))])


def _along(position: np.ndarray, point: np.ndarray, direction: tuple[float, float, float], speed: float) -> np.ndarray:
    """Steady motion in `direction`, held on the line through `point`."""
    axis = np.array(direction)
    aside = (point - position) * (1 - np.abs(axis))
    return speed * axis + np.clip(_GAIN * aside / 0.02, -0.4, 0.4)


class _View(NamedTuple):
    """What an expert looks at."""

    tcp: np.ndarray
    width: float
    state: np.ndarray  # f64[24]
    layout: s.Layout


def _open_drawer(v: _View) -> Plan:
    bar = np.array((v.layout.drawer_x, s.DRAWER_BAR[0] - v.state[c.DRAWER], s.DRAWER_BAR[1]))
    point = bar + np.array((0, 0.042, -0.012))
    behind = abs(v.tcp[0] - bar[0]) < 0.06 and 0.012 < v.tcp[1] - bar[1] < 0.075 and v.tcp[2] < bar[2] + 0.008
    return Plan(_along(v.tcp, point, (0, -1, 0), 0.6) if behind else _reach(v.tcp, point), _CLOSE)


def _close_drawer(v: _View) -> Plan:
    bar = np.array((v.layout.drawer_x, s.DRAWER_BAR[0] - v.state[c.DRAWER], s.DRAWER_BAR[1]))
    point = bar + np.array((0, -0.050, -0.012))
    before = abs(v.tcp[0] - bar[0]) < 0.06 and -0.09 < v.tcp[1] - bar[1] < -0.012 and v.tcp[2] < bar[2] + 0.008
    return Plan(_along(v.tcp, point, (0, 1, 0), 0.6) if before else _reach(v.tcp, point), _CLOSE)


def _slide(direction: float, v: _View) -> Plan:
    point = np.array((v.layout.handle_x - v.state[c.SLIDER], s.DOOR_HANDLE[0] - 0.008, s.DOOR_HANDLE[1] + 0.010))
    around = abs(v.tcp[0] - point[0]) < 0.045 and abs(v.tcp[1] - point[1]) < 0.02 and v.tcp[2] < point[2] + 0.015
    return Plan(_along(v.tcp, point, (direction, 0, 0), 0.6) if around else _reach(v.tcp, point), _OPEN)


def _press_button(v: _View) -> Plan:
    point = np.array((v.layout.button_x, s.BUTTON_Y, s.DESK_Z + 0.045))
    over = float(np.linalg.norm(v.tcp[:2] - point[:2])) < 0.022 and v.tcp[2] < point[2] + 0.015
    return Plan(_along(v.tcp, point, (0, 0, -1), 0.4) if over else _reach(v.tcp, point), _CLOSE)


def _push_switch(v: _View) -> Plan:
    paddle = np.array((v.layout.switch_x, s.SWITCH_Y + v.state[c.SWITCH], s.DESK_Z + 0.032))
    point = paddle + np.array((0, -0.045, 0))
    before = abs(v.tcp[0] - paddle[0]) < 0.025 and -0.08 < v.tcp[1] - paddle[1] < -0.01 and v.tcp[2] < paddle[2] + 0.02
    return Plan(_along(v.tcp, point, (0, 1, 0), 0.5) if before else _reach(v.tcp, point), _CLOSE)


def _push_block(block: str, direction: float, v: _View) -> Plan:
    place = v.state[c.BLOCK_POSE[block]][:3]
    point = np.array((place[0] - direction * 0.075, place[1], s.DESK_Z + 0.026))
    gap = direction * (place[0] - v.tcp[0])
    beside = 0.02 < gap < 0.11 and abs(v.tcp[1] - place[1]) < 0.016 and v.tcp[2] < point[2] + 0.015
    return Plan(_along(v.tcp, point, (direction, 0, 0), 0.5) if beside else _reach(v.tcp, point), _CLOSE)


def _lift_block(block: str, v: _View) -> Plan:
    place = v.state[c.BLOCK_POSE[block]][:3]
    point = place - (0, 0, 0.006)
    inside = np.abs(v.tcp - point).max() < 0.013
    if not inside:
        return Plan(_reach(v.tcp, point), _OPEN)
    held = v.width < 0.060
    return Plan(np.array((0, 0, 0.6)) if held else _towards(point - v.tcp), _CLOSE)


_EXPERTS: Mapping[str, Callable[[_View], Plan]] = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": partial(_slide, -1.0),
    "move_slider_right": partial(_slide, 1.0),
    "turn_on_led": _press_button,
    "turn_on_lightbulb": _push_switch,
    **{f"lift_{b}_block_table": partial(_lift_block, b) for b in s.BLOCKS},
    **{f"push_{b}_block_{side}": partial(_push_block, b, sign) for b in s.BLOCKS for side, sign in _SIDES},
}


class Expert:
    """Acts on privileged state of one environment, through its actions only.

    `noise` is the standard deviation of white noise on the six motion values. It is zero-mean and uncorrelated, so
    recordings hold recoveries while their mean action in a state stays the expert's.
    """

    def __init__(self, env: PlaytableEnv, rng: np.random.Generator | None = None, noise: float = 0.0) -> None:
        self.env, self.noise = env, noise
        self._rng = rng if rng is not None else np.random.default_rng(0)

    def action(self, task: str) -> np.ndarray:
        """f64[7] to take now towards `task`."""
        task_row(task)
        robot = self.env.robot_state()
        view = _View(robot[c.TCP_POSITION], robot[c.GRIPPER_WIDTH], self.env.scene_state(), self.env.layout)
        plan = _EXPERTS[task](view)
        upright = (DOWN - robot[c.TCP_EULER] + np.pi) % (2 * np.pi) - np.pi
        motion = np.concatenate([plan.velocity, np.clip(_GAIN * upright / 0.05, -1, 1)])
        if self.noise:
            motion += self.noise * self._rng.standard_normal(6)
        return np.array((*np.clip(motion, -1, 1), plan.gripper))

    def actions(self, task: str, max_steps: int = c.MAX_STEPS, follow_through: int = 0) -> Iterator[np.ndarray]:
        """Actions until the oracle sees success or `max_steps` are spent, and `follow_through` more after success.

        The caller steps the environment with each.
        """
        start: Mapping[str, Any] = self.env.info()
        for _ in range(max_steps):
            yield self.action(task)
            if succeeded(task, start, self.env.info()):
                for _ in range(follow_through):
                    yield self.action(task)
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
