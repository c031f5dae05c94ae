"""Initial states and chains of tasks, each a pure function of a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import numpy as np

from upvla.errors import ConfigError
from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.tasks import TASKS
from upvla.types import Chain

_START = np.array(((-0.07, -0.19, 0.57), (0.11, -0.07, 0.63)))  # box of robot start positions
_ROWS = (-0.145, -0.065)  # y of the two rows of blocks on the desk: one can be pushed past the other
_APART = 0.075  # m in x between two blocks on the desk: room for a turning gripper
_ATTEMPTS = 2_000
_PREPARATIONS = 3  # most tasks that lie between an initial state and one in which any given task applies


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


def symbols_for(task: str, rng: np.random.Generator) -> c.Symbols:
    """A state in which `task` applies: an initial one, or one that a few other tasks lead to from there."""
    while True:
        symbols: c.Symbols = symbols_at_random(rng)
        for _ in range(_PREPARATIONS):
            if c.next_symbols(task, symbols) is not None:
                return symbols
            after = [state for name in _PREPARING if (state := c.next_symbols(name, symbols)) is not None]
            symbols = after[int(rng.integers(len(after)))]
        if c.next_symbols(task, symbols) is not None:
            return symbols


_PREPARING = tuple(name for name in TASKS if not name.startswith(("push", "rotate", "turn")))


def state_at_random(scene: str, symbols: c.Symbols, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(robot f64[15], scene f64[24]) in which `symbols` hold, at rest, with varied gripper and block poses."""
    layout, state = s.layout(scene), np.zeros(24)
    state[c.SLIDER] = s.SLIDE_RANGE if symbols["slider"] == "left" else 0.0
    state[c.DRAWER] = s.DRAWER_RANGE if symbols["drawer"] == "open" else 0.0
    state[c.SWITCH] = s.SWITCH_RANGE if symbols["lightbulb"] else 0.0
    state[c.LIGHTBULB], state[c.LED] = symbols["lightbulb"], symbols["led"]
    robot = _arm(scene).robot_state_at(rng.uniform(*_START))
    spots, shelves = _desk_spots(layout, rng), Counter[str | int]()
    for block, where in sorted(c.BLOCK_POSE.items(), key=lambda item: symbols[f"{item[0]}_block"] == "stacked_top"):
        place, yaw = symbols[f"{block}_block"], np.pi / 2 + rng.uniform(-np.pi / 10, np.pi / 10)
        z = s.DESK_Z + s.BLOCK_HEIGHT / 2
        if place in ("table", "stacked_bottom"):
            x, y = spots.pop()
        elif place == "stacked_top":  # its partner is placed by now
            bottom = next(other for other in s.BLOCKS if symbols[f"{other}_block"] == "stacked_bottom")
            x, y, *_, yaw = state[c.BLOCK_POSE[bottom]]
            z += s.BLOCK_HEIGHT
        elif place == "drawer":
            x, y = layout.drawer_x + rng.uniform(-0.05, 0.05), -0.30 + rng.uniform(-0.02, 0.02)
            y, z = y + s.DRAWER_RANGE - state[c.DRAWER], s.DRAWER_FLOOR + s.BLOCK_HEIGHT / 2
        elif place == "grasped":
            (x, y, z), yaw = robot[c.TCP_POSITION] + (0, 0, 0.004), np.pi / 2
            robot[c.GRIPPER_WIDTH], robot[c.GRIPPER_ACTION] = s.BLOCK_WIDTH, -1.0
        else:
            along = s.SHELF_X + s.SHELF_APART * shelves[place] + rng.uniform(-0.02, 0.01)
            shelves[place] += 1
            x = layout.cabinet_x + (along if place == "slider_right" else -along)
            y, z = s.SHELF_Y + rng.uniform(-0.01, 0.01), z + s.SHELF
        state[where] = (x, y, z, 0, 0, yaw)
    return robot, state


def _desk_spots(layout: s.Layout, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Two places for blocks on the desk, in rows of their own and apart in x."""
    (low, high), rows = layout.blocks_x, rng.permutation(_ROWS) + rng.uniform(-0.006, 0.006, 2)
    first = rng.uniform(low, high)
    free = [(low, first - _APART), (first + _APART, high)]
    left, right = (max(0.0, end - start) for start, end in free)
    along = rng.uniform(0, left + right)
    second = low + along if along < left else first + _APART + along - left
    return [(float(first), float(rows[0])), (float(second), float(rows[1]))]


@cache
def _count(symbols: frozenset[tuple[str, str | int]], used: frozenset[int], left: int, tasks: tuple[str, ...]) -> int:
    """How many chains of `left` more tasks follow, none of a category already `used`."""
    return sum(count for _, _, count in _options(symbols, used, left, tasks)) if left else 1


def _options(
    symbols: frozenset[tuple[str, str | int]], used: frozenset[int], left: int, tasks: tuple[str, ...]
) -> Iterator[tuple[str, frozenset[tuple[str, str | int]], int]]:
    """(task, symbols after it, chains through it) of every task that may come next."""
    for task in tasks:
        category = c.SPECS[task].category
        after = None if category in used else c.next_symbols(task, dict(symbols))
        if after is not None:
            rest = frozenset(after.items())
            yield task, rest, _count(rest, used | {category}, left - 1, tasks)


def chain_at_random(
    symbols: c.Symbols, length: int, tasks: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, ...] | None:
    """One of the chains from `symbols`, all equally likely (as drawing and rejecting would give); None without any."""
    state, used, chain = frozenset(symbols.items()), frozenset[int](), list[str]()
    while len(chain) < length:
        options = list(_options(state, used, length - len(chain), tasks))
        weights = np.cumsum([count for _, _, count in options] or [0])
        if weights[-1] == 0:
            return None
        name, state, _ = options[int(np.searchsorted(weights, rng.integers(weights[-1]), side="right"))]
        chain.append(name)
        used |= {c.SPECS[name].category}
    return tuple(chain)


def sample_chains(
    scene: str, num: int, seed: int, length: int = c.CHAIN_LENGTH, tasks: Sequence[str] = tuple(TASKS)
) -> list[Chain]:
    """`num` chains of `length` tasks of different categories, each applicable in its turn. Chain i depends on
    (scene, seed, i) and the tasks alone, and is drawn once a process. Raises `ConfigError` when there is none."""
    return [_chain(scene, index, seed, length, tuple(tasks)) for index in range(num)]


@lru_cache(maxsize=10_000)
def _chain(scene: str, index: int, seed: int, length: int, tasks: tuple[str, ...]) -> Chain:
    rng = np.random.default_rng((seed, index, sum(scene.encode())))
    for _ in range(_ATTEMPTS):
        symbols = symbols_at_random(rng)
        if (chosen := chain_at_random(symbols, length, tasks, rng)) is not None:
            break
    else:
        raise ConfigError(f"no chain of {length} tasks of different categories exists among {', '.join(tasks)}")
    robot, state = state_at_random(scene, symbols, rng)
    for values in (robot, state):
        values.flags.writeable = False  # it is shared
    return Chain(scene, robot, state, chosen, seed)


def sample_starts(scene: str, task: str, num: int, seed: int) -> list[Chain]:
    """`num` one-task chains from states in which `task` applies. Start i depends on (scene, task, seed, i) alone."""
    starts = []
    for index in range(num):
        rng = np.random.default_rng((seed, index, sum(scene.encode()), 2))
        robot, state = state_at_random(scene, symbols_for(task, rng), rng)
        starts.append(Chain(scene, robot, state, (task,), seed))
    return starts


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
