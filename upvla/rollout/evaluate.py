"""What is asked in a closed-loop evaluation, what its scores are worth, and which of them may be compared.

A chain is up to five instructions from one initial state without a reset between them; the first failure ends it.
The protocol's source is mees/calvin (evaluation of the ABC->D benchmark): 360 steps a subtask, success when the task
oracle says so between the state at the subtask's start and now. Numbers of the project's own playtable are its own:
they are never CALVIN numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from upvla.errors import Mismatch
from upvla.store import content_hash
from upvla.types import ChainRecord, Estimate, EvalReport


class SuiteConfig(BaseModel):
    """Which initial states and tasks: whole `chains`, or `tasks` (single subtasks, one start each)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["chains", "tasks"]
    scenes: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    """Which tasks chains and starts are made of; empty: all of them."""
    num: int = Field(gt=0, description="chains a scene, or starts a task and scene")
    seed: int = 0


class Control(BaseModel):
    """How chunks become actions; part of the protocol.

    `chunk`: the first `replan` actions of a chunk, then a new one (open loop when `replan` is the whole chunk, receding
    horizon when it is less). `ensemble`: a new chunk every `replan` steps, and each step the mean of all chunks that
    still speak about it, the oldest weighing most, by exp(-decay * age) (temporal ensembling, Zhao et al. 2023).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replan: int = Field(10, gt=0, description="actions of a chunk that are executed before the next prediction")
    execution: Literal["chunk", "ensemble"] = "chunk"
    decay: float = Field(0.01, ge=0)


class EvalConfig(Control):
    """What a line judges its models by."""

    suites: tuple[SuiteConfig, ...]
    max_steps: int = Field(360, gt=0, description="env steps a subtask before it counts as failed")
    videos: int = Field(4, ge=0, description="chains of the first suite that are filmed")
    references: tuple[Literal["random", "still", "expert"], ...] = ("random", "still")

    @property
    def control(self) -> Control:
        return Control(**{name: getattr(self, name) for name in Control.model_fields})


class Layout(BaseModel):
    """Who runs where: the speed of an evaluation and nothing else, so it belongs to a site.

    `model`: every process of simulators has the policy in it (`each`), or all ask one that has it alone (`one`), which
    takes the GPU where the site has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanes: int = Field(8, gt=0, description="worlds that a process runs side by side, answered in one batch")
    model: Literal["each", "one"] = "each"
    patience_s: float = Field(120.0, gt=0, description="a process in which nothing moves for so long is killed")


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


def summarise(
    policy: str, suite: str, protocol: Mapping[str, Any], identity: Mapping[str, Any], records: Iterable[ChainRecord]
) -> EvalReport:
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
        fingerprint=content_hash(protocol),
        records=records,
        success=tuple(wilson(sum(r.succeeded >= k for r in records), len(records)) for k in range(1, longest + 1)),
        average_length=bootstrap_mean([r.succeeded for r in records]),
        per_task={task: wilson(sum(tries), len(tries)) for task, tries in sorted(attempts.items())},
        protocol=protocol,
        identity=identity,
    )


class Comparison(NamedTuple):
    """Differences on the same chains, `after - before`, with 95 % intervals of the paired bootstrap."""

    average_length: Estimate
    success: tuple[Estimate, ...]  # of at least 1.. tasks done


def compare(before: EvalReport, after: EvalReport) -> Comparison:
    """Raises `Mismatch` naming what differs where the two were not judged by one protocol."""
    if before.fingerprint != after.fingerprint:
        old, new, none = before.protocol, after.protocol, "nothing"
        said = [
            f"{key}: {old.get(key, none)} and {new.get(key, none)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, none) != new.get(key, none)
        ]
        raise Mismatch(
            f"{before.policy} and {after.policy} were judged by different protocols, which differ in "
            f"{'; '.join(said) or 'their fingerprints'}: evaluate both by one"
        )
    pairs = [(one.succeeded, other.succeeded) for one, other in zip(before.records, after.records, strict=True)]
    steps = range(1, max(len(before.success), len(after.success)) + 1)
    return Comparison(
        bootstrap_mean([new - old for old, new in pairs]),
        tuple(bootstrap_mean([float(new >= k) - float(old >= k) for old, new in pairs]) for k in steps),
    )


# ----------------------------------------------------------------------------------------------- reports as JSON


def report_to_json(report: EvalReport) -> dict[str, Any]:
    """What is stored and what `upvla evaluate --suite ... --json` prints; `report_from_json` reads it back."""
    return {
        "policy": report.policy,
        "suite": report.suite,
        "chains": len(report.records),
        "average_length": report.average_length.value,
        "average_length_interval": list(report.average_length[1:]),
        "success": [estimate.value for estimate in report.success],
        "success_intervals": [list(estimate[1:]) for estimate in report.success],
        "per_task": {task: estimate._asdict() for task, estimate in report.per_task.items()},
        "failures": dict(Counter(record.failure for record in report.records if record.failure)),
        "errors": {str(record.number): record.error for record in report.records if record.error},
        "fingerprint": report.fingerprint,
        "protocol": dict(report.protocol),
        "identity": dict(report.identity),
        "records": [list(record) for record in report.records],
    }


def report_from_json(value: Mapping[str, Any]) -> EvalReport:
    """Scores are worked out again from the records. Raises `Mismatch` where `value` is no such report."""
    try:
        records = [record_from_json(row) for row in value["records"]]
        found = summarise(value["policy"], value["suite"], value["protocol"], value["identity"], records)
    except (KeyError, TypeError, ValueError) as error:
        raise Mismatch(f"this is not what `upvla evaluate --suite ... --json` prints: {error!r}") from error
    if found.fingerprint != value["fingerprint"]:
        raise Mismatch(f"the protocol in this report is not the one that its fingerprint {value['fingerprint']} names")
    return found


def record_from_json(row: Sequence[Any]) -> ChainRecord:
    number, scene, tasks, succeeded, steps, error, failure = row
    return ChainRecord(number, scene, tuple(tasks), succeeded, tuple(steps), error, failure)


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
