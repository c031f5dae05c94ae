"""LIBERO's suites with their official initial states and language, from a Python of its own.

    python3.11 -m venv libero-env && libero-env/bin/pip install -r infra/libero.txt
    upvla doctor libero libero-env/bin/python
    upvla evaluate MODEL --suite libero-object --libero libero-env/bin/python --chains 20

LIBERO pins an old robosuite and another MuJoCo, so it lives in another environment and is spoken to over a socket pair
(`upvla.sim.remote`). A task succeeds when LIBERO's own goal predicate holds, within 600 steps (LIBERO's configuration;
papers that state shorter limits are not comparable). Source: Lifelong-Robot-Learning/LIBERO.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from upvla.errors import ConfigError, SimulatorError
from upvla.sim.remote import RemoteWorld
from upvla.sim.suite import Finding, Info
from upvla.types import ActionDim, ActionSpace, Chain, Observation

ACTIONS = ActionSpace(
    "libero_osc_pose",
    (
        *(ActionDim(n, "m", "world", "relative", scale=0.05) for n in ("dx", "dy", "dz")),
        *(
            ActionDim(n, "rad", "world", "relative", scale=0.5, convention="rotation_vector")
            for n in ("da", "db", "dc")
        ),
        ActionDim("gripper", "gripper", "none", "absolute", convention="+1=close,-1=open"),
    ),
    dt_s=0.05,
)
"""robosuite's OSC_POSE controller as LIBERO configures it, at 20 Hz."""

SUITES = ("libero-spatial", "libero-object", "libero-goal", "libero-10", "libero-90")
_IMAGE_SIZE = 128  # px, of LIBERO's own observations
_ENVIRONMENT = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa", "OMP_NUM_THREADS": "1"}


def _run(python: str, place: str, **options: Any) -> RemoteWorld:
    if not python:
        raise ConfigError(
            "LIBERO needs a Python of its own: name it with --libero PATH/bin/python (docs/benchmarks.md)"
        )
    return RemoteWorld(f"libero_world.py:{place}", options, python=python, environment=_ENVIRONMENT)


def inspect(python: str) -> list[Finding]:
    """Whether that interpreter holds LIBERO, its initial states, and a simulator that steps and is seen."""
    if not Path(python).exists():
        return [Finding("interpreter", False, f"{python} does not exist: make it as docs/benchmarks.md says")]
    found = [Finding("interpreter", True, python)]
    for module in ("libero", "robosuite", "mujoco"):
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        move = "there" if done.returncode == 0 else f"{python} -m pip install -r infra/libero.txt"
        found.append(Finding(f"package {module}", done.returncode == 0, move))
    if all(finding.found for finding in found):
        found.append(_trial(LiberoSuite("libero-object", python)))
    return found


def _trial(suite: LiberoSuite) -> Finding:
    try:
        chain = suite.chains(1)[0]
        env = suite.open(chain.scene)
    except SimulatorError as error:
        return Finding("a world opens", False, str(error))
    try:
        env.reset(chain.robot_state, chain.scene_state)
        shapes = {camera: image.shape for camera, image in env.observe().images.items()}
        return Finding("a world opens", True, f"{chain.tasks[0]}: {shapes}")
    except SimulatorError as error:
        return Finding("a world opens", False, str(error))
    finally:
        env.close()


class LiberoEnv:
    """One task. `reset` takes an official initial state as scene state: MuJoCo's flattened state."""

    action_space = ACTIONS

    def __init__(self, python: str, suite: str, task: int, *, cameras: bool = True) -> None:
        self.name = f"{suite}_{task}"
        self._world = _run(python, "World", suite=suite, task=task, cameras=cameras, size=_IMAGE_SIZE)

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self._world.call("reset", start=np.asarray(scene_state, np.float64))

    def step(self, action: np.ndarray) -> None:
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ConfigError(f"{self.name}: an action is 7 finite numbers, not {action!r}")
        self._world.call("step", action=np.asarray(action, np.float64))

    def observe(self) -> Observation:
        return Observation(self._world.call("images"), self.state(), self.truth())

    def state(self) -> np.ndarray:
        return np.asarray(self._world.call("state"), np.float32)

    def truth(self) -> np.ndarray:
        return np.asarray(self._world.call("physics"))

    def info(self) -> Mapping[str, Any]:
        return {"success": self._world.call("success")}

    def objects(self) -> dict[str, np.ndarray]:
        """Positions in m, f64[3], of what the task names, in its order: for scripted experts."""
        return {name: np.array(place) for name, place in self._world.call("objects").items()}

    def fingerprint(self) -> dict[str, str]:
        return {**self._world.call("versions"), "renderer": _ENVIRONMENT["MUJOCO_GL"], "image_size": str(_IMAGE_SIZE)}

    def close(self) -> None:
        self._world.close()


@dataclass(frozen=True)
class LiberoSuite:
    """`name` is one of `SUITES`; `python` the interpreter that holds LIBERO."""

    name: str
    python: str
    action_space = ACTIONS
    max_steps = 600

    def chains(self, num: int) -> list[Chain]:
        found = []
        world = _run(self.python, "Suite", suite=self._official)
        try:
            for number, task in enumerate(self._tasks):
                starts = world.call("starts", task=number)
                if not 0 < num <= len(starts):
                    raise ConfigError(f"{self.name} has {len(starts)} initial states a task, not {num}")
                found += [Chain(str(number), np.zeros(0), start, (task,), i) for i, start in enumerate(starts[:num])]
        finally:
            world.close()
        return found

    def open(self, scene: str, *, cameras: bool = True) -> LiberoEnv:
        return LiberoEnv(self.python, self._official, int(scene), cameras=cameras)

    def succeeded(self, task: str, start: Info, now: Info) -> bool:
        return bool(now["success"])

    def instruction(self, task: str) -> str:
        return self._tasks[task]

    def paraphrases(self, task: str) -> tuple[str, ...]:
        return (self.instruction(task),)

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        """Picks the first object that the task names and drops it over the second; made for libero-object."""
        if not self.has_expert:
            raise ConfigError(f"there is no expert for {self.name}; libero-object has one")
        return _pick_and_place(env)

    @property
    def has_expert(self) -> bool:
        return self.name == "libero-object"

    @property
    def _official(self) -> str:
        return self.name.replace("-", "_")

    @cached_property
    def _tasks(self) -> dict[str, str]:
        """The language of every task, in the suite's order."""
        world = _run(self.python, "Suite", suite=self._official)
        try:
            return {row["name"]: row["language"] for row in world.call("tasks")}
        finally:
            world.close()


_HEIGHT, _CARRY = 0.25, 0.35  # m above an object's centre at which the hand travels, and carries a tall bottle
_OPEN, _CLOSED = -1.0, 1.0


def _pick_and_place(env: LiberoEnv) -> Iterator[np.ndarray]:
    def towards(goal: np.ndarray, gripper: float) -> np.ndarray:
        hand = env.state()[:3]
        return np.append(np.clip((goal - hand) / 0.05 * 4, -1, 1), (0, 0, 0, gripper))

    def travel(goal: np.ndarray, gripper: float, tolerance: float = 0.01) -> Iterator[np.ndarray]:
        for _ in range(80):
            if np.linalg.norm(goal - env.state()[:3]) < tolerance:
                return
            yield towards(goal, gripper)

    while True:
        thing, basket = list(env.objects().values())[:2]
        over, high = np.array((0, 0, _HEIGHT)), np.array((0, 0, _CARRY))
        at = thing + np.array((0, 0, 0.005))
        yield from travel(thing + over, _OPEN)
        yield from travel(at, _OPEN)
        for _ in range(15):
            yield towards(at, _CLOSED)
        for goal in (thing + high, basket + high, basket + over):
            yield from travel(goal, _CLOSED, 0.03)
        for _ in range(20):
            yield towards(basket + over, _OPEN)
