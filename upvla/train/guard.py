"""What is done about bad steps, and which validation was the best: decisions that are functions of a run's history.

Both are equal on every worker, because what they look at is, and both go on after a resume as if nothing had happened:
their state travels in the resume point.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from upvla.errors import BadStep, ConfigError
from upvla.train.config import BestConfig, GuardConfig

_NEXT = (
    "Look at these samples, then start again with guard.on_bad_step=skip: it goes on from the last resume point. With "
    "a lower optimizer.lr it is another run, and begins anew"
)


class Guard:
    """Judges gradients before the optimiser moves, and decides whether the run goes on after a bad step.

    `name_samples` says what mixture positions are: it belongs to the record of a bad step.
    """

    def __init__(
        self,
        config: GuardConfig,
        state: Mapping[str, Any] | None = None,
        name_samples: Callable[[Sequence[int]], list[dict[str, Any]]] = lambda positions: [],
    ) -> None:
        state = state or {}
        self._config, self._name_samples = config, name_samples
        self._norms: deque[float] = deque(state.get("norms", ()), maxlen=config.spike_window)
        self.bad_steps: list[dict[str, Any]] = list(state.get("bad_steps", ()))

    @property
    def judges_norms(self) -> bool:
        return self._config.spike_factor is not None

    def accepts(self, grad_norm: float) -> bool:
        """Whether the optimiser may move. A spike is known once half a window of norms has been seen."""
        factor, seen = self._config.spike_factor, self._norms
        if factor is not None and 2 * len(seen) >= self._config.spike_window and grad_norm > factor * median(seen):
            return False
        return math.isfinite(grad_norm)

    def accepted(self, grad_norm: float) -> None:
        if self.judges_norms:
            self._norms.append(grad_norm)

    def record(self, bad: BadStep) -> None:
        """Keep what happened, or raise it: the policy is to stop, or this was one too many."""
        policy = self._config.on_bad_step
        self.bad_steps.append(
            {
                "step": bad.step,
                "action": policy,
                "positions": list(bad.positions),
                "samples": self._name_samples(bad.positions),
                "reason": str(bad),
            }
        )
        if len(self.bad_steps) > self._config.max_bad_steps:
            many = f"{len(self.bad_steps)} bad steps are more than guard.max_bad_steps={self._config.max_bad_steps}"
            raise BadStep(f"{bad}. Look at these samples: {many}", bad.step, bad.positions)
        if policy == "stop":
            raise BadStep(f"{bad}. {_NEXT}", bad.step, bad.positions)
        if policy == "rollback":
            raise bad

    @property
    def rolls_back(self) -> bool:
        """Whether the last bad step is one to go back from."""
        return self._config.on_bad_step == "rollback" and len(self.bad_steps) <= self._config.max_bad_steps

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "bad_steps": self.bad_steps}


def unexplained(bad_steps: Sequence[Mapping[str, Any]], explained: Sequence[int]) -> list[int]:
    """Bad steps of a run that nobody has said anything about."""
    return [int(bad["step"]) for bad in bad_steps if bad["step"] not in explained]


class Best:
    """The best validation so far, from the history of all of them: {step: {metric: value}}."""

    def __init__(self, config: BestConfig, history: Mapping[int, Mapping[str, float | None]]) -> None:
        self._config = config
        self.step: int | None = None
        self._value = math.inf
        self._since = 0
        for step in sorted(history):
            self.see(history[step], step)

    def see(self, metrics: Mapping[str, float | None], step: int) -> bool:
        """Whether these are better than all before. Step 0, from before training, is never the best, nor is what is
        not finite (None in a history)."""
        if self._config.metric not in metrics:
            raise ConfigError(
                f"best.metric={self._config.metric!r} is not in the validation at step {step}; it has {sorted(metrics)}"
            )
        value = metrics[self._config.metric]
        if step > 0 and value is not None and value < self._value:
            self.step, self._value, self._since = step, value, 0
            return True
        self._since += step > 0
        return False

    @property
    def exhausted(self) -> bool:
        return self._config.patience is not None and self._since >= self._config.patience
