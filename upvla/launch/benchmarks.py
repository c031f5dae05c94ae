"""Judging a policy on a suite by name, on one process or on Ray, and replaying a dataset's recordings there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, Mismatch
from upvla.launch.evaluate import map_chains
from upvla.rollout.benchmarks import Places, Recorded, SuiteJudge, open_suite, suite_fingerprint
from upvla.rollout.evaluate import summarise
from upvla.sim.recording import load_expert, record_suite
from upvla.sim.suite import Suite
from upvla.store import Store
from upvla.types import Chain, ChainRecord, EvalReport

Progress = Callable[[int, int], None]
"""(chains judged, chains in all)"""


def evaluate_suite(
    policy: str, suite_name: str, places: Places, *, num: int, workers: int = 1, replan: int = 10,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of `random`, `still`, `expert` or a checkpoint's URL over a suite's first `num` chains, as JSON."""
    suite = open_suite(suite_name, places)
    chains = suite.chains(num)
    return _judge(suite, chains, SuiteJudge(suite, policy, replan), workers, progress)


def replay_dataset(
    store: Store, dataset: str, suite_name: str, places: Places, *, num: int | None = None, workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Reset to every recorded segment's first state, play its actions, ask the oracle: does this simulator agree with
    the recordings? `num` limits the segments. Of a suite of real CALVIN, each in the scene it was recorded in."""
    suite = open_suite(suite_name, places)
    chains, recorded = recorded_segments(store, dataset, suite, num)
    return _judge(suite, chains, SuiteJudge(suite, "replay", 1, recorded), workers, progress)


def recorded_segments(store: Store, dataset: str, suite: Suite, num: int | None) -> tuple[list[Chain], Recorded]:
    """(one-task chains, their actions) of the annotated segments of `NAME@VERSION`. Only CALVIN's worlds can be set to
    a recorded state; recordings from elsewhere are refused."""
    if not suite.name.startswith("calvin-"):
        raise ConfigError(
            f"replay needs worlds that can be set to a recorded state, which {suite.name}'s cannot: calvin-d"
        )
    home = "calvin_scene_"
    name, _, version = dataset.partition("@")
    table = Dataset(store, load_manifest(store, name, int(version) if version else None))
    table.manifest.action_space.require_equal(
        suite.action_space, ours=f"dataset {dataset}", theirs=f"suite {suite.name}"
    )
    chains: list[Chain] = []
    recorded: list[tuple[np.ndarray, ...]] = []
    for number, row in enumerate(table.episodes):
        if not row.scene.startswith(home):
            raise Mismatch(
                f"{dataset}: {row.source_key} was recorded in {row.scene!r}, not in CALVIN: it cannot tell "
                "whether this simulator is CALVIN's"
            )
        for span in row.spans:
            steps = range(span.start, min(span.end + 1, row.length))  # some sources count an end as the last step
            found = table.read(number, steps, ("state", "scene_state", "action"))
            robot, scene = (np.asarray(found[name][0], np.float64) for name in ("state", "scene_state"))
            chains.append(Chain(row.scene.removeprefix(home), robot, scene, (span.task,), len(chains)))
            recorded.append((np.asarray(found["action"]),))
    if not chains:
        raise ConfigError(f"{dataset} has no annotated segment to replay")
    order = sorted(range(len(chains)), key=lambda i: chains[i].scene)[:num]
    return [chains[i] for i in order], tuple(recorded[i] for i in order)


def collect_suite(
    suite_name: str, places: Places, out_dir: str, *, num: int, expert: str = "", seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Record an expert (the suite's own, or `module:function`) over `num` chains into CALVIN's raw layout."""
    suite = open_suite(suite_name, places)
    plug_in = load_expert(expert) if expert else None
    found = record_suite(suite, suite.chains(num), out_dir, expert=plug_in, seed=seed, progress=progress)
    return {"source_url": f"{out_dir}/training", **found}


def _judge(
    suite: Suite, chains: Sequence[Chain], judge: SuiteJudge, workers: int, progress: Progress | None
) -> dict[str, Any]:
    began = time.monotonic()
    fingerprint = suite_fingerprint(suite, chains, judge.replan)
    records: list[ChainRecord] = []

    def keep(found: Sequence[ChainRecord]) -> None:
        records.extend(found)
        if progress:
            progress(len(records), len(chains))

    if workers == 1:
        for record in judge.run(enumerate(chains)):
            keep([record])
    else:
        map_chains(judge, chains, num_workers=workers, on_records=keep)
    report = summarise(judge.policy, suite.name, fingerprint, records)
    return as_json(report) | {"seconds": round(time.monotonic() - began, 1)}


def as_json(report: EvalReport) -> dict[str, Any]:
    """What `upvla evaluate --suite` prints: values with 95 % intervals as {value, low, high}."""
    return {
        "policy": report.policy,
        "suite": report.suite,
        "chains": len(report.records),
        "average_length": report.average_length.value,
        "average_length_interval": [report.average_length.low, report.average_length.high],
        "success": [estimate.value for estimate in report.success],
        "success_intervals": [[estimate.low, estimate.high] for estimate in report.success],
        "per_task": {task: estimate._asdict() for task, estimate in report.per_task.items()},
        "env_steps": sum(sum(record.steps) for record in report.records),
        "errors": {record.number: record.error for record in report.records if record.error},
        "fingerprint": report.fingerprint,
    }
