"""Closed-loop evaluation by CALVIN's long-horizon protocol, and what its scores are worth.

A chain is up to five instructions from one initial state without a reset between them; the first failure ends it.
The protocol's source is mees/calvin (evaluation of the ABC->D benchmark): 360 steps a subtask, success when the task
oracle says so between the state at the subtask's start and now. Numbers of the project's own playtable are its own:
they are never CALVIN numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from upvla.store import content_hash
from upvla.types import Chain, ChainRecord, Estimate, EvalReport


class SuiteConfig(BaseModel):
    """Which initial states and tasks: whole `chains`, or `tasks` (single subtasks, one start each)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["chains", "tasks"]
    scenes: tuple[str, ...]
    num: int = Field(gt=0, description="chains a scene, or starts a task and scene")
    seed: int = 0


class EvalConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    suites: tuple[SuiteConfig, ...]
    max_steps: int = Field(360, gt=0, description="env steps a subtask before it counts as failed")
    replan: int = Field(10, gt=0, description="actions of a chunk that are executed before the next prediction")
    videos: int = Field(4, ge=0, description="chains of the first suite that are filmed")
    references: tuple[Literal["random", "still"], ...] = ("random", "still")


# ------------------------------------------------------------------------------------------------------- statistics


def wilson(successes: int, trials: int, z: float = 1.96) -> Estimate:
    """Wilson score interval of a proportion at 95 %."""
    if trials == 0:
        return Estimate(0.0, 0.0, 1.0)
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return Estimate(p, max(0.0, float(min(p, centre - half))), min(1.0, float(max(p, centre + half))))


def bootstrap_mean(values: Sequence[float], draws: int = 2000) -> Estimate:
    """Mean with a percentile bootstrap interval at 95 %; deterministic for the same values."""
    data = np.asarray(values, np.float64)
    if len(data) == 0:
        return Estimate(0.0, 0.0, 0.0)
    rng = np.random.Generator(np.random.Philox(len(data)))
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(min(low, data.mean())), float(max(high, data.mean())))


def summarise(policy: str, suite: str, fingerprint: str, records: Iterable[ChainRecord]) -> EvalReport:
    """Scores of one policy over the chains of one suite."""
    records = tuple(sorted(records, key=lambda r: r.number))
    longest = max((len(r.tasks) for r in records), default=0)
    attempts: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        for position in range(min(record.succeeded + 1, len(record.tasks))):
            attempts[record.tasks[position]].append(position < record.succeeded)
    return EvalReport(
        policy=policy,
        suite=suite,
        fingerprint=fingerprint,
        records=records,
        success=tuple(wilson(sum(r.succeeded >= k for r in records), len(records)) for k in range(1, longest + 1)),
        average_length=bootstrap_mean([r.succeeded for r in records]),
        per_task={task: wilson(sum(tries), len(tries)) for task, tries in sorted(attempts.items())},
    )


def protocol_fingerprint(
    config: EvalConfig, suite: SuiteConfig, chains: Sequence[Chain], env: Mapping[str, str]
) -> str:
    """What must be equal before two scores may be compared: environment, chains, limits, instructions' source."""
    return content_hash(
        {
            "env": dict(env),
            "suite": suite.model_dump(mode="json"),
            "max_steps": config.max_steps,
            "replan": config.replan,
            "chains": [[c.scene, list(c.tasks), c.robot_state.tolist(), c.scene_state.tolist()] for c in chains],
        }
    )


def scores(report: EvalReport) -> dict[str, Estimate]:
    """The same names everywhere: `<suite>/avg_len`, `<suite>/sr_1..5`, `<suite>/task/<task>`."""
    named = {"avg_len": report.average_length}
    named |= {f"sr_{k}": estimate for k, estimate in enumerate(report.success, 1)}
    named |= {f"task/{task}": estimate for task, estimate in report.per_task.items()}
    return {f"{report.suite}/{name}": estimate for name, estimate in named.items()}


def as_metrics(named: Mapping[str, Estimate]) -> dict[str, float]:
    """Every score with its bounds as `<name>_low` and `<name>_high`."""
    return {
        f"{name}{suffix}": float(number)
        for name, estimate in named.items()
        for suffix, number in zip(("", "_low", "_high"), estimate, strict=True)
    }
