from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from upvla.data.language import DRAWER_HANDLE_X
from upvla.errors import ConfigError
from upvla.sim import contract
from upvla.sim.playtable.scene import LAYOUTS
from upvla.sim.playtable.tasks import TASKS, instruction, succeeded, task


def info(
    *, slider: float = 0.0, drawer: float = 0.0, bulb: int = 0, led: int = 0, **blocks: dict[str, Any]
) -> dict[str, Any]:
    """What an environment reports, with every block at rest on the table unless told otherwise."""
    rest = at(0.0, 0.46, "table")
    states = {colour: rest | blocks.get(colour, {}) for colour in contract.BLOCK_POSE}
    held = frozenset(f"block_{colour}" for colour, block in states.items() if "robot" in block["contacts"])
    return {
        "doors": {"slider": slider, "drawer": drawer},
        "lights": {"lightbulb": bulb, "led": led},
        "blocks": states,
        "robot": {"contacts": held},
    }


def at(x: float = 0.0, z: float = 0.46, *contacts: str, yaw: float = 0.0, speed: float = 0.0) -> dict[str, Any]:
    return {
        "position": np.array((x, -0.1, z)),
        "quaternion": np.array((np.cos(np.radians(yaw) / 2), 0, 0, np.sin(np.radians(yaw) / 2))),
        "velocity": np.array((speed, 0, 0, 0, 0, 0)),
        "contacts": frozenset(contacts),
    }


HELD = info(red=at(0, 0.6, "robot"))
STACKED = info(red=at(0, 0.5, "block_blue"), blue=at(0, 0.46, "table", "block_red"))


@pytest.mark.parametrize(
    ("name", "start", "end", "expected"),
    [
        ("open_drawer", info(), info(drawer=0.121), True),
        ("open_drawer", info(), info(drawer=0.119), False),
        ("open_drawer", info(drawer=0.1), info(drawer=0.2), False),  # the change counts, not the place
        ("close_drawer", info(drawer=0.22), info(drawer=0.09), True),
        ("close_drawer", info(drawer=0.22), info(drawer=0.11), False),
        ("move_slider_left", info(), info(slider=0.16), True),
        ("move_slider_left", info(slider=0.28), info(slider=0.1), False),
        ("move_slider_right", info(slider=0.28), info(slider=0.12), True),
        ("turn_on_lightbulb", info(), info(bulb=1), True),
        ("turn_on_lightbulb", info(bulb=1), info(bulb=1), False),  # it was on already
        ("turn_on_led", info(), info(bulb=1), False),
        ("turn_on_led", info(), info(led=1), True),
        ("lift_red_block_table", info(), info(red=at(0, 0.52, "robot")), True),
        ("lift_red_block_table", info(), info(red=at(0, 0.50, "robot")), False),
        ("lift_red_block_table", info(), info(red=at(0, 0.52, "robot", "block_blue")), False),
        ("lift_red_block_table", info(), info(red=at(0, 0.52)), False),  # thrown, not held
        ("lift_red_block_table", info(red=at(0, 0.46, "plank")), info(red=at(0, 0.52, "robot")), False),
        ("lift_red_block_table", info(), info(blue=at(0, 0.52, "robot")), False),
        ("push_blue_block_right", info(), info(blue=at(0.11, 0.46, "table", "robot")), True),
        ("push_blue_block_right", info(), info(blue=at(0.09, 0.46, "table")), False),
        ("push_blue_block_right", info(), info(blue=at(-0.11, 0.46, "table")), False),
        ("push_blue_block_right", info(), info(blue=at(0.11, 0.5, "robot")), False),  # carried, not pushed
        ("push_blue_block_right", info(), info(red=at(0.11, 0.46, "table")), False),
        ("push_blue_block_right", info(), info(blue=at(0.11, 0.46, "table", "block_red")), False),  # on what it was on
        ("push_blue_block_right", info(), info(blue=at(0.11, 0.46, "table", "drawer")), True),  # furniture is one body
        ("push_pink_block_left", info(), info(pink=at(-0.11, 0.46, "table")), True),
        ("turn_off_led", info(led=1), info(), True),
        ("turn_off_led", info(), info(), False),
        ("turn_off_lightbulb", info(bulb=1), info(led=1), True),
        ("lift_red_block_table", info(red=at(0, 0.46, "table", "robot")), info(red=at(0, 0.52, "robot")), False),
        ("lift_red_block_slider", info(red=at(0, 0.46, "plank")), info(red=at(0, 0.5, "robot")), True),
        ("lift_red_block_slider", info(red=at(0, 0.46, "plank")), info(red=at(0, 0.48, "robot")), False),
        ("lift_red_block_drawer", info(red=at(0, 0.32, "drawer")), info(red=at(0, 0.4, "robot")), True),
        ("lift_red_block_drawer", info(), info(red=at(0, 0.6, "robot")), False),
        ("rotate_red_block_right", info(), info(red=at(0, 0.46, "table", yaw=-61)), True),
        ("rotate_red_block_right", info(), info(red=at(0, 0.46, "table", yaw=-59)), False),
        ("rotate_red_block_right", info(), info(red=at(0, 0.46, "table", yaw=61)), False),
        ("rotate_red_block_left", info(), info(red=at(0, 0.46, "table", "robot", yaw=61)), True),
        ("rotate_red_block_left", info(), info(red=at(0, 0.46, "robot", yaw=90)), False),  # still in the air
        ("rotate_red_block_left", info(), info(red=at(0.11, 0.46, "table", yaw=90)), False),  # moved too far
        (
            "rotate_red_block_left",
            info(red=at(0, 0.46, "table", yaw=170)),
            info(red=at(0, 0.46, "table", yaw=240)),
            True,
        ),
        ("place_in_slider", HELD, info(red=at(0, 0.46, "plank")), True),
        ("place_in_slider", HELD, info(red=at(0, 0.46, "plank", "robot")), False),
        ("place_in_slider", HELD, info(red=at(0, 0.46, "table")), False),
        ("place_in_slider", info(), info(red=at(0, 0.46, "plank")), False),  # it was not in hand
        ("place_in_slider", HELD, info(blue=at(0, 0.46, "plank")), False),
        ("place_in_drawer", HELD, info(red=at(0, 0.32, "drawer")), True),
        ("place_in_drawer", info(red=at(0, 0.5, "robot", "table")), info(red=at(0, 0.32, "drawer")), False),
        ("push_into_drawer", info(), info(pink=at(0, 0.32, "drawer")), True),
        ("push_into_drawer", info(), info(pink=at(0, 0.32, "drawer", "robot")), False),
        ("push_into_drawer", HELD, info(red=at(0, 0.32, "drawer")), False),
        ("stack_block", HELD, STACKED, True),
        ("stack_block", HELD, info(red=at(0, 0.5, "block_blue", "robot")), False),
        ("stack_block", HELD, info(red=at(0, 0.5, "block_blue", "table")), False),
        ("stack_block", HELD, info(red=at(0, 0.5, "block_blue", speed=1.5)), False),
        ("stack_block", STACKED, STACKED, False),
        ("unstack_block", STACKED, info(red=at(0.1, 0.5, "robot")), True),
        ("unstack_block", STACKED, STACKED, False),
        ("unstack_block", info(), info(), False),
    ],
)
def test_oracle(name: str, start: dict[str, Any], end: dict[str, Any], expected: bool) -> None:
    assert succeeded(name, start, end) is expected


def test_all_of_calvins_tasks_are_there_and_chains_of_five_use_eleven_categories() -> None:
    assert len(TASKS) == 34
    assert {row.spec.category for row in TASKS.values()} == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}
    assert TASKS["rotate_red_block_left"].spec.category == TASKS["push_pink_block_right"].spec.category


def test_instructions_tell_tasks_apart_and_the_held_out_one_is_never_trained_on() -> None:
    trained = [text for row in TASKS.values() for text in row.train]
    held_out = [row.held_out for row in TASKS.values()]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)
    assert all(len(row.train) >= 11 for row in TASKS.values())
    rng = np.random.default_rng(0)
    drawn = {instruction("open_drawer", rng) for _ in range(200)}
    assert drawn == set(TASKS["open_drawer"].train)
    assert instruction("open_drawer") == TASKS["open_drawer"].held_out


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no task 'open_door'.*open_drawer"):
        task("open_door")


def test_symbols_follow_a_block_from_the_table_through_hand_and_drawer() -> None:
    symbols: contract.Symbols | None = {key: values[0] for key, values in contract.INITIAL_SYMBOLS.items()}
    path = ("lift_red_block_table", "stack_block", "unstack_block", "open_drawer", "lift_red_block_table")
    symbols = {**symbols, "pink_block": "slider_left"}
    for name in path:
        assert symbols is not None
        symbols = contract.next_symbols(name, symbols)
    assert symbols is not None and symbols["grasped"] == 1
    assert contract.next_symbols("close_drawer", symbols) is None  # the hand is full
    stored = contract.next_symbols("place_in_drawer", symbols)
    assert stored is not None and stored["red_block"] == "drawer" and stored["grasped"] == 0
    assert contract.next_symbols("lift_red_block_drawer", stored) is not None


def test_stacking_needs_a_single_other_block_on_the_table() -> None:
    symbols: contract.Symbols = {key: values[0] for key, values in contract.INITIAL_SYMBOLS.items()}
    held = contract.next_symbols("lift_red_block_table", symbols)  # blue and pink lie on the table: two ways
    assert held is not None and contract.next_symbols("stack_block", held) is None


def test_a_block_goes_into_the_half_that_the_door_leaves_open_and_is_shut_in_by_it() -> None:
    symbols: contract.Symbols = {key: values[0] for key, values in contract.INITIAL_SYMBOLS.items()}
    held = contract.next_symbols("lift_red_block_table", {**symbols, "slider": "right"})
    assert held is not None
    stored = contract.next_symbols("place_in_slider", held)
    assert stored is not None and stored["red_block"] == "slider_left"
    shut = contract.next_symbols("move_slider_left", stored)
    assert shut is not None and contract.next_symbols("lift_red_block_slider", shut) is None
    assert contract.next_symbols("lift_red_block_slider", stored) is not None


def test_questions_know_where_each_scene_has_its_drawer_handle() -> None:
    assert {f"playtable_{name}": layout.drawer_x for name, layout in LAYOUTS.items()} == DRAWER_HANDLE_X
