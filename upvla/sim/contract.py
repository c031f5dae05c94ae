"""What CALVIN publishes and every tabletop here follows: state layouts, task categories, symbolic conditions, limits.

Pure facts, no engine: the playtable, an adapter to the real environment and question generators share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_STEPS = 360  # environment steps a subtask may take
CHAIN_LENGTH = 5

ROBOT_STATE = (
    "tcp_x", "tcp_y", "tcp_z", "tcp_roll", "tcp_pitch", "tcp_yaw", "gripper_width",
    *(f"arm_{i}" for i in range(1, 8)), "gripper_action",
)  # fmt: skip
TCP_POSITION, TCP_EULER, GRIPPER_WIDTH, ARM, GRIPPER_ACTION = slice(0, 3), slice(3, 6), 6, slice(7, 14), 14

SLIDER, DRAWER, BUTTON, SWITCH, LIGHTBULB, LED = range(6)
BLOCK_POSE = {"red": slice(6, 12), "blue": slice(12, 18), "pink": slice(18, 24)}  # xyz in m, euler xyz in rad
SCENE_STATE = (
    "slider", "drawer", "button", "switch", "lightbulb", "led",
    *(f"{block}_{axis}" for block in BLOCK_POSE for axis in ("x", "y", "z", "roll", "pitch", "yaw")),
)  # fmt: skip

Symbols = Mapping[str, str | int]
"""A symbolic state: slider left/right, drawer open/closed, lightbulb and led 0/1, grasped 0/1, <block>_block: where."""

INITIAL_SYMBOLS: dict[str, tuple[str | int, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **{f"{block}_block": ("table", "slider_right", "slider_left") for block in BLOCK_POSE},
    "grasped": (0,),
}


@dataclass(frozen=True)
class Rule:
    """One way in which a task applies: what must hold before, and what holds after."""

    before: Symbols
    after: Symbols


@dataclass(frozen=True)
class TaskSpec:
    """`category`: a chain never holds two tasks of one category."""

    name: str
    category: int
    rules: tuple[Rule, ...] = field(repr=False)


def _free(before: Symbols, after: Symbols) -> tuple[Rule, ...]:
    """A task that starts with an empty gripper."""
    return (Rule({**before, "grasped": 0}, after),)


def _specs() -> dict[str, TaskSpec]:
    specs = [
        TaskSpec("open_drawer", 3, _free({"drawer": "closed"}, {"drawer": "open"})),
        TaskSpec("close_drawer", 3, _free({"drawer": "open"}, {"drawer": "closed"})),
        TaskSpec("move_slider_left", 2, _free({"slider": "right"}, {"slider": "left"})),
        TaskSpec("move_slider_right", 2, _free({"slider": "left"}, {"slider": "right"})),
        *(TaskSpec(f"turn_on_{light}", 8, _free({light: 0}, {light: 1})) for light in ("lightbulb", "led")),
    ]
    for block in BLOCK_POSE:
        here: Symbols = {f"{block}_block": "table"}
        specs += [TaskSpec(f"push_{block}_block_{side}", 1, _free(here, here)) for side in ("right", "left")]
        held: Symbols = {f"{block}_block": "grasped", "grasped": 1}
        specs.append(TaskSpec(f"lift_{block}_block_table", 4, _free(here, held)))
    return {spec.name: spec for spec in specs}


SPECS: dict[str, TaskSpec] = _specs()


def next_symbols(task: str, symbols: Symbols) -> Symbols | None:
    """The state after `task`, or None where it does not apply in exactly one way."""
    matches = [rule for rule in SPECS[task].rules if all(symbols[key] == value for key, value in rule.before.items())]
    return {**symbols, **matches[0].after} if len(matches) == 1 else None
