"""Experts for blocks: push, turn, lift, place, stack, take down, and put away what is still in the gripper."""

from __future__ import annotations

from itertools import product

import numpy as np

from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.furniture_skills import open_drawer, slide
from upvla.sim.playtable.motion import (
    CLOSE,
    OPEN,
    YAW,
    Plan,
    View,
    along,
    angle_between,
    carried,
    grasp,
    grip_yaw,
    reach,
    rise,
    towards,
)

_TURN = np.radians(72)  # what a turn aims at; 60 degrees are asked
_BEFORE_DRAWER_Y = -0.13  # from here a push of some centimetres takes a block over the edge
_AJAR = 0.03  # m that door or drawer may lack to its stop
_LANE_Y = -0.02  # blocks on the desk lie before it
_DESK_TOP = s.DESK_Z + s.BLOCK_HEIGHT / 2  # z of the middle of a block that lies on the desk


def push(block: str, direction: float, v: View) -> Plan:
    place = v.block(block)
    point = np.array((place[0] - direction * 0.075, place[1], s.DESK_Z + 0.026))
    gap = direction * (place[0] - v.tcp[0])
    beside = 0.02 < gap < 0.11 and abs(v.tcp[1] - place[1]) < 0.016 and v.tcp[2] < point[2] + 0.015
    return Plan(along(v.tcp, point, (direction, 0, 0), 0.5) if beside else reach(v.tcp, point), CLOSE)


def push_into_drawer(v: View) -> Plan:
    """Draw the block along the desk until it stands before the drawer, let go, push it over the edge from behind."""
    if s.DRAWER_RANGE - v.state[c.DRAWER] > _AJAR and in_hand(v) is None:
        return open_drawer(v)
    block = min(s.BLOCKS, key=lambda b: abs(v.block(b)[2] - _DESK_TOP) + max(0.0, v.block(b)[1] - _LANE_Y))
    place, off = v.block(block), v.layout.drawer_x - v.block(block)[0]
    if v.held(block) and (abs(off) > 0.03 or place[1] > _BEFORE_DRAWER_Y + 0.015):
        spot = np.array((v.layout.drawer_x, _BEFORE_DRAWER_Y, _DESK_TOP + 0.001))
        return Plan(towards(spot - place), CLOSE, v.yaw)
    if abs(off) > 0.07 or place[1] > _BEFORE_DRAWER_Y + 0.04:
        return grasp(v, block, grip_yaw(v, block))
    if v.held(block):
        return Plan(np.zeros(3), OPEN, v.yaw)
    point = np.array((place[0], place[1] + 0.065, s.DESK_Z + 0.026))
    gap = v.tcp[1] - place[1]
    behind = 0.02 < gap < 0.10 and abs(v.tcp[0] - place[0]) < 0.016 and v.tcp[2] < point[2] + 0.015
    return Plan(along(v.tcp, point, (0, -1, 0), 0.4) if behind else reach(v.tcp, point), CLOSE)


def lift(block: str, v: View) -> Plan:
    return rise(v, CLOSE) if v.held(block) else grasp(v, block, grip_yaw(v, block))


def lift_from_slider(block: str, v: View) -> Plan:
    """Door out of the way first: the task that moved it may have ended half-way."""
    ajar = v.state[c.SLIDER] if v.block(block)[0] < v.layout.cabinet_x else s.SLIDE_RANGE - v.state[c.SLIDER]
    if not v.held(block) and ajar > _AJAR:
        return slide(-1.0 if v.block(block)[0] > v.layout.cabinet_x else 1.0, v)
    return lift(block, v)


def lift_from_drawer(block: str, v: View) -> Plan:
    if not v.held(block) and s.DRAWER_RANGE - v.state[c.DRAWER] > _AJAR:
        return open_drawer(v)
    side_on = grip_yaw(v, block, -0.8, 0.8)  # else the hand's long side would meet the desk
    return rise(v, CLOSE) if v.held(block) else grasp(v, block, side_on)


def rotate(block: str, direction: float, v: View) -> Plan:
    """Counter-clockwise for `direction` 1. The turn happens just above the desk, and ends by letting go there: a block
    still held would spoil the next task."""
    low, high = (-2.2, 0.95) if direction > 0 else (-0.95, 2.2)  # what leaves room for the turn
    turned = direction * angle_between(v.long_axis(block), _start_axis(v, block))
    if not v.held(block):
        lies = "table" in v.info["blocks"][block]["contacts"]
        if turned > np.radians(62) and lies:
            return rise(v, OPEN)
        return grasp(v, block, grip_yaw(v, block, low, high))
    lifted = v.block(block)[2] - _DESK_TOP
    if turned > _TURN:
        down = np.array((0, 0, -0.3 if lifted > 0.012 else 0.0))
        return Plan(down, OPEN if lifted < 0.014 else CLOSE, v.yaw)
    up = towards(np.array((0, 0, 0.010 - lifted)))
    ahead = direction * 0.2 if lifted > 0.004 else 0.0
    return Plan(up, CLOSE, v.yaw + ahead)


def _start_axis(v: View, block: str) -> float:
    return v._replace(info=v.start).long_axis(block)


def place_in_slider(v: View) -> Plan:
    """Into the half of the cabinet that the door leaves open, beside what lies there."""
    side, block = 1 if v.state[c.SLIDER] > s.SLIDE_RANGE / 2 else -1, carried(v)
    there = [side * (v.block(b)[0] - v.layout.cabinet_x) for b in s.BLOCKS if b != block and v.block(b)[1] > 0.03]
    ajar = s.SLIDE_RANGE - v.state[c.SLIDER] if side > 0 else v.state[c.SLIDER]
    along = max(s.SHELF_X, ajar + 0.10)  # clear of a door that is not fully open
    for other in sorted(there):
        if abs(other - along) < s.SHELF_APART:
            along = other + s.SHELF_APART
    return _place(v, np.array((v.layout.cabinet_x + side * along, s.SHELF_Y, _DESK_TOP + s.SHELF + 0.004)))


def place_in_drawer(v: View) -> Plan:
    y = -0.187 - v.state[c.DRAWER] / 2  # the middle of what stands out from under the desk
    return _place(v, np.array((v.layout.drawer_x, y, s.DRAWER_FLOOR + s.BLOCK_HEIGHT / 2 + 0.012)))


def stack(v: View) -> Plan:
    """Onto the nearest other block that lies on the desk."""
    top = carried(v)
    others = [b for b in s.BLOCKS if b != top and "table" in v.info["blocks"][b]["contacts"]]  # a shelf is no table
    bottom = min(others or [b for b in s.BLOCKS if b != top], key=lambda b: float(np.linalg.norm(v.block(b) - v.tcp)))
    return _place(v, v.block(bottom) + np.array((0, 0, s.BLOCK_HEIGHT + 0.005)), grip_yaw(v, bottom))


def _place(v: View, spot: np.ndarray, yaw: float = YAW) -> Plan:
    """Carry the block in hand so that its middle comes to `spot`, let go, and rise."""
    block = carried(v)
    there = np.abs(v.block(block) - spot)
    if v.held(block):
        if there[:2].max() < 0.008 and there[2] < 0.006 and abs(angle_between(yaw, v.yaw)) < 0.2:
            return Plan(np.zeros(3), OPEN, yaw)
        ready = float(np.clip(1.5 - 4 * abs(angle_between(yaw, v.yaw)), 0, 1))
        return Plan(reach(v.tcp, spot + (v.tcp - v.block(block)), ready), CLOSE, yaw)
    if there.max() < 0.03:
        return rise(v, OPEN)
    return grasp(v, block, grip_yaw(v, block))


def unstack(v: View) -> Plan:
    """Grasp the upper block, carry it aside and put it down."""
    stacked = [b for b in s.BLOCKS if _rests_on_blocks(v, b)]
    top = max(stacked or s.BLOCKS, key=lambda b: v.start["blocks"][b]["position"][2])
    return put_down(v, top) if v.held(top) else grasp(v, top, grip_yaw(v, top))


def _rests_on_blocks(v: View, block: str) -> bool:
    contacts = v.start["blocks"][block]["contacts"]
    return bool(contacts) and all(name.startswith("block_") for name in contacts)


def in_hand(v: View) -> str | None:
    """A block between closed fingers."""
    return next((block for block in s.BLOCKS if v.held(block)), None)


def between_fingers(v: View) -> bool:
    """A block that closing the fingers would catch."""
    return any(np.abs(v.block(block) - v.tcp).max() < 0.045 for block in s.BLOCKS)


def put_down(v: View, block: str) -> Plan:
    """Lay the block in hand on a free part of the desk: before a task that needs the gripper empty."""
    place = v.block(block)
    others = [v.block(other)[:2] for other in s.BLOCKS if other != block]
    spots = [
        np.array(spot)
        for spot in product(np.linspace(*v.layout.blocks_x, 8), (-0.145, -0.105, -0.065))
        if all(np.linalg.norm(other - spot) > 0.085 for other in others)
    ]
    spot = min(spots, key=lambda at: float(np.linalg.norm(at - place[:2]))) if spots else place[:2]
    low = place[2] - _DESK_TOP < 0.006
    if low and np.linalg.norm(place[:2] - spot) < 0.02:
        return Plan(np.zeros(3), OPEN, v.yaw)
    grip = v.tcp - place
    return Plan(reach(v.tcp, np.array((*spot, _DESK_TOP + 0.002)) + grip), CLOSE, v.yaw)
