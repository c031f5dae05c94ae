"""Real CALVIN from a user's checkout: its simulator, its 1000 chains, its sentences, its oracle, 360 steps a task.

    git clone https://github.com/mees/calvin && git clone https://github.com/mees/calvin_env calvin/calvin_env
    upvla doctor calvin ./calvin
    upvla evaluate MODEL --suite calvin-d --calvin ./calvin --chains 1000

Nothing of CALVIN is part of this project: it is imported, in a process of its own, from the path that the user names.
Needs `pip install 'upvla[calvin]'`; images are PyBullet's TinyRenderer's, so neither a GPU nor EGL is involved. Each
episode runs in a fork of a world that was just loaded, so equal actions give equal states bit for bit, whatever ran
before and on however many workers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from upvla.errors import ConfigError, SimulatorError
from upvla.sim.contract import MAX_STEPS
from upvla.sim.remote import RemoteWorld
from upvla.sim.suite import Finding, Info
from upvla.store import content_hash
from upvla.types import CALVIN_RELATIVE, Chain, Observation

SCENES = ("A", "B", "C", "D")
NUM_CHAINS = 1000  # of the official evaluation; its first N are what fewer chains mean
_DRAW_S = 3600.0  # drawing the chains rejects millions of candidates
_PACKAGES = {
    "pybullet": "pybullet",
    "gymnasium": "gymnasium",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "quaternion": "numpy-quaternion",
    "git": "GitPython",
    "cv2": "opencv-python-headless",
    "scipy": "scipy",
}


@dataclass(frozen=True)
class Checkout:
    """Where the two repositories lie: `path` is mees/calvin with calvin_env in it, or a calvin_env beside or in it."""

    path: Path

    @cached_property
    def env(self) -> Path:
        """mees/calvin_env: package, configuration and meshes."""
        return next((p for p in (self.path / "calvin_env", self.path) if (p / "conf" / "scene").is_dir()), self.path)

    @cached_property
    def models(self) -> Path:
        """`calvin_models` of mees/calvin: chains, sentences, the oracle's table of tasks."""
        places = (self.path, self.path.parent, self.path.parent / "calvin")
        return next(
            (p / "calvin_models" for p in places if (p / "calvin_models").is_dir()), self.path / "calvin_models"
        )

    @property
    def tasks(self) -> Path:
        return self.models / "conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"

    @cached_property
    def commits(self) -> dict[str, str]:
        """What is checked out of each, for the fingerprint: a score belongs to a commit."""
        return {place.name: _commit(place) for place in (self.env, self.models)}

    def require(self) -> Checkout:
        """Itself, or `ConfigError` naming the first thing that is missing."""
        for finding in inspect(self.path, run=False):
            if not finding.found:
                raise ConfigError(
                    f"CALVIN: {finding.what}: {finding.detail}; `upvla doctor calvin PATH` lists everything"
                )
        return self

    def world(self, scene: str, cameras: bool) -> RemoteWorld:
        if scene not in SCENES:
            raise ConfigError(f"CALVIN has no scene {scene!r}: choose from {', '.join(SCENES)}")
        return self._run("World", checkout=str(self.env), tasks=str(self.tasks), scene=scene, cameras=cameras)

    def protocol(self) -> RemoteWorld:
        return self._run("Protocol", timeout_s=_DRAW_S, models=str(self.models))

    def _run(self, kind: str, timeout_s: float = 120.0, **options: Any) -> RemoteWorld:
        paths, variables = (str(self.env), str(self.models)), {"OMP_NUM_THREADS": "1"}
        return RemoteWorld(f"calvin_world.py:{kind}", options, paths=paths, environment=variables, timeout_s=timeout_s)


def inspect(path: str | Path, *, run: bool = True) -> list[Finding]:
    """What real CALVIN needs, and whether it is there; with `run`, whether a world opens, steps and is seen."""
    place = Checkout(Path(path).expanduser().resolve())
    clone = "git clone https://github.com/mees/{}"
    found = [
        _exists("calvin_env (package and configuration)", place.env / "calvin_env" / "envs" / "play_table_env.py",
                clone.format("calvin_env") + " into the calvin checkout"),
        *(_exists(f"table {scene}", place.env / f"data/calvin_table_{scene}/urdf/calvin_table_{scene}.urdf",
                  "calvin_env/data is incomplete: check the clone out again") for scene in SCENES),
        _exists("chains (calvin_agent)", place.models / "calvin_agent" / "evaluation" / "multistep_sequences.py",
                clone.format("calvin") + " and put calvin_env in it"),
        _exists("task oracle", place.tasks, clone.format("calvin")),
        _exists("sentences", place.models / "conf" / "annotations" / "new_playtable_validation.yaml",
                clone.format("calvin")),
        Finding("git history", (commit := _commit(place.env)) != "unknown",
                commit if commit != "unknown" else "calvin_env reads its own commit: clone it, an archive does not do"),
    ]  # fmt: skip
    for module, package in _PACKAGES.items():
        present = importlib.util.find_spec(module) is not None
        found.append(Finding(f"package {package}", present, "installed" if present else "pip install 'upvla[calvin]'"))
    if run and all(finding.found for finding in found):
        found.append(_trial(place))
    return found


def _exists(what: str, path: Path, move: str) -> Finding:
    return Finding(what, path.exists(), str(path) if path.exists() else f"{path} does not exist: {move}")


def _trial(place: Checkout) -> Finding:
    try:
        env = CalvinEnv(place, "D")
    except SimulatorError as error:
        return Finding("a world opens", False, str(error))
    try:
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        shapes = {camera: image.shape for camera, image in env.observe().images.items()}
        return Finding("a world opens", True, f"scene D stepped and seen: {shapes}")
    except SimulatorError as error:
        return Finding("a world opens", False, str(error))
    finally:
        env.close()


def _commit(place: Path) -> str:
    command = ["git", "-C", str(place), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------------------- the world


class CalvinEnv:
    """One scene. States are CALVIN's `robot_obs` and `scene_obs` as its data set stores them: in `scene_obs` the blocks
    stand in the scene's own order (`BLOCKS`), which differs from scene to scene."""

    action_space = CALVIN_RELATIVE

    def __init__(self, checkout: Checkout, scene: str, *, cameras: bool = True) -> None:
        self.name, self.scene = f"calvin_scene_{scene}", scene
        self._checkout = checkout
        self._world = checkout.world(scene, cameras)

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        for name, state, size in (("robot", robot_state, 15), ("scene", scene_state, 24)):
            if np.shape(state) != (size,) or not np.isfinite(state).all():
                raise ConfigError(f"{self.name}: a {name} state is {size} finite numbers, not {state!r}")
        self._world.fresh()
        self._world.call(
            "reset", robot_state=np.asarray(robot_state, np.float64), scene_state=np.asarray(scene_state, np.float64)
        )

    def step(self, action: np.ndarray) -> None:
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ConfigError(f"{self.name}: an action is 7 finite numbers, not {action!r}")
        self._world.call("step", action=np.asarray(action, np.float64))

    def observe(self) -> Observation:
        return Observation(self._world.call("images"), self.state(), self.truth())

    def state(self) -> np.ndarray:
        return np.asarray(self._world.call("state")["robot"], np.float32)

    def truth(self) -> np.ndarray:
        return np.asarray(self._world.call("state")["scene"])

    def info(self) -> dict[str, Any]:
        return {"snapshot": self._world.call("info"), "achieved": self._achieved}

    def places(self) -> dict[str, np.ndarray]:
        """Positions in m, f64[3], of the furniture's links and of `block_red`, `block_blue`, `block_pink`."""
        return {name: np.array(place) for name, place in self._world.call("places").items()}

    def fingerprint(self) -> dict[str, str]:
        versions = {name: str(v) for name, v in self._world.call("versions").items()}
        return {**versions, **self._checkout.commits, "renderer": "PyBullet TinyRenderer"}

    def close(self) -> None:
        self._world.close()

    def _achieved(self, task: str, start: int, now: int) -> bool:
        return bool(self._world.call("achieved", task=task, start=start, now=now))


BLOCKS = {
    "A": ("pink", "blue", "red"),
    "B": ("red", "blue", "pink"),
    "C": ("blue", "red", "pink"),
    "D": ("red", "blue", "pink"),
}
"""The order of the blocks in a scene's `scene_obs` (calvin_env, conf/scene/calvin_scene_*.yaml)."""


_PLANK_DX = {"A": 0.0, "B": 0.18, "C": 0.18, "D": 0.0}  # m that the slider's plank lies right of where it does in D


def _placed(official: list[float], scene: str) -> np.ndarray:
    """A scene state of the official initial conditions, made for D, in another scene's order of blocks and plank."""
    state = np.array(official)
    if scene == "D":
        return state
    blocks = dict(zip(BLOCKS["D"], state[6:].reshape(3, 6).copy(), strict=True))
    for pose in blocks.values():
        pose[0] += _PLANK_DX[scene] if pose[1] > 0 else 0.0
    return np.concatenate([state[:6], *(blocks[block] for block in BLOCKS[scene])])


# ------------------------------------------------------------------------------------------------------- the suite


SUITES = ("calvin-d", "calvin-a", "calvin-b", "calvin-c")


@dataclass(frozen=True)
class CalvinSuite:
    """`calvin-d` is the official long-horizon evaluation. The other scenes run the same tasks from the same initial
    conditions, for recording; nobody publishes scores there. `cache` keeps the chains, which take minutes to draw."""

    checkout: Checkout
    cache: Path
    name: str = "calvin-d"
    action_space = CALVIN_RELATIVE
    has_expert = False
    max_steps = MAX_STEPS

    def chains(self, num: int) -> list[Chain]:
        if not 0 < num <= NUM_CHAINS:
            raise ConfigError(f"{self.name} has {NUM_CHAINS} official chains: ask for 1 to {NUM_CHAINS}, not {num}")
        scene = self.name[-1].upper()
        return [
            Chain(scene, np.array(row["robot"]), _placed(row["scene"], scene), tuple(row["tasks"]), i)
            for i, row in enumerate(self._drawn[:num])
        ]

    def open(self, scene: str, *, cameras: bool = True) -> CalvinEnv:
        return CalvinEnv(self.checkout.require(), scene, cameras=cameras)

    def succeeded(self, task: str, start: Info, now: Info) -> bool:
        return bool(now["achieved"](task, start["snapshot"], now["snapshot"]))

    def instruction(self, task: str) -> str:
        return self._sentences["validation"][task][0]

    def paraphrases(self, task: str) -> list[str]:
        """The official wordings of the training data."""
        return self._sentences["training"][task]

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        raise ConfigError("CALVIN ships no expert: name one as a plug-in, `--expert module:function`")

    @cached_property
    def _sentences(self) -> dict[str, dict[str, list[str]]]:
        protocol = self.checkout.require().protocol()
        try:
            return {kind: protocol.call("sentences", kind=kind) for kind in ("validation", "training")}
        finally:
            protocol.close()

    @cached_property
    def _drawn(self) -> list[dict[str, Any]]:
        """Drawn by the checkout's own code and kept by the hash of that code, so another version draws anew."""
        self.checkout.require()
        code = [
            (self.checkout.models / "calvin_agent/evaluation" / f).read_text()
            for f in ("multistep_sequences.py", "utils.py")
        ]
        file = self.cache / f"calvin-chains-{content_hash(code)}.json"
        if not file.exists():
            protocol = self.checkout.protocol()
            try:
                drawn = protocol.call("chains", workers=os.cpu_count() or 1)
            finally:
                protocol.close()
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(drawn))
            part.replace(file)
        return list(json.loads(file.read_text()))
