"""Judging a checkpoint: suites spread over Ray, records kept as they come, references judged once a protocol."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from upvla.launch.cluster import connected, result_of
from upvla.launch.evaluate import map_chains
from upvla.launch.steps import once
from upvla.rollout.evaluate import EvalConfig, SuiteConfig, summarise
from upvla.rollout.suites import Judge, suite_chains, suite_fingerprint
from upvla.store import Store, content_hash
from upvla.types import Chain, ChainRecord, Checkpoint, Estimate, EvalReport

Progress = Callable[[int, int], None]
"""(chains judged, chains in all)"""


def judge(
    store: Store,
    config: EvalConfig,
    suite: SuiteConfig,
    policy: str | Checkpoint,
    *,
    num_workers: int,
    progress: Progress | None = None,
) -> EvalReport:
    """Scores of a checkpoint, or of the reference policy of that name, on one suite.

    What was judged before an interruption is not judged again; a policy that was judged under this protocol already is
    read from the ledger.
    """
    chains = suite_chains(suite)
    protocol = suite_fingerprint(config, suite, chains)
    name, source = (policy, policy) if isinstance(policy, str) else (policy.model_id, policy.url)
    key = {"policy": name, "suite": suite.name, "protocol": protocol}

    def work() -> dict[str, Any]:
        records = _judge_all(
            store.sub(f"evaluations/{content_hash(key)}"), config, source, chains, num_workers, progress
        )
        return asdict(summarise(name, suite.name, protocol, records))

    return _report(once(store, "judge", key, work))


def film(config: EvalConfig, suite: SuiteConfig, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Videos and predicted-versus-real frames of the suite's first chains of different scenes, by file name."""
    chains = suite_chains(suite)
    spread = [round(i * (len(chains) - 1) / max(1, config.videos - 1)) for i in range(config.videos)]
    with connected():
        task = ray.remote(num_cpus=1, max_retries=2)(_film)
        waiting = [task.remote(checkpoint.url, config, index, chains[index]) for index in dict.fromkeys(spread)]
        return {name: data for files in map(result_of, waiting) for name, data in files.items()}


def _judge_all(
    folder: Store,
    config: EvalConfig,
    source: str,
    chains: Sequence[Chain],
    num_workers: int,
    progress: Progress | None,
) -> list[ChainRecord]:
    done = {r.number: r for key in folder.list("records-") for r in map(_record, folder.read_json(key))}

    def keep(found: Sequence[ChainRecord]) -> None:
        folder.write_json(f"records-{min(r.number for r in found):06d}.json", [list(r) for r in found])
        done.update({record.number: record for record in found})
        if progress:
            progress(len(done), len(chains))

    return map_chains(Judge(source, config), chains, num_workers=num_workers, done=dict(done), on_records=keep)


def _film(source: str, config: EvalConfig, index: int, chain: Chain) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="upvla-film-") as folder:
        files: Iterable[Path] = Judge(source, config).film(index, chain, Path(folder)).values()
        return {path.name: path.read_bytes() for path in files}


def _record(row: Sequence[Any]) -> ChainRecord:
    number, scene, tasks, succeeded, steps, *more = row
    return ChainRecord(number, scene, tuple(tasks), succeeded, tuple(steps), *more)


def _report(value: dict[str, Any]) -> EvalReport:
    return EvalReport(
        policy=value["policy"],
        suite=value["suite"],
        fingerprint=value["fingerprint"],
        records=tuple(_record(row) for row in value["records"]),
        success=tuple(Estimate(*row) for row in value["success"]),
        average_length=Estimate(*value["average_length"]),
        per_task={task: Estimate(*row) for task, row in value["per_task"].items()},
    )
