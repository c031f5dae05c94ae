"""The playtable's tasks: how success is judged.

Names, categories, conditions and thresholds are CALVIN's (its task oracle and the configuration of its 34 tasks).
Success compares the `info()` of an environment at the start of a subtask with the one now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.contract import BLOCK_POSE, SPECS, TaskSpec
from upvla.sim.playtable.wording import wording

Info = Mapping[str, Any]
Judge = Callable[[Info, Info], bool]

_FURNITURE = frozenset({"table", "plank", "drawer", "slide", "button", "switch"})  # parts of one body in CALVIN
_BLOCKS = frozenset(f"block_{block}" for block in BLOCK_POSE)
_ROBOT = frozenset({"robot"})


@dataclass(frozen=True)
class Task:
    """A row of the table: `train` are the paraphrases of recordings, `held_out` is only ever asked in evaluation."""

    spec: TaskSpec
    judge: Judge
    train: tuple[str, ...]
    held_out: str


def _bodies(contacts: frozenset[str]) -> frozenset[str]:
    """Contacts by body: all furniture is one."""
    return frozenset("furniture" if name in _FURNITURE else name for name in contacts)


def _door(name: str, threshold: float, start: Info, end: Info) -> bool:
    """The joint moved by more than `threshold`, in its direction."""
    moved = end["doors"][name] - start["doors"][name]
    return bool(moved > threshold if threshold > 0 else moved < threshold)


def _switched(light: str, before: int, after: int, start: Info, end: Info) -> bool:
    return bool(start["lights"][light] == before and end["lights"][light] == after)


def _rotated(block: str, degrees: float, start: Info, end: Info) -> bool:
    """Turned about z by more than `degrees` (signed) and by less than 30 about x and y, moved by no more than 0.1 m,
    and not in the air."""
    first, last = start["blocks"][block], end["blocks"][block]
    if np.linalg.norm(last["position"] - first["position"]) > 0.1 or not last["contacts"] - _ROBOT:
        return False
    roll, pitch, yaw = (math.degrees(angle) for angle in _turn(first["quaternion"], last["quaternion"]))
    upright = abs(roll) < 30 and abs(pitch) < 30
    return upright and (degrees < yaw < 180 if degrees > 0 else degrees > yaw > -180)


def _turn(start: np.ndarray, end: np.ndarray) -> tuple[float, float, float]:
    """Euler xyz about fixed axes of the rotation from one quaternion (w first) to the other."""
    (aw, ax, ay, az), (bw, bx, by, bz) = start.tolist(), end.tolist()
    w, x = bw * aw + bx * ax + by * ay + bz * az, bx * aw - bw * ax - by * az + bz * ay
    y, z = by * aw - bw * ay - bz * ax + bx * az, bz * aw - bw * az - bx * ay + by * ax
    return (
        math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
        math.asin(max(-1.0, min(1.0, 2 * (w * y - z * x)))),
        math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
    )


def _pushed(block: str, distance: float, start: Info, end: Info) -> bool:
    """Moved in x by more than `distance` (signed), resting on something, and on the same bodies as before."""
    first, last = start["blocks"][block], end["blocks"][block]
    supports, now = (_bodies(info["contacts"] - _ROBOT) for info in (first, last))
    if not supports or supports != now:
        return False
    moved = last["position"][0] - first["position"][0]
    return bool(moved > distance if distance > 0 else moved < distance)


def _lifted(block: str, height: float, surface: str, start: Info, end: Info) -> bool:
    """Rose by more than `height` from `surface`, where the robot did not touch it; now only the robot does."""
    first, last = start["blocks"][block], end["blocks"][block]
    rose = last["position"][2] - first["position"][2] > height
    lay = surface in first["contacts"] and "robot" not in first["contacts"]
    return bool(rose and lay and last["contacts"] == _ROBOT)


def _placed(surface: str, start: Info, end: Info) -> bool:
    """The one thing that the robot held in the air touches `surface`, and the robot no more."""
    held = start["robot"]["contacts"]
    if len(_bodies(held)) != 1 or not held <= _BLOCKS:
        return False
    block = next(iter(held)).removeprefix("block_")
    first, last = (info["blocks"][block]["contacts"] for info in (start, end))
    return bool(first == _ROBOT and surface in last and "robot" not in last)


def _pushed_into(source: str, surface: str, start: Info, end: Info) -> bool:
    """A block that rested on `source` alone touches `surface`; the robot touches it at neither time."""
    pairs = ((start["blocks"][block]["contacts"], end["blocks"][block]["contacts"]) for block in BLOCK_POSE)
    return any(first == {source} and surface in last and "robot" not in last for first, last in pairs)


def _stacked(start: Info, end: Info) -> bool:
    """A block that touched no other rests on others alone, slower than 1 m/s and 1 rad/s."""
    return any(
        not start["blocks"][block]["contacts"] & _BLOCKS and _on_blocks(end["blocks"][block]) for block in BLOCK_POSE
    )


def _unstacked(start: Info, end: Info) -> bool:
    """A block that rested on others alone touches none."""
    return any(
        _on_blocks(start["blocks"][block]) and not end["blocks"][block]["contacts"] & _BLOCKS for block in BLOCK_POSE
    )


def _on_blocks(block: Mapping[str, Any]) -> bool:
    return bool(block["contacts"]) and block["contacts"] <= _BLOCKS and bool((np.abs(block["velocity"]) < 1).all())


def _judges() -> dict[str, Judge]:
    found: dict[str, Judge] = {
        "open_drawer": partial(_door, "drawer", 0.12),
        "close_drawer": partial(_door, "drawer", -0.12),
        "move_slider_left": partial(_door, "slider", 0.15),
        "move_slider_right": partial(_door, "slider", -0.15),
        "place_in_slider": partial(_placed, "plank"),
        "place_in_drawer": partial(_placed, "drawer"),
        "push_into_drawer": partial(_pushed_into, "table", "drawer"),
        "stack_block": _stacked,
        "unstack_block": _unstacked,
    }
    for light in ("lightbulb", "led"):
        found[f"turn_on_{light}"] = partial(_switched, light, 0, 1)
        found[f"turn_off_{light}"] = partial(_switched, light, 1, 0)
    for block in BLOCK_POSE:
        for side, sign in (("right", 1), ("left", -1)):
            found[f"rotate_{block}_block_{side}"] = partial(_rotated, block, -60.0 * sign)
            found[f"push_{block}_block_{side}"] = partial(_pushed, block, 0.1 * sign)
        for name, surface, height in (("table", "table", 0.05), ("slider", "plank", 0.03), ("drawer", "drawer", 0.05)):
            found[f"lift_{block}_block_{name}"] = partial(_lifted, block, height, surface)
    return found


def _tasks() -> dict[str, Task]:
    judges = _judges()
    return {name: Task(spec, judges[name], wording(name).train, wording(name).held_out) for name, spec in SPECS.items()}


TASKS: dict[str, Task] = _tasks()


def task(name: str) -> Task:
    """Raises `ConfigError` for a task that the playtable does not have."""
    if name not in TASKS:
        raise ConfigError(f"playtable has no task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def succeeded(name: str, start_info: Info, end_info: Info) -> bool:
    """Whether the task was done between the two `info()`s."""
    return task(name).judge(start_info, end_info)


def instruction(name: str, rng: np.random.Generator | None = None) -> str:
    """A training paraphrase drawn with `rng`, or the held-out wording without one."""
    row = task(name)
    return row.held_out if rng is None else row.train[int(rng.integers(len(row.train)))]
