"""The playtable's tasks: how success is judged, and what a person says to ask for it.

Names, categories, conditions and thresholds are CALVIN's; the wording is this project's. Success compares the `info()`
of an environment at the start of a subtask with the one now. A new task is one more row of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.contract import SPECS, TaskSpec

Info = Mapping[str, Any]
Judge = Callable[[Info, Info], bool]


@dataclass(frozen=True)
class Task:
    """A row of the table: `train` are the paraphrases of recordings, `held_out` is only ever asked in evaluation."""

    spec: TaskSpec
    judge: Judge
    train: tuple[str, ...]
    held_out: str


def _door(name: str, threshold: float, start: Info, end: Info) -> bool:
    """The joint moved by more than `threshold`, in its direction."""
    moved = end["doors"][name] - start["doors"][name]
    return bool(moved > threshold if threshold > 0 else moved < threshold)


def _switched(light: str, before: int, after: int, start: Info, end: Info) -> bool:
    return bool(start["lights"][light] == before and end["lights"][light] == after)


def _pushed(block: str, distance: float, start: Info, end: Info) -> bool:
    """Moved in x by more than `distance` (signed), resting at the end on everything that it rested on before."""
    first, last = start["blocks"][block], end["blocks"][block]
    supports, now = (info["contacts"] - {"robot"} for info in (first, last))
    if not supports or not supports <= now:
        return False
    moved = last["position"][0] - first["position"][0]
    return bool(moved > distance if distance > 0 else moved < distance)


def _lifted(block: str, height: float, surface: str, start: Info, end: Info) -> bool:
    """Rose by more than `height` from `surface`, and now touches nothing but the robot."""
    first, last = start["blocks"][block], end["blocks"][block]
    rose = last["position"][2] - first["position"][2] > height
    return bool(rose and surface in first["contacts"] and last["contacts"] == {"robot"})


def _row(name: str, judge: Judge, held_out: str, *train: str) -> tuple[str, Task]:
    return name, Task(SPECS[name], judge, train, held_out)


TASKS: dict[str, Task] = dict((
    _row("open_drawer", partial(_door, "drawer", 0.12), "open the drawer of the desk",
         "pull the handle to open the drawer", "take the drawer handle and pull it out", "open up the drawer",
         "the drawer should be open", "slide the drawer out towards you", "get the drawer open",
         "pull out the drawer", "please open the drawer"),
    _row("close_drawer", partial(_door, "drawer", -0.12), "close the drawer of the desk",
         "push the handle to close the drawer", "shove the drawer back in", "shut the drawer",
         "the drawer should be closed", "slide the drawer back into the desk", "get the drawer shut",
         "push the drawer in", "please close the drawer"),
    _row("move_slider_left", partial(_door, "slider", 0.15), "move the sliding door to the left side",
         "slide the door to the left", "take the door handle and move it left", "drag the sliding door leftwards",
         "the sliding door should be on the left", "push the cabinet door left", "move the door left",
         "bring the sliding door to the left end", "please slide the cabinet door to the left"),
    _row("move_slider_right", partial(_door, "slider", -0.15), "move the sliding door to the right side",
         "slide the door to the right", "take the door handle and move it right", "drag the sliding door rightwards",
         "the sliding door should be on the right", "push the cabinet door right", "move the door right",
         "bring the sliding door to the right end", "please slide the cabinet door to the right"),
    _row("turn_on_lightbulb", partial(_switched, "lightbulb", 0, 1), "turn on the light bulb with the switch",
         "push the purple switch to light the bulb", "switch the bulb on", "make the yellow lamp shine",
         "the light bulb should be on", "use the switch to turn on the lamp", "flip the switch so the bulb glows",
         "move the lever to turn the bulb on", "please switch on the light bulb"),
    _row("turn_on_led", partial(_switched, "led", 0, 1), "turn on the green led with the button",
         "press the orange button to light the led", "push the button down", "make the green light shine",
         "the led should be on", "use the button to switch on the led", "press the button so the led glows",
         "hit the round button to turn on the green light", "please turn the led on"),
    _row("lift_red_block_table", partial(_lifted, "red", 0.05, "table"), "lift the red block up from the desk",
         "pick up the red block", "grasp the red block and raise it", "take the red block off the table",
         "the red block should be in the air", "grab the red cube and lift it", "raise the red block",
         "hold the red block above the table", "please pick the red block up"),
    _row("push_blue_block_right", partial(_pushed, "blue", 0.1), "push the blue block towards the right",
         "slide the blue block to the right", "shove the blue block right", "move the blue cube rightwards",
         "the blue block should be further right", "nudge the blue block along to the right side",
         "push the blue cube to the right", "drive the blue block right along the table",
         "please push the blue block right"),
))  # fmt: skip


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
