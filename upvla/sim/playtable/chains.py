"""Initial states and chains of tasks, each a pure function of a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from upvla.errors import ConfigError
from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.tasks import TASKS
from upvla.types import Chain

_START = np.array(((-0.07, -0.19, 0.57), (0.11, -0.07, 0.63)))  # box of robot start positions
_ROWS = (-0.135, -0.045)  # y of the two rows of blocks on the desk: one can be pushed past the other
_ATTEMPTS = 20_000


@lru_cache(maxsize=len(s.LAYOUTS))
def _arm(scene: str) -> PlaytableEnv:
    """An environment for inverse kinematics only; it never renders."""
    return PlaytableEnv(scene)


def symbols_at_random(rng: np.random.Generator) -> c.Symbols:
    """CALVIN's initial conditions: one or two blocks on the table, at most one in each half of the cabinet."""
    while True:
        symbols = {key: values[int(rng.integers(len(values)))] for key, values in c.INITIAL_SYMBOLS.items()}
        places = [symbols[f"{block}_block"] for block in s.BLOCKS]
        if places.count("table") in (1, 2) and all(places.count(f"slider_{side}") < 2 for side in ("left", "right")):
            return symbols


def state_at_random(scene: str, symbols: c.Symbols, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(robot f64[15], scene f64[24]) in which `symbols` hold, with varied gripper and block poses."""
    layout, state = s.layout(scene), np.zeros(24)
    state[c.SLIDER] = s.SLIDE_RANGE if symbols["slider"] == "left" else 0.0
    state[c.DRAWER] = s.DRAWER_RANGE if symbols["drawer"] == "open" else 0.0
    state[c.SWITCH] = s.SWITCH_RANGE if symbols["lightbulb"] else 0.0
    state[c.LIGHTBULB], state[c.LED] = symbols["lightbulb"], symbols["led"]
    rows = list(rng.permutation(_ROWS))
    for block, where in c.BLOCK_POSE.items():
        place = symbols[f"{block}_block"]
        if place == "table":
            low, high = layout.blocks_x
            if block == "blue":
                low, high = low + 0.02, high - 0.13  # room for the gripper on its left, and to be pushed right
            x, y = rng.uniform(low, high), rows.pop() + rng.uniform(-0.012, 0.012)
        else:
            x = layout.cabinet_x + (0.15 if place == "slider_right" else -0.15) + rng.uniform(-0.06, 0.06)
            y = 0.10 + rng.uniform(-0.01, 0.01)
        z = s.DESK_Z + s.BLOCK_HEIGHT / 2 + (0.002 if place != "table" else 0.0)
        state[where] = (x, y, z, 0, 0, np.pi / 2 + rng.uniform(-np.pi / 10, np.pi / 10))
    return _arm(scene).robot_state_at(rng.uniform(*_START)), state


def _chains(
    scene: str, num: int, seed: int, draw: Sequence[tuple[str, ...]] | None, names: tuple[str, ...], length: int
) -> Iterator[Chain]:
    for index in range(num):
        rng = np.random.default_rng((seed, index, sum(scene.encode())))
        for _ in range(_ATTEMPTS):
            symbols = symbols_at_random(rng)
            tasks = draw[0] if draw else tuple(str(t) for t in rng.choice(names, length, replace=False))
            if c.is_chain(tasks, symbols):
                break
        else:
            raise ConfigError(f"no chain of {length} tasks of different categories exists among {', '.join(names)}")
        robot, state = state_at_random(scene, symbols, rng)
        yield Chain(scene, robot, state, tasks, seed)


def sample_chains(
    scene: str, num: int, seed: int, length: int = c.CHAIN_LENGTH, tasks: Sequence[str] = tuple(TASKS)
) -> list[Chain]:
    """`num` chains of `length` tasks of different categories, each applicable in its turn. Chain i depends on
    (scene, seed, i) alone. Raises `ConfigError` when the tasks admit no such chain."""
    return list(_chains(scene, num, seed, None, tuple(tasks), length))


def sample_starts(scene: str, task: str, num: int, seed: int) -> list[Chain]:
    """`num` one-task chains from initial states in which `task` applies."""
    return list(_chains(scene, num, seed, [(task,)], (task,), 1))


def sample_shared_starts(scene: str, tasks: Sequence[str], num: int, seed: int) -> list[Chain]:
    """`num` initial states in each of which as many of `tasks` apply as can together; `tasks` of a chain lists them.

    They are alternatives, not a sequence: what is to be done there only an instruction tells.
    """
    starts = []
    for index in range(num):
        rng = np.random.default_rng((seed, index, sum(scene.encode()), 1))
        drawn = [symbols_at_random(rng) for _ in range(200)]
        counts = [sum(c.next_symbols(task, symbols) is not None for task in tasks) for symbols in drawn]
        symbols = drawn[int(np.argmax(counts))]
        robot, state = state_at_random(scene, symbols, rng)
        applicable = tuple(task for task in tasks if c.next_symbols(task, symbols) is not None)
        starts.append(Chain(scene, robot, state, applicable, seed))
    return starts
