"""The reference rows of every table: policies that know nothing. No part of the model is imported for them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from upvla.types import ActionSpace, Observation, Prediction


class StillPolicy:
    """Does nothing: zero motion, gripper open, whichever sign that is."""

    name = "still"
    cameras: tuple[str, ...] = ()

    def __init__(self, action_space: ActionSpace, chunk: int = 10) -> None:
        self.action_space = action_space
        self._actions = np.zeros((chunk, len(action_space)), np.float32)
        self._actions[:, -1] = -1.0 if "-1=open" in action_space.dims[-1].convention else 1.0

    def identity(self) -> dict[str, Any]:
        return {"chunk": len(self._actions)}

    def reset(self, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> Prediction:
        return Prediction(self._actions.copy())


class RandomPolicy:
    """Uniform actions held over the chunk's steps; a pure function of what is seen, so that reruns agree."""

    name = "random"
    cameras: tuple[str, ...] = ()

    def __init__(self, action_space: ActionSpace, chunk: int = 10) -> None:
        self.action_space = action_space
        self._chunk = chunk
        self._instruction = ""

    def identity(self) -> dict[str, Any]:
        return {"chunk": self._chunk}

    def reset(self, instruction: str) -> None:
        self._instruction = instruction

    def act(self, observation: Observation) -> Prediction:
        digest = hashlib.sha256(np.asarray(observation.state, np.float32).tobytes() + self._instruction.encode())
        rng = np.random.Generator(np.random.Philox(int.from_bytes(digest.digest()[:8], "little")))
        actions = rng.uniform(-1.0, 1.0, (self._chunk, len(self.action_space))).astype(np.float32)
        actions[:, -1] = np.where(actions[:, -1] >= 0, 1.0, -1.0)
        return Prediction(actions)
