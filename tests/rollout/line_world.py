"""A suite whose outcomes can be worked out by hand: a point on a line, tasks like `+3`. Worlds may break as asked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upvla.errors import SimulatorError
from upvla.rollout.play import Ask
from upvla.types import CALVIN_RELATIVE, Chain, Observation, Prediction


@dataclass
class Line:
    """A world of one number. It may die at a step, drift, or harm its process where a chain begins."""

    dies_at: int = -1
    drift: float = 0.0
    harms: Mapping[int, str] = field(default_factory=dict)  # by chain, each `most` times
    times: Path | None = None  # a folder that counts them
    most: int = 1
    name = "line"
    action_space = CALVIN_RELATIVE
    x: float = 0.0
    steps: int = 0

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self.x = float(scene_state[0])
        if not np.isfinite(self.x):
            raise ValueError("start is not finite")
        harm = self.harms.get(int(self.x), "")
        if harm and self.times and (done := len(list(self.times.glob(f"{int(self.x)}-*")))) < self.most:
            (self.times / f"{int(self.x)}-{done}").touch()
            if harm == "crash":
                os._exit(11)
            if harm == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)

    def step(self, action: np.ndarray) -> None:
        self.steps += 1
        if self.steps == self.dies_at:
            raise SimulatorError("the line simulator died")
        self.x += float(action[0]) - self.drift

    def observe(self) -> Observation:
        return Observation({"static": np.full((4, 4, 3), int(self.x) % 256, np.uint8)}, self.state(), self.truth())

    def state(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    def truth(self) -> np.ndarray:
        return np.array([self.x])

    def info(self) -> Mapping[str, Any]:
        return {"x": self.x}

    def fingerprint(self) -> dict[str, str]:
        return {"line": "1"}

    def close(self) -> None: ...


@dataclass
class LineSuite:
    deaths: list[int] = field(default_factory=list)  # of the worlds, in the order in which they are opened
    drifts: list[float] = field(default_factory=list)
    harms: dict[int, str] = field(default_factory=dict)
    times: Path | None = None
    most: int = 1
    name: str = "line"
    opened: int = 0
    words: str = "go right"
    action_space = CALVIN_RELATIVE
    max_steps = 5
    has_expert = True

    def chains(self, num: int) -> list[Chain]:
        return [Chain("only", np.zeros(1), np.array([i], np.float64), ("+1", "+9"), i) for i in range(num)]

    def open(self, scene: str, *, cameras: bool = True) -> Line:
        self.opened += 1
        died = dict(enumerate(self.deaths, 1)).get(self.opened, -1)
        drift = dict(enumerate(self.drifts, 1)).get(self.opened, 0.0)
        return Line(died, drift, self.harms, self.times, self.most)

    def succeeded(self, task: str, start: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        return bool(now["x"] - start["x"] >= float(task))

    def instruction(self, task: str) -> str:
        return f"{self.words} {task}"

    def paraphrases(self, task: str) -> list[str]:
        return [self.instruction(task)]

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        while True:
            yield np.array([1.0, 0, 0, 0, 0, 0, 1])


class Stepper:
    """Answers together: goes right by how often this subtask has asked, and does what a test asks at a position."""

    name = "stepper"
    action_space = CALVIN_RELATIVE

    def __init__(self, at: int = -1, fault: str = "") -> None:
        self.at, self.fault = at, fault

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Prediction:
        ask.memory["asked"] = ask.memory.get("asked", 0) + 1
        actions = np.zeros((10, 7), np.float32)
        actions[:, 0] = ask.memory["asked"]
        if int(ask.observation.state[0]) == self.at:
            if self.fault == "raises":
                raise RuntimeError("out of memory")
            if self.fault == "nan":
                actions[2, 1] = np.nan
            if self.fault == "shape":
                return Prediction(actions[:, :6])
            if self.fault == "nothing":
                return None  # type: ignore[return-value]
        return Prediction(actions)
