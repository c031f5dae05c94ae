"""Why a subtask failed, from what was seen: a score says that a policy fails, this says where to look."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from upvla.sim import contract as c
from upvla.types import Observation

REASONS = ("never_moved", "missed", "wrong_object", "close_to_goal", "failed", "error")
"""The gripper stayed; nothing was touched; another thing moved; the right thing moved, not far enough; unknown (the
world does not tell its state); policy or world broke."""

_GRIPPER_M = 0.02  # less is not a motion
_BLOCK_M, _BLOCK_RAD, _JOINT = 0.01, 0.15, 0.005  # what counts as moved; joints in their own units


def why_failed(task: str, seen: Sequence[Observation]) -> str:
    """One of `REASONS`, from the observations of a failed subtask in their order."""
    places = np.stack([observation.state[c.TCP_POSITION] for observation in seen])
    if np.linalg.norm(places - places[0], axis=1).max() < _GRIPPER_M:
        return "never_moved"
    first, last = seen[0].scene_state, seen[-1].scene_state
    if first is None or last is None or first.shape != (len(c.SCENE_STATE),):
        return "failed"
    moved = _moved(first, last)
    if not moved:
        return "missed"
    return "close_to_goal" if moved & _targets(task) else "wrong_object"


def _moved(first: np.ndarray, last: np.ndarray) -> set[str]:
    joints = {name: i for i, name in enumerate(c.SCENE_STATE[: c.LED + 1])}
    found = {name for name, i in joints.items() if abs(last[i] - first[i]) > _JOINT}
    for block, pose in c.BLOCK_POSE.items():
        change = np.abs(last[pose] - first[pose])
        turn = np.minimum(change[3:], 2 * np.pi - change[3:])
        if np.linalg.norm(change[:3]) > _BLOCK_M or turn.max() > _BLOCK_RAD:
            found.add(block)
    return found


def _targets(task: str) -> set[str]:
    """What a task wants to be changed, by CALVIN's naming of tasks."""
    named = set(task.split("_"))
    blocks = set(c.BLOCK_POSE)
    if named & blocks:
        return named & blocks
    if "block" in named or named & {"place", "into"}:
        return blocks
    controls = {"lightbulb": {"switch", "lightbulb"}, "led": {"button", "led"}}
    return next((what for light, what in controls.items() if light in named), named & {"drawer", "slider"})
