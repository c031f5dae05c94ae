"""CALVIN's own simulator, oracle, chains and sentences, run from a user's checkout; see `upvla.sim.calvin`.

Runs in a process of its own with the checkout's packages on its module path. The checkout was written for Python 3.8,
gym and pyhash; what it needs of them is stood in for here, in that process only. Source of every fact: mees/calvin_env
and mees/calvin (evaluation/multistep_sequences.py, evaluation/utils.py, conf/).
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def pyhash_fnv1_32(text: str) -> int:
    """What `pyhash.fnv1_32()(text)` gives: FNV-1 from 0, not from its usual offset basis, over UTF-16 code units."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193) & 0xFFFFFFFF ^ byte
    return value


class World:
    """One scene. `info` keeps what the oracle reads under a number; `achieved` compares two of them."""

    forks = True  # resets within one PyBullet process are not bit-identical

    def __init__(self, checkout: str, tasks: str, scene: str, cameras: bool) -> None:
        import hydra
        from omegaconf import OmegaConf

        for name in ("", ".utils", ".utils.seeding"):
            sys.modules[f"gym{name}"] = importlib.import_module(f"gymnasium{name}")
        config = _config(Path(checkout), scene)
        self._env = hydra.utils.instantiate(
            config.env, show_gui=False, use_vr=False, use_scene_info=True, use_egl=False
        )
        # Its `step` renders every camera that it has; ours are asked only when somebody looks.
        self._cameras, self._env.cameras = self._env.cameras if cameras else [], []
        self._oracle = hydra.utils.instantiate(OmegaConf.load(tasks))
        self._infos: list[Any] = []

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("pybullet", "numpy", "scipy")}

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self._infos.clear()
        self._env.reset(robot_obs=robot_state, scene_obs=scene_state)

    def step(self, action: np.ndarray) -> None:
        self._env.step(np.append(action[:6], 1 if action[6] > 0 else -1))

    def state(self) -> dict[str, np.ndarray]:
        found = self._env.get_state_obs()
        return {"robot": found["robot_obs"], "scene": found["scene_obs"]}

    def images(self) -> dict[str, np.ndarray]:
        return {camera.name: np.ascontiguousarray(camera.render()[0], np.uint8) for camera in self._cameras}

    def info(self) -> int:
        self._infos.append(self._env.get_info())
        return len(self._infos) - 1

    def achieved(self, task: str, start: int, now: int) -> bool:
        return bool(self._oracle.get_task_info_for_set(self._infos[start], self._infos[now], {task}))

    def places(self) -> dict[str, list[float]]:
        """Where the furniture's links and the blocks are, in m: what a scripted expert may know, and no policy."""
        bullet, table = self._env.p, self._env.scene.fixed_objects[0].uid
        blocks = {block.name: list(block.get_state()[:3]) for block in self._env.scene.movable_objects}
        links = range(bullet.getNumJoints(table, physicsClientId=self._env.cid))
        return blocks | {
            bullet.getJointInfo(table, link, physicsClientId=self._env.cid)[12].decode(): list(
                bullet.getLinkState(table, link, physicsClientId=self._env.cid)[0]
            )
            for link in links
        }


class Protocol:
    """The official evaluation's chains and sentences."""

    def __init__(self, models: str) -> None:
        self._conf = Path(models) / "conf" / "annotations"
        _stand_in("pyhash", fnv1_32=lambda: pyhash_fnv1_32)
        # The rest is imported beside what is wanted here, for functions that are never called.
        _stand_in("torch")
        _stand_in("calvin_agent.models.mcil", MCIL=None)
        _stand_in("calvin_agent.utils.utils", add_text=None, format_sftp_path=None)

    def chains(self, workers: int) -> list[dict[str, Any]]:
        """All 1000, in the official order: tasks, and the states of robot and scene that they start from."""
        from calvin_agent.evaluation.multistep_sequences import get_sequences
        from calvin_agent.evaluation.utils import get_env_state_for_initial_condition

        found = []
        for condition, tasks in get_sequences(1000, workers):
            robot, scene = get_env_state_for_initial_condition(condition)
            found.append({"tasks": list(tasks), "robot": robot.tolist(), "scene": scene.tolist()})
        return found

    def sentences(self, kind: str) -> dict[str, list[str]]:
        """`validation`: the one sentence a task that policies are judged with; `training`: those of the data set."""
        from omegaconf import OmegaConf

        name = {"validation": "new_playtable_validation.yaml", "training": "new_playtable.yaml"}[kind]
        found: Any = OmegaConf.to_container(OmegaConf.load(self._conf / name))
        return {task: list(texts) for task, texts in found.items()}


def _config(checkout: Path, scene: str) -> Any:
    """The environment's configuration as the data set's own `merged_config.yaml` composes it, cameras included."""
    from omegaconf import OmegaConf

    conf = checkout / "conf"
    fingers: Any = {k: v for k, v in OmegaConf.load(conf / "robot/panda_longer_finger.yaml").items() if k != "defaults"}
    return OmegaConf.create(
        {
            "data_path": os.fspath(checkout / "data"),
            "use_vr": False,
            "cameras": {n: OmegaConf.load(conf / f"cameras/cameras/{n}.yaml") for n in ("static", "gripper")},
            "scene": OmegaConf.load(conf / f"scene/calvin_scene_{scene}.yaml"),
            "robot": OmegaConf.merge(OmegaConf.load(conf / "robot/panda.yaml"), fingers),
            "env": OmegaConf.load(conf / "env/play_table_env.yaml"),
        }
    )
