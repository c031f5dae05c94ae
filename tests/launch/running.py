"""A stage that `run_training` follows on a thread while something is done to it: what it told, and what that cost."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.launch.conftest import RayHead
from tests.launch.stages import spec_of
from upvla.launch.jobs import Jobs
from upvla.launch.train import TrainSpec, run_training
from upvla.store import Store, open_store
from upvla.train.resume import latest

WEIGHTS = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
STEPS = 24
# a rate at which steps do not multiply what sums of other parts round otherwise: losses then differ by 2e-7, not 4e-6
STAGE = {"steps": STEPS, "optimizer": {"lr": 3e-4}}
SLOW = {"eval_every": 1, "eval_batches": 2}
"""A step takes its time where it is followed by a validation."""
HELD_OUT = ("val_loss/pre", "val_loss/act", "val_loss/mmu")
Prepared = tuple[Store, dict[str, Any]]


def stage_of(prepared: Prepared, place: Path | str, **changes: Any) -> tuple[Store, TrainSpec]:
    """The same stage on a store of its own, below a folder or at a URL, on which nothing is trained yet."""
    store, references = prepared
    other = open_store(place if isinstance(place, str) else str(place / "store"))
    for key in store.list():
        if not key.startswith(("runs/", "models/")):
            other.upload(Path(store.url, key), key)
    stage = STAGE | changes.pop("stage", {})
    spec = spec_of(other, references, name="faulty", weights=WEIGHTS, stage=stage)
    values = spec.model_dump() | {"engine": spec.engine.model_dump() | changes.pop("engine", {})} | changes
    return other, TrainSpec.model_validate(values)


class Life(NamedTuple):
    """Workers of one start, as a run's lines told of them."""

    start: int
    steps: list[tuple[float, int]]

    @property
    def last(self) -> int:
        return self.steps[-1][1] if self.steps else self.start


class Running:
    """`run_training` on a thread; what it printed, and what came of it."""

    def __init__(self, store: Store, spec: TrainSpec, head: RayHead) -> None:
        self.lines: list[tuple[float, str]] = []
        self.result: dict[str, Any] = {}
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(store, spec, head))
        self._thread.start()

    def _run(self, store: Store, spec: TrainSpec, head: RayHead) -> None:
        try:
            self.result = run_training(store, spec, Jobs(head.jobs_url), on_line=self._keep, python=sys.executable)
        except Exception as error:
            self.error = error

    def _keep(self, line: str) -> None:
        print(line)
        self.lines.append((time.monotonic(), line))

    def join(self, timeout_s: float = 600) -> dict[str, Any]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no end within {timeout_s} s"
        if self.error is not None:
            raise self.error
        return self.result

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until it is in so many lines, or the run has failed."""
        wait_for(lambda: sum(text in line for _, line in self.lines) >= times or self.error)

    def pid_of(self, rank: int) -> int:
        """Of a worker of the last group that Ray told of."""
        told_of = (re.search(rf"pid=(\d+)\) world_rank={rank}\b", line) for _, line in self.lines)
        return [int(found[1]) for found in told_of if found][-1]

    def left_for(self) -> list[str]:
        """Why workers left, and were asked for again."""
        return [found[1] for _, line in self.lines if (found := re.search(r": the workers left \((.+)\) and", line))]

    def lives(self) -> list[Life]:
        return lives_of(self.lines)


def lives_of(lines: Sequence[tuple[float, str]]) -> list[Life]:
    """What a run printed, and when."""
    found: list[Life] = []
    for at, line in lines:
        if began := re.search(r": from step (\d+) of", line):
            found.append(Life(int(began[1]), []))
        elif step := re.search(r" (\d+)/\d+ .* lr ", line):
            found[-1].steps.append((at, int(step[1])))
    return found


def cost_of(moment: float, before: Life, after: Life) -> dict[str, Any]:
    """Of a fault at `moment` that ended one life and had another begin."""
    return {"lost_steps": before.last - after.start, "first_new_step_s": after.steps[0][0] - moment}


def wait_for(what: Callable[[], Any], timeout_s: float = 400) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"nothing within {timeout_s} s")


def saved_point(store: Store, spec: TrainSpec) -> Any:
    return wait_for(lambda: latest(store.sub(f"{spec.prefix}/resume")))


def by_start(lives: Sequence[Life]) -> list[Life]:
    """Without what was told twice: two nodes of one machine both read its workers' logs."""
    steps: dict[int, dict[int, float]] = {}
    for life in lives:
        for at, step in life.steps:
            steps.setdefault(life.start, {}).setdefault(step, at)
    return [Life(start, [(at, step) for step, at in told_of.items()]) for start, told_of in steps.items()]
