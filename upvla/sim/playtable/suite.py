"""The playtable behind the door that every benchmark has: suites by name, their chains, oracle, words and experts.

    playtable-a .. playtable-d   chains of five tasks in one scene; D is the one that recordings leave out
    playtable-abc                the same in the three scenes that recordings come from
    playtable-a-tasks ..         single tasks, each from starts of its own

A suite's chains are a pure function of its name; what was drawn once is kept under `cache`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.contract import MAX_STEPS
from upvla.sim.playtable import chains as sampler
from upvla.sim.playtable import tasks as table
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import Expert
from upvla.sim.suite import Info, chains_id, code_id
from upvla.store import content_hash
from upvla.types import CALVIN_RELATIVE, Chain

NUM_CHAINS = 1000  # of a scene, and starts of a task: the first N are what fewer mean
_SEED = 40_009  # no recording is ever made from it
ALL_TASKS = tuple(table.TASKS)
SUITES = {
    **{f"playtable-{scene.lower()}": ("chains", (scene,)) for scene in "DABC"},
    "playtable-abc": ("chains", ("A", "B", "C")),
    **{f"playtable-{scene.lower()}-tasks": ("tasks", (scene,)) for scene in "DABC"},
    "playtable-abc-tasks": ("tasks", ("A", "B", "C")),
}


@dataclass(frozen=True)
class PlaytableSuite:
    """`num` chains a scene, or starts a task and scene. An unknown scene or task raises `ConfigError`."""

    name: str
    kind: Literal["chains", "tasks"]
    scenes: tuple[str, ...]
    tasks: tuple[str, ...] = ALL_TASKS
    seed: int = _SEED
    max_steps: int = MAX_STEPS
    cache: Path | None = None
    action_space = CALVIN_RELATIVE
    has_expert = True

    def __post_init__(self) -> None:
        for name in self.tasks:
            table.task(name)

    def chains(self, num: int) -> list[Chain]:
        if not 0 < num <= NUM_CHAINS:
            what = "chains a scene" if self.kind == "chains" else "starts a task"
            raise ConfigError(f"{self.name} has {NUM_CHAINS} {what}: ask for 1 to {NUM_CHAINS}, not {num}")
        return [chain for scene in self.scenes for chain in self._of_scene(scene, num)]

    def open(self, scene: str, *, cameras: bool = True) -> PlaytableEnv:
        return PlaytableEnv(scene, cameras=cameras)

    def succeeded(self, task: str, start: Info, now: Info) -> bool:
        return table.succeeded(task, start, now)

    def instruction(self, task: str) -> str:
        """The wording that no recording has."""
        return table.instruction(task)

    def paraphrases(self, task: str) -> tuple[str, ...]:
        return table.task(task).train

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        expert, start = Expert(env), env.info()
        while True:
            yield expert.action(task, start)

    def _of_scene(self, scene: str, num: int) -> list[Chain]:
        if self.kind == "chains":
            return self._kept(("chain", *self.tasks), scene, num, sampler.sample_chains, {"tasks": self.tasks})
        lists = (self._kept(("start", task), scene, num, sampler.sample_starts, {"task": task}) for task in self.tasks)
        return [chain for found in lists for chain in found]

    def _kept(
        self, what: tuple[str, ...], scene: str, num: int, draw: Callable[..., list[Chain]], options: dict[str, Any]
    ) -> list[Chain]:
        """From `cache`, or drawn and kept there. A list that other code drew, or that was changed since, is another."""
        key = content_hash([what, scene, self.seed, _sampling_code()])
        file = None if self.cache is None else self.cache / f"playtable-{what[0]}s-{key}.json"
        found = [] if file is None else read_chains(file)
        if len(found) < num:
            found = draw(scene=scene, num=num, seed=self.seed, **options)
            if file is not None:
                write_chains(file, found)
        return found[:num]


@cache
def _sampling_code() -> str:
    folder = Path(__file__).parent
    parts = (folder / f"{name}.py" for name in ("chains", "env", "scene", "tasks"))
    return code_id(*parts, folder.parent / "contract.py")


def read_chains(file: Path) -> list[Chain]:
    """What `write_chains` wrote; nothing where there is no file, or another content."""
    try:
        kept = json.loads(file.read_text())
        found = [Chain(a, np.array(b), np.array(c), tuple(d), e) for a, b, c, d, e in kept["chains"]]
        return found if chains_id(found) == kept["id"] else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_chains(file: Path, chains: Sequence[Chain]) -> None:
    rows = [[c.scene, c.robot_state.tolist(), c.scene_state.tolist(), c.tasks, c.seed] for c in chains]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"id": chains_id(chains), "chains": rows}))
    part.replace(file)


def playtable(name: str, cache: Path | None = None) -> PlaytableSuite:
    """One of `SUITES`."""
    kind, scenes = SUITES[name]
    return PlaytableSuite(name, "chains" if kind == "chains" else "tasks", scenes, cache=cache)
