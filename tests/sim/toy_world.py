"""A world behind a process boundary whose answers, crash and silence can be worked out by hand."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np


class World:
    def __init__(self, start: float = 0.0) -> None:
        if not np.isfinite(start):
            raise ValueError("start must be finite")
        self.x = start

    def move(self, by: np.ndarray) -> dict[str, Any]:
        self.x += float(by.sum())
        print("moved")  # a simulator's chatter must not get into the conversation
        return {"x": self.x, "rows": [by, np.float32(0.5), {"deep": by[:1]}]}

    def refuse(self) -> None:
        raise KeyError("no such joint")

    def thing(self) -> object:
        return object()

    def crash(self) -> None:
        print("segmentation of something", file=sys.stderr, flush=True)
        os._exit(11)

    def hang(self) -> None:
        time.sleep(600)

    def process(self) -> int:
        return os.getpid()


class Forking(World):
    forks = True
