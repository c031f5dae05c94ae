"""What a training stage tells: a line to the terminal, points to MLflow, and the figures of its result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from upvla.data.mixture import Mixture
from upvla.errors import StoreError
from upvla.launch.train import UNSENT, TrackingSpec, TrainSpec
from upvla.store import Store

if TYPE_CHECKING:
    from upvla.tracking import Run


log = logging.getLogger(__name__)


class Journal:
    """Every worker keeps one; rank 0's speaks."""

    def __init__(self, spec: TrainSpec, rank: int, began: float, mixture: Mixture) -> None:
        self._spec, self._speaks, self._began, self._mixture = spec, rank == 0, began, mixture
        self.validation: dict[str, dict[str, float | None]] = {}  # step -> means; strings, because it travels as JSON
        self._speeds: list[dict[str, float]] = []  # of this life, as logged
        self._speed_before: dict[str, float] = {}  # the last that earlier ones have logged
        self._start, self._first_step_s = 0, 0.0
        self._run: Run | None = None
        if self._speaks and spec.tracking is not None:
            from upvla.tracking import Tracker  # seconds of import that only one worker needs

            self._run = Tracker(spec.tracking.uri, spec.tracking.experiment).start(**self._of_run(spec.tracking))

    def _of_run(self, where: TrackingSpec) -> dict[str, Any]:
        """What `Tracker.start` wants to know."""
        key, name = f"{self._spec.key}/{self._spec.stage.name}", self._spec.stage.name
        return {"key": key, "name": name, "parent": where.parent, "params": self._spec.config, "tags": where.tags}

    def begin(self, start: int, meta: Mapping[str, Any]) -> None:
        self._start = start
        self.validation = {step: dict(means) for step, means in meta.get("validation", {}).items()}
        self._speed_before = dict(meta.get("speed", {}))
        if self._run is not None:
            self._run.replay(meta.get("unsent", ()))
        if self._speaks:
            print(f"{self._spec.stage.name}: from step {start} of {self._spec.stage.steps}", flush=True)
        self._training_since = time.monotonic()

    def state(self) -> dict[str, Any]:
        """For the resume point: what `begin` wants back."""
        speed = self._speeds[-1] if self._speeds else self._speed_before
        return {
            "validation": self.validation,
            "unsent": self._run.unsent() if self._run is not None else [],
            "speed": speed,
        }

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        held_out = {
            name: value if math.isfinite(value) else None  # JSON has no NaN
            for name, value in metrics.items()
            if name.startswith("val_")
        }
        if held_out:
            self.validation[str(step)] = held_out
        speed = {name: value for name, value in metrics.items() if name.startswith("speed/")}
        if speed:
            self._first_step_s = self._first_step_s or time.monotonic() - self._began
            self._speeds.append(speed)
        if self._speaks:
            print(self._line(metrics, step), flush=True)
        if self._run is not None:
            self._run.log({**metrics, **(self._about(step) if speed else {})}, step)

    def _about(self, step: int) -> dict[str, float]:
        """What the first worker can say alone: the mixture's shares since the last line, and its machine's state."""
        batch = self._mixture.plan.global_batch
        seen = range(max(self._start, step - self._spec.stage.log_every) * batch, step * batch)
        shares = {f"mixture/{name}": share for name, share in self._mixture.share(seen.start, seen.stop).items()}
        machine = {"cpu_pct": psutil.cpu_percent(), "memory_pct": psutil.virtual_memory().percent}
        return shares | {f"system/{name}": float(value) for name, value in machine.items()}

    def picture(self, image: np.ndarray, name: str) -> None:
        """u8[H,W,3] beside the stage's curves."""
        if self._run is not None:
            self._run.picture(image, name)

    @property
    def history(self) -> dict[int, dict[str, float | None]]:
        """Every validation of the run so far, by step."""
        return {int(step): means for step, means in self.validation.items()}

    def summary(self, step: int, shares: Mapping[str, float]) -> dict[str, Any]:
        """`losses` {objective: {first, last}} on the held-out batches, `last` as of `step`, and how fast it went:
        `shares` of the whole run (`Meter.shares`), else medians over what this attempt has logged, or what the one
        before it logged last."""
        first, last = self.history[min(self.history)], self.history[step]
        names = [name for name in last if name.startswith("val_loss/")]
        logged = self._speeds or [self._speed_before]
        speeds = {name: float(np.median([speed[name] for speed in logged])) for name in logged[0]}
        return {
            "losses": {
                name.removeprefix("val_loss/"): {"first": first.get(name), "last": last[name]} for name in names
            },
            "watched": {name.removeprefix("val_watch/"): last[name] for name in last if name.startswith("val_watch/")},
            "speed": {name.removeprefix("speed/"): value for name, value in speeds.items()} | dict(shares),
            "resumed_from": self._start,
            "seconds_to_first_log": round(self._first_step_s, 1),
        }

    def keep_unsent(self, place: Store) -> None:
        """Before the stage has its result: nobody resumes it then, and MLflow may be away until after its end."""
        if self._run is not None and self._spec.tracking is not None and (points := self._run.unsent()):
            place.write_json(UNSENT, {"run": self._of_run(self._spec.tracking), "points": points})

    def close(self, status: str, place: Store) -> None:
        """`status` of the run in MLflow, as `Run.close` knows it."""
        if self._run is None:
            return
        self._run.close(status)
        if status == "FINISHED" and not self._run.unsent():
            try:
                place.delete(UNSENT)
            except StoreError as error:  # sent once more, it changes nothing
                log.warning("%s stays: %s", UNSENT, error)

    def _line(self, metrics: Mapping[str, float], step: int) -> str:
        """`stage1  240/1500  pre 3.21  mmu 2.99  lr 9.8e-05  104 rows/s  wait 1%  5:12 left`"""
        stage = self._spec.stage
        parts = [f"{stage.name} {step:>6}/{stage.steps} "]
        for name, value in metrics.items():
            if name.startswith(("loss/", "val_loss/")) and name != "loss/total":
                held_out = "held-out " if name.startswith("val_") else ""
                parts.append(f"{held_out}{name.partition('/')[2]} {value:.4g}")
        if "train/lr" in metrics:
            done = step - self._start
            left = (stage.steps - step) * (time.monotonic() - self._training_since) / max(done, 1)
            parts.append(f"lr {metrics['train/lr']:.1e}  {metrics['speed/samples_per_s']:.0f} rows/s")
            parts.append(f"wait {metrics['speed/data_wait_pct']:.0f}%  {int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)
