from __future__ import annotations

import time
from itertools import permutations

import numpy as np
import pytest

from upvla.errors import ConfigError
from upvla.sim import contract as c
from upvla.sim.playtable import chains, scene
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.tasks import TASKS, succeeded


def valid(tasks: tuple[str, ...], symbols: c.Symbols) -> bool:
    """By the rule itself: each applies in its turn and no category comes twice."""
    state: c.Symbols | None = symbols
    for name in tasks:
        if state is None:
            return False
        state = c.next_symbols(name, state)
    return state is not None and len({c.SPECS[name].category for name in tasks}) == len(tasks)


def test_drawn_chains_are_exactly_those_that_the_rule_allows_and_equally_likely() -> None:
    rng = np.random.default_rng(3)
    names = (
        "open_drawer", "close_drawer", "move_slider_left", "turn_on_led", "turn_on_lightbulb", "push_blue_block_right",
        "lift_red_block_table", "stack_block",
    )  # fmt: skip
    symbols = chains.symbols_at_random(rng) | {"red_block": "table", "blue_block": "table", "pink_block": "slider_left"}
    allowed = {tasks for tasks in permutations(names, 3) if valid(tasks, symbols)}
    draws = [chains.chain_at_random(symbols, 3, names, rng) for _ in range(60 * len(allowed))]
    counts = {tasks: draws.count(tasks) for tasks in set(draws)}
    assert set(counts) == allowed
    assert 30 <= min(counts.values()) <= max(counts.values()) <= 95  # 60 expected, deviation 8


def test_chains_depend_on_scene_seed_and_index_alone() -> None:
    few, many = chains.sample_chains("A", 3, seed=5), chains.sample_chains("A", 6, seed=5)
    for one, same in zip(few, many, strict=False):
        assert one.tasks == same.tasks
        np.testing.assert_array_equal(one.robot_state, same.robot_state)
        np.testing.assert_array_equal(one.scene_state, same.scene_state)
    others = chains.sample_chains("A", 3, seed=6) + chains.sample_chains("B", 3, seed=5)
    assert all(not np.array_equal(few[0].robot_state, other.robot_state) for other in others)


def test_states_hold_what_the_symbols_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        symbols = chains.symbols_at_random(rng)
        _, state = chains.state_at_random("C", symbols, rng)
        assert (state[c.SLIDER] > 0.14) == (symbols["slider"] == "left")
        assert (state[c.DRAWER] > 0.11) == (symbols["drawer"] == "open")
        assert (state[c.LIGHTBULB], state[c.LED]) == (symbols["lightbulb"], symbols["led"])
        assert (state[c.SWITCH] > 0.044) == bool(symbols["lightbulb"])
        for block, where in c.BLOCK_POSE.items():
            x, y = state[where][:2]
            place = symbols[f"{block}_block"]
            assert (y < 0) == (place == "table")
            if place != "table":
                assert (x > scene.layout("C").cabinet_x) == (place == "slider_right")


def test_every_start_of_a_task_admits_it_and_no_two_are_alike() -> None:
    starts = chains.sample_starts("D", "close_drawer", 20, seed=1)
    assert all(start.tasks == ("close_drawer",) and start.scene_state[c.DRAWER] > 0.2 for start in starts)
    assert len({start.robot_state.tobytes() for start in starts}) == 20


def test_shared_starts_offer_as_many_tasks_as_can_apply_together() -> None:
    tasks = ("open_drawer", "close_drawer", "lift_red_block_table", "push_blue_block_right", "lift_pink_block_slider")
    for start in chains.sample_shared_starts("A", tasks, 3, seed=0):
        assert len(start.tasks) == 4  # the drawer admits one direction
        assert {"lift_red_block_table", "push_blue_block_right"} <= set(start.tasks)


@pytest.mark.parametrize("task", TASKS)
def test_starts_of_every_task_hold_what_its_rule_asks(task: str) -> None:
    """Also those that no initial state admits: a block in the gripper, in the drawer, on another block."""
    env = PlaytableEnv("B")
    for start in chains.sample_starts("B", task, 3, seed=2):
        env.reset(start.robot_state, start.scene_state)
        before = env.info()
        places = {block: row["contacts"] for block, row in before["blocks"].items()}
        if task in ("place_in_slider", "place_in_drawer", "stack_block"):
            (held,) = before["robot"]["contacts"]
            assert places[held.removeprefix("block_")] == {"robot"}
        else:
            assert not before["robot"]["contacts"]
        if task == "unstack_block":
            assert any(on and all(name.startswith("block_") for name in on) for on in places.values())
        if task.startswith("lift_red"):
            surface = {"table": "table", "slider": "plank", "drawer": "drawer"}[task.rsplit("_", 1)[1]]
            assert surface in places["red"]
        assert not succeeded(task, before, before)


def test_a_thousand_chains_of_a_scene_use_every_task_and_come_from_one_draw() -> None:
    found = chains.sample_chains("D", 1000, seed=0)
    assert {task for chain in found for task in chain.tasks} == set(TASKS)
    assert all(len({c.SPECS[task].category for task in chain.tasks}) == 5 for chain in found)
    began = time.perf_counter()
    again = chains.sample_chains("D", 1000, seed=0)
    assert time.perf_counter() - began < 0.5  # kept
    assert all(one is same for one, same in zip(found, again, strict=True))


def test_impossible_chains_are_refused() -> None:
    with pytest.raises(ConfigError, match="no chain of 2 tasks"):
        chains.sample_chains("A", 1, 0, 2, ("turn_on_led", "turn_on_lightbulb"))
