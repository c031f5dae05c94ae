"""Meta-World's 50 tasks (version 3) as single-task suites with instructions; needs `pip install 'upvla[metaworld]'`.

Environments, starts, success and the scripted policies are Meta-World's own. The instructions are this project's, since
Meta-World has none. One episode is one task of at most 500 steps; success is `info["success"]` at any step. A start is
`MT1(task, seed).train_tasks[number]`, so equal (seed, number) means an equal episode.
Source: Farama-Foundation/Metaworld 3.1.1 (`__init__.py`, `sawyer_xyz_env.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.playtable.cameras import load_mujoco
from upvla.sim.suite import Finding, Info
from upvla.types import ActionDim, ActionSpace, Chain, Observation

ACTIONS = ActionSpace(
    "metaworld",
    (
        *(ActionDim(n, "m", "world", "relative", scale=0.01) for n in ("dx", "dy", "dz")),
        ActionDim("gripper", "gripper", "none", "absolute", convention="+1=close,-1=open"),
    ),
    dt_s=0.0125,
)
"""The gripper's value is an effort: 0 holds still. Five physics steps of 2.5 ms an action."""

STARTS = 50  # that Meta-World draws from one seed
HAND, GRIPPER = slice(0, 3), 3  # of an observation: position in m, opening 0..1
_CAMERAS = {
    "static": ("corner2", 200, True),
    "gripper": ("gripperPOV", 84, False),
}  # Meta-World's name, px, upside down

INSTRUCTIONS = {
    "assembly": "put the ring on the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "move the cube into the other bin",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press": "press the button",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "turn the lock of the door shut",
    "door-open": "open the door",
    "door-unlock": "turn the lock of the door open",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet off",
    "faucet-open": "turn the faucet on",
    "hammer": "drive the nail in with the hammer",
    "hand-insert": "put the gripper into the hole",
    "handle-press-side": "press the handle down sideways",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up sideways",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "push the peg into the hole in the side",
    "peg-unplug-side": "pull the peg out of the hole in the side",
    "pick-out-of-hole": "take the puck out of the hole",
    "pick-place": "bring the puck to the goal in the air",
    "pick-place-wall": "lift the puck over the wall to the goal",
    "plate-slide-back-side": "slide the plate out of the goal sideways",
    "plate-slide-back": "slide the plate back out of the goal",
    "plate-slide-side": "slide the plate into the goal sideways",
    "plate-slide": "slide the plate into the goal",
    "push-back": "pull the puck back to the goal",
    "push": "push the puck to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "move the gripper to the goal",
    "reach-wall": "move the gripper over the wall to the goal",
    "shelf-place": "put the block on the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the container with the stick",
    "stick-push": "push the container with the stick",
    "sweep-into": "sweep the puck into the hole",
    "sweep": "sweep the puck off the table",
    "window-close": "close the window",
    "window-open": "open the window",
}
MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close",
)  # fmt: skip


def inspect() -> list[Finding]:
    """Whether Meta-World is there, and the version that scores were measured with."""
    try:
        return [Finding("package metaworld", True, version("metaworld"))]
    except PackageNotFoundError:
        return [Finding("package metaworld", False, "pip install 'upvla[metaworld]'")]


def _load() -> Any:
    load_mujoco()  # before anything else imports it: the renderer is chosen at import
    try:
        import metaworld
    except ImportError as error:
        raise ConfigError(f"Meta-World is not installed ({error}): pip install 'upvla[metaworld]'") from error
    return metaworld


@lru_cache(maxsize=64)
def _starts(task: str, seed: int) -> Any:
    return _load().MT1(f"{task}-v3", seed=seed)


class MetaworldEnv:
    """One task. `reset` takes a start as scene state, f64[2]: Meta-World's seed, and which of its 50 starts."""

    action_space = ACTIONS

    def __init__(self, task: str, *, cameras: bool = True) -> None:
        if task not in INSTRUCTIONS:
            raise ConfigError(f"Meta-World has no task {task!r}: choose from {', '.join(INSTRUCTIONS)}")
        self.name, self._task, self._renders = f"metaworld_{task}", task, cameras
        self._env: Any = _starts(task, 0).train_classes[f"{task}-v3"]()
        self._seen = np.zeros(39)
        self._success = False
        self._renderers: dict[str, Any] = {}

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        if np.shape(scene_state) != (2,) or not 0 <= scene_state[1] < STARTS:
            raise ConfigError(f"{self.name}: a start is (seed, number below {STARTS}), not {scene_state!r}")
        seed, number = (int(value) for value in scene_state)
        self._env.set_task(_starts(self._task, seed).train_tasks[number])
        self._seen, _ = self._env.reset()
        self._success = False

    def step(self, action: np.ndarray) -> None:
        if np.shape(action) != (4,) or not np.isfinite(action).all():
            raise ConfigError(f"{self.name}: an action is 4 finite numbers, not {action!r}")
        self._seen, _, _, _, info = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        self._success = bool(info["success"])

    def observe(self) -> Observation:
        images = {camera: self._frame(camera) for camera in _CAMERAS} if self._renders else {}
        return Observation(images, self.state(), self.truth())

    def state(self) -> np.ndarray:
        return self._seen[: GRIPPER + 1].astype(np.float32)

    def truth(self) -> np.ndarray:
        return self._seen.copy()

    def info(self) -> Mapping[str, Any]:
        return {"success": self._success}

    def fingerprint(self) -> dict[str, str]:
        packages = {name: version(name) for name in ("metaworld", "mujoco", "gymnasium", "numpy")}
        if not self._renders:
            return {**packages, "renderer": "none"}
        self._frame("gripper")  # a renderer has a name once it has rendered
        return {**packages, "renderer": _renderer_name()}

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()

    def _frame(self, camera: str) -> np.ndarray:
        mujoco = load_mujoco()
        name, size, upside_down = _CAMERAS[camera]
        if camera not in self._renderers:
            # Shadows, reflections and multisampling cost ten times the rest of a frame.
            self._env.model.vis.quality.offsamples = 0
            try:
                renderer = mujoco.Renderer(self._env.model, size, size)
            except Exception as error:  # a missing GL library surfaces as several kinds
                raise ConfigError(
                    f"{self.name} cannot render ({error}): apt-get install -y --no-install-recommends libosmesa6, "
                    "and set MUJOCO_GL=osmesa before anything imports mujoco"
                ) from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
            self._renderers[camera] = renderer
        self._renderers[camera].update_scene(self._env.data, camera=name)
        frame = self._renderers[camera].render()
        return np.ascontiguousarray(frame[::-1, ::-1] if upside_down else frame)


def _renderer_name() -> str:
    from OpenGL import GL

    return " ".join(GL.glGetString(part).decode() for part in (GL.GL_RENDERER, GL.GL_VERSION))


@dataclass(frozen=True)
class MetaworldSuite:
    """`num` starts of every task in `tasks`; seed 0 is what is scored, other seeds are for recording."""

    name: str
    tasks: tuple[str, ...]
    seed: int = 0
    action_space = ACTIONS
    has_expert = True
    max_steps = 500

    def chains(self, num: int) -> list[Chain]:
        if not 0 < num <= STARTS:
            raise ConfigError(f"{self.name} has {STARTS} starts a task: ask for 1 to {STARTS}, not {num}")
        return [
            Chain(task, np.zeros(0), np.array([self.seed, number], np.float64), (task,), self.seed)
            for task in self.tasks
            for number in range(num)
        ]

    def open(self, scene: str, *, cameras: bool = True) -> MetaworldEnv:
        return MetaworldEnv(scene, cameras=cameras)

    def succeeded(self, task: str, start: Info, now: Info) -> bool:
        return bool(now["success"])

    def instruction(self, task: str) -> str:
        return INSTRUCTIONS[task]

    def paraphrases(self, task: str) -> tuple[str, ...]:
        return (self.instruction(task),)

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        """Meta-World's own scripted policy, which reads the true state."""
        _load()
        from metaworld.policies import ENV_POLICY_MAP

        policy: Any = ENV_POLICY_MAP[f"{task}-v3"]  # its declared type is the abstract base
        policy = policy()
        while True:
            yield np.clip(policy.get_action(env.truth()), -1, 1)


def suites() -> dict[str, MetaworldSuite]:
    """By name: all tasks, Meta-World's choice of ten, and each task alone."""
    found = {f"metaworld-{task}": MetaworldSuite(f"metaworld-{task}", (task,)) for task in INSTRUCTIONS}
    found["metaworld-mt10"] = MetaworldSuite("metaworld-mt10", MT10)
    return {"metaworld-mt50": MetaworldSuite("metaworld-mt50", tuple(INSTRUCTIONS)), **found}
