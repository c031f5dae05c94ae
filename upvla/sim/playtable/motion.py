"""What scripted experts are made of: what they see, and motions through the funnel above a point.

A reach travels at a safe height while it is far from its point and comes down as it gets over it; whatever is in the
way is cleared by rising first. Motions are proportional to the distance and capped, so a cloned policy sees smooth
actions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.tasks import Info

TRAVEL_Z = 0.60  # gripper height that clears blocks, button, switch and door handle
CABINET_Y = 0.03  # beyond it the door's slope and the cabinet's walls leave no way sideways
LANE_Y = -0.03  # the way sideways before the cabinet
OPEN, CLOSE = 1.0, -1.0
YAW = np.pi / 2  # fingers open along x
YAW_LIMIT = 2.0  # rad from `YAW` that the wrist turns with ease
_GAIN, _SPEED = 0.4, 0.8  # of the distance a step; cap in action units (0.02 m)


class Plan(NamedTuple):
    """Where the gripper should go now, which way it should face (rad), and what its fingers should do."""

    velocity: np.ndarray  # f64[3], action units, world
    gripper: float
    yaw: float = YAW


class View(NamedTuple):
    """What an expert looks at: the gripper, the scene now, and the scene when the subtask began."""

    tcp: np.ndarray
    yaw: float
    width: float
    closing: bool
    state: np.ndarray  # f64[24]
    layout: s.Layout
    info: Info
    start: Info

    def block(self, name: str) -> np.ndarray:
        """f64[3]: its middle."""
        return np.asarray(self.info["blocks"][name]["position"])

    def held(self, name: str) -> bool:
        """Between closed fingers."""
        block: dict[str, Any] = self.info["blocks"][name]
        near = np.abs(block["position"] - self.tcp).max() < 0.028
        return bool(self.closing and near and "robot" in block["contacts"] and 0.03 < self.width < 0.072)

    def long_axis(self, name: str) -> float:
        """Angle (rad, modulo pi) of its longest horizontal side: fingers across it close on the narrow one."""
        w, x, y, z = self.info["blocks"][name]["quaternion"].tolist()
        along = (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y))
        if abs(along[2]) > 0.7:  # it stands on end: both sides are alike
            along = (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 0.0)
        return float(np.arctan2(along[1], along[0]))


def towards(error: np.ndarray) -> np.ndarray:
    """Proportional motion (action units) that closes `error` (m), capped in length."""
    motion = _GAIN * error / 0.02
    return np.asarray(motion * min(1.0, _SPEED / max(1e-9, float(np.linalg.norm(motion)))))


def along(position: np.ndarray, point: np.ndarray, direction: tuple[float, float, float], speed: float) -> np.ndarray:
    """Steady motion in `direction`, held on the line through `point`."""
    axis = np.array(direction)
    aside = (point - position) * (1 - np.abs(axis))
    return np.asarray(speed * axis + np.clip(_GAIN * aside / 0.02, -0.4, 0.4))


def reach(position: np.ndarray, point: np.ndarray, ready: float = 1.0) -> np.ndarray:
    """Motion towards `point` through the funnel above it; sideways only as far as the height is right.

    `ready` in [0, 1] holds the descent back, e.g. until the wrist has turned.
    """
    aside = _way(position, point) - position[:2]
    away = float(np.linalg.norm(point[:2] - position[:2]))
    funnel = max(np.clip((away - 0.012) / 0.05, 0, 1), 1 - ready)
    height = point[2] + max(0.0, TRAVEL_Z - point[2]) * funnel
    clear = np.clip((position[2] - height + 0.035) / 0.03, 0, 1)
    return np.concatenate([clear * towards(aside), towards(np.array([height - position[2]]))])


def _way(position: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The next corner on the way: into and out of the cabinet straight, sideways only before it."""
    if max(position[1], point[1]) < CABINET_Y + 0.01 or abs(point[0] - position[0]) < 0.035:
        return np.asarray(point[:2])
    return np.array((position[0] if position[1] > CABINET_Y else point[0], LANE_Y))


def angle_between(goal: float, current: float) -> float:
    """The short way from one angle to the other, rad in [-pi, pi)."""
    return float((goal - current + np.pi) % (2 * np.pi) - np.pi)


def grip_yaw(view: View, block: str, low: float = -YAW_LIMIT, high: float = YAW_LIMIT) -> float:
    """The gripper's yaw across a block, within [low, high] of `YAW`: across its narrow side if that can be, and of
    those the one that is less of a turn."""
    across, now = angle_between(view.long_axis(block), YAW), angle_between(view.yaw, YAW)
    for first in (across, across + np.pi / 2):
        turns = [turn for turn in first + np.pi * np.arange(-2, 2) if low <= turn <= high]
        if turns:
            return YAW + float(min(turns, key=lambda turn: abs(turn - now) + 0.3 * abs(turn)))
    raise ValueError(f"no grip of {block} within [{low}, {high}]: the range is narrower than a quarter turn")


def grasp(view: View, block: str, yaw: float) -> Plan:
    """Close the fingers about a block, from above. Goes on until `view.held`."""
    point = view.block(block) - (0, 0, 0.004)
    inside = np.abs(view.tcp - point).max() < 0.012
    if inside and (abs(angle_between(yaw, view.yaw)) < 0.15 or view.closing):
        return Plan(towards(point - view.tcp), CLOSE, yaw)
    ready = float(np.clip(1.5 - 4 * abs(angle_between(yaw, view.yaw)), 0, 1))
    return Plan(reach(view.tcp, point, ready), OPEN, yaw)


def rise(view: View, gripper: float) -> Plan:
    """Straight up, to where everything on the table is below."""
    return Plan(
        np.array((0, 0, np.clip(towards(np.array([TRAVEL_Z + 0.05 - view.tcp[2]]))[0], -0.6, 0.6))), gripper, view.yaw
    )


def carried(view: View) -> str:
    """The block that the task is about when it names none: the one in the gripper when the task began."""
    held = [b for b in s.BLOCKS if "robot" in view.start["blocks"][b]["contacts"]]
    return min(held or s.BLOCKS, key=lambda b: float(np.linalg.norm(view.block(b) - view.tcp)))


def look(robot: np.ndarray, state: np.ndarray, layout: s.Layout, info: Info, start: Info) -> View:
    return View(
        robot[c.TCP_POSITION], float(robot[c.TCP_EULER][2]), float(robot[c.GRIPPER_WIDTH]),
        bool(robot[c.GRIPPER_ACTION] < 0), state, layout, info, start,
    )  # fmt: skip
