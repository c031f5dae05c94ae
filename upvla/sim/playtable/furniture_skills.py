"""Experts for drawer, sliding door, button and switch: reach a contact point from above, then move in one direction."""

from __future__ import annotations

import numpy as np

from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.motion import CLOSE, OPEN, Plan, View, along, reach


def open_drawer(v: View) -> Plan:
    bar = np.array((v.layout.drawer_x, s.DRAWER_BAR[0] - v.state[c.DRAWER], s.DRAWER_BAR[1]))
    point = bar + np.array((0, 0.042, -0.012))
    behind = abs(v.tcp[0] - bar[0]) < 0.06 and 0.012 < v.tcp[1] - bar[1] < 0.075 and v.tcp[2] < bar[2] + 0.008
    return Plan(along(v.tcp, point, (0, -1, 0), 0.6) if behind else reach(v.tcp, point), CLOSE)


def close_drawer(v: View) -> Plan:
    bar = np.array((v.layout.drawer_x, s.DRAWER_BAR[0] - v.state[c.DRAWER], s.DRAWER_BAR[1]))
    point = bar + np.array((0, -0.050, -0.012))
    before = abs(v.tcp[0] - bar[0]) < 0.06 and -0.09 < v.tcp[1] - bar[1] < -0.012 and v.tcp[2] < bar[2] + 0.008
    return Plan(along(v.tcp, point, (0, 1, 0), 0.6) if before else reach(v.tcp, point), CLOSE)


def slide(direction: float, v: View) -> Plan:
    point = np.array((v.layout.handle_x - v.state[c.SLIDER], s.DOOR_HANDLE[0] - 0.008, s.DOOR_HANDLE[1] + 0.010))
    around = abs(v.tcp[0] - point[0]) < 0.045 and abs(v.tcp[1] - point[1]) < 0.02 and v.tcp[2] < point[2] + 0.015
    return Plan(along(v.tcp, point, (direction, 0, 0), 0.6) if around else reach(v.tcp, point), OPEN)


def press_button(v: View) -> Plan:
    point = np.array((v.layout.button_x, s.BUTTON_Y, s.DESK_Z + 0.045))
    over = float(np.linalg.norm(v.tcp[:2] - point[:2])) < 0.022 and v.tcp[2] < point[2] + 0.015
    return Plan(along(v.tcp, point, (0, 0, -1), 0.4) if over else reach(v.tcp, point), CLOSE)


def push_switch(direction: float, v: View) -> Plan:
    """Away from the robot (`direction` 1) lights the bulb, towards it puts it out."""
    paddle = np.array((v.layout.switch_x, s.SWITCH_Y + v.state[c.SWITCH], s.DESK_Z + 0.032))
    point = paddle - (0, direction * 0.042, 0)
    gap = direction * (paddle[1] - v.tcp[1])
    beside = abs(v.tcp[0] - paddle[0]) < 0.025 and 0.01 < gap < 0.08 and v.tcp[2] < paddle[2] + 0.02
    return Plan(along(v.tcp, point, (0, direction, 0), 0.5) if beside else reach(v.tcp, point), CLOSE)
