from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from upvla.errors import ConfigError
from upvla.sim import contract
from upvla.sim.playtable.tasks import TASKS, instruction, succeeded, task


def info(
    *, slider: float = 0.0, drawer: float = 0.0, bulb: int = 0, led: int = 0, **blocks: dict[str, Any]
) -> dict[str, Any]:
    """What an environment reports, with every block at rest on the table unless told otherwise."""
    rest = {"position": np.array((0.0, -0.1, 0.46)), "contacts": frozenset({"table"})}
    return {
        "doors": {"slider": slider, "drawer": drawer},
        "lights": {"lightbulb": bulb, "led": led},
        "blocks": {colour: rest | blocks.get(colour, {}) for colour in contract.BLOCK_POSE},
    }


def at(x: float = 0.0, z: float = 0.46, *contacts: str) -> dict[str, Any]:
    return {"position": np.array((x, -0.1, z)), "contacts": frozenset(contacts)}


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
    ],
)
def test_oracle(name: str, start: dict[str, Any], end: dict[str, Any], expected: bool) -> None:
    assert succeeded(name, start, end) is expected


def test_five_categories_so_that_chains_of_five_exist() -> None:
    assert len({row.spec.category for row in TASKS.values()}) == contract.CHAIN_LENGTH
    assert TASKS["turn_on_led"].spec.category == TASKS["turn_on_lightbulb"].spec.category


def test_instructions_tell_tasks_apart_and_the_held_out_one_is_never_trained_on() -> None:
    trained = [text for row in TASKS.values() for text in row.train]
    held_out = [row.held_out for row in TASKS.values()]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)
    assert all(len(row.train) >= 6 for row in TASKS.values())
    rng = np.random.default_rng(0)
    drawn = {instruction("open_drawer", rng) for _ in range(200)}
    assert drawn == set(TASKS["open_drawer"].train)
    assert instruction("open_drawer") == TASKS["open_drawer"].held_out


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no task 'open_door'.*open_drawer"):
        task("open_door")


def test_a_lift_ends_a_chain_because_it_leaves_the_gripper_full() -> None:
    symbols: contract.Symbols = {key: values[0] for key, values in contract.INITIAL_SYMBOLS.items()}
    held = contract.next_symbols("lift_red_block_table", symbols)
    assert held is not None
    assert held["grasped"] == 1
    assert all(contract.next_symbols(name, held) is None for name in TASKS)
    assert contract.next_symbols("close_drawer", symbols) is None  # it is closed
