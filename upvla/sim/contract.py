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
"""A symbolic state: slider left/right, drawer open/closed, lightbulb and led 0/1, grasped 0/1, <block>_block: where.

A block is at: table, slider_left or slider_right (a half of the cabinet), drawer, grasped, stacked_top, stacked_bottom.
"""

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
    """One way in which a task applies: what must hold before (a tuple: any of these), and what holds after."""

    before: Mapping[str, str | int | tuple[str, ...]]
    after: Symbols

    def applies(self, symbols: Symbols) -> bool:
        return all(
            symbols[key] in wanted if isinstance(wanted, tuple) else symbols[key] == wanted
            for key, wanted in self.before.items()
        )


@dataclass(frozen=True)
class TaskSpec:
    """`category`: a chain never holds two tasks of one category."""

    name: str
    category: int
    rules: tuple[Rule, ...] = field(repr=False)


_SIDES = ("right", "left")
_OPPOSITE = {"right": "left", "left": "right"}


def _free(before: Mapping[str, str | int | tuple[str, ...]], after: Symbols) -> Rule:
    """A task that starts with an empty gripper."""
    return Rule({**before, "grasped": 0}, after)


def _furniture() -> list[TaskSpec]:
    specs = [
        *(
            TaskSpec(f"move_slider_{side}", 2, (_free({"slider": _OPPOSITE[side]}, {"slider": side}),))
            for side in _SIDES
        ),
        TaskSpec("open_drawer", 3, (_free({"drawer": "closed"}, {"drawer": "open"}),)),
        TaskSpec("close_drawer", 3, (_free({"drawer": "open"}, {"drawer": "closed"}),)),
    ]
    for light in ("lightbulb", "led"):
        specs += [TaskSpec(f"turn_{word}_{light}", 8, (_free({light: 1 - lit}, {light: lit}),)) for word, lit in _LIT]
    return specs


_LIT = (("on", 1), ("off", 0))


def _one_block(block: str) -> list[TaskSpec]:
    """Tasks that name a block. One in the cabinet can be taken while the door stands before the other half."""
    key = f"{block}_block"
    held: Symbols = {key: "grasped", "grasped": 1}
    here: Symbols = {key: "table"}
    slider = tuple(_free({key: f"slider_{side}", "slider": _OPPOSITE[side]}, held) for side in ("left", "right"))
    return [
        *(
            TaskSpec(f"{verb}_{block}_block_{side}", 1, (_free(here, here),))
            for verb in ("rotate", "push")
            for side in _SIDES
        ),
        TaskSpec(f"lift_{block}_block_table", 4, (_free(here, held),)),
        TaskSpec(f"lift_{block}_block_slider", 5, slider),
        TaskSpec(f"lift_{block}_block_drawer", 6, (_free({key: "drawer", "drawer": "open"}, held),)),
    ]


def _any_block() -> list[TaskSpec]:
    """Tasks about the block in the gripper, about two, or about the only one on the table."""
    in_slider, in_drawer, stack, unstack, push_in = [], [], [], [], []
    for block in BLOCK_POSE:
        key, others = f"{block}_block", [f"{other}_block" for other in BLOCK_POSE if other != block]
        for (
            door,
            half,
        ) in _OPPOSITE.items():  # the open half; CALVIN notes the door's own side, from where none can lift
            in_slider.append(
                Rule({key: "grasped", "slider": door, "grasped": 1}, {key: f"slider_{half}", "grasped": 0})
            )
        in_drawer.append(Rule({key: "grasped", "drawer": "open", "grasped": 1}, {key: "drawer", "grasped": 0}))
        for other in others:
            on_it: Symbols = {key: "stacked_top", other: "stacked_bottom"}
            stack.append(Rule({key: "grasped", other: "table", "grasped": 1}, {**on_it, "grasped": 0}))
            unstack.append(_free(on_it, {key: "table", other: "table"}))
        away = dict.fromkeys(others, ("slider_right", "slider_left"))
        push_in.append(_free({key: "table", **away, "drawer": "open"}, {key: "drawer"}))
    return [
        TaskSpec("place_in_slider", 7, tuple(in_slider)),
        TaskSpec("place_in_drawer", 7, tuple(in_drawer)),
        TaskSpec("push_into_drawer", 9, tuple(push_in)),
        TaskSpec("stack_block", 10, tuple(stack)),
        TaskSpec("unstack_block", 11, tuple(unstack)),
    ]


SPECS: dict[str, TaskSpec] = {
    spec.name: spec for spec in (*_furniture(), *(s for block in BLOCK_POSE for s in _one_block(block)), *_any_block())
}


def next_symbols(task: str, symbols: Symbols) -> Symbols | None:
    """The state after `task`, or None where it does not apply in exactly one way."""
    matches = [rule for rule in SPECS[task].rules if rule.applies(symbols)]
    return {**symbols, **matches[0].after} if len(matches) == 1 else None
