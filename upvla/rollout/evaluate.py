"""Closed-loop evaluation by CALVIN's long-horizon protocol, and what its scores are worth.

A chain is up to five instructions from one initial state without a reset between them; the first failure ends it.
The protocol's source is mees/calvin (evaluation of the ABC->D benchmark): 360 steps a subtask, success when the task
oracle says so between the state at the subtask's start and now. Numbers of the project's own playtable are its own:
they are never CALVIN numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from upvla.errors import Mismatch, UpvlaError
from upvla.rollout.film import Film
from upvla.store import content_hash
from upvla.types import Chain, ChainRecord, Env, Estimate, EvalReport, Policy

Oracle = Callable[[str, Mapping[str, Any], Mapping[str, Any]], bool]


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


def run_chain(
    env: Env,
    policy: Policy,
    chain: Chain,
    index: int,
    *,
    oracle: Oracle,
    instruction: Callable[[str], str],
    max_steps: int,
    replan: int,
    film: Film | None = None,
) -> ChainRecord:
    """Run one chain until its first failure. A policy that breaks its contract ends this chain only, with `error`."""
    env.action_space.require_equal(policy.action_space, ours=f"env {env.name}", theirs=f"policy {policy.name}")
    env.reset(chain.robot_state, chain.scene_state)
    steps: list[int] = []
    error = ""
    for task in chain.tasks:
        try:
            used, done = _subtask(env, policy, task, oracle, instruction(task), max_steps, replan, film)
        except UpvlaError as failure:
            used, done, error = 0, False, f"{type(failure).__name__}: {failure}"
        steps.append(used)
        if not done:
            return ChainRecord(index, chain.scene, chain.tasks, len(steps) - 1, tuple(steps), error)
    return ChainRecord(index, chain.scene, chain.tasks, len(steps), tuple(steps), "")


def _subtask(
    env: Env, policy: Policy, task: str, oracle: Oracle, text: str, max_steps: int, replan: int, film: Film | None
) -> tuple[int, bool]:
    policy.reset(text)
    start = env.info()
    for step in range(max_steps):
        if step % replan == 0:
            observation = env.observe()
            prediction = policy.act(observation)
            _check_chunk(prediction.actions, len(env.action_space), replan, policy.name)
            if film is not None:
                film.plan(observation, prediction, text)
        env.step(prediction.actions[step % replan])
        if film is not None and step % film.every == film.every - 1:
            film.frame(env.observe())
        if oracle(task, start, env.info()):
            if film is not None:
                film.mark(env.observe(), text, True)
            return step + 1, True
    if film is not None:
        film.mark(env.observe(), text, False)
    return max_steps, False


def _check_chunk(actions: np.ndarray, dims: int, replan: int, name: str) -> None:
    if actions.ndim != 2 or actions.shape[1] != dims or len(actions) < replan:
        raise Mismatch(f"policy {name}: chunk has shape {actions.shape}, expected (>={replan}, {dims})")
    if not np.isfinite(actions).all():
        bad = np.argwhere(~np.isfinite(actions))[0]
        raise Mismatch(f"policy {name}: action is not finite at chunk step {bad[0]}, dimension {bad[1]}")


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
