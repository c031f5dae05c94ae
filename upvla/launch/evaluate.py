"""Chains spread over Ray tasks. A task that dies is run again; its chains are judged once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ray
from ray.exceptions import WorkerCrashedError

from upvla.errors import JobFailed
from upvla.launch.cluster import connected, result_of
from upvla.types import Chain, ChainRecord

Work = Callable[[Sequence[tuple[int, Chain]]], list[ChainRecord]]
"""Runs chains, given with their indices, in one process: load the policy once, then a record a chain."""


def map_chains(
    work: Work,
    chains: Sequence[Chain],
    *,
    num_workers: int,
    shard_size: int = 4,
    done: Mapping[int, ChainRecord] | None = None,
    on_records: Callable[[Sequence[ChainRecord]], None] | None = None,
) -> list[ChainRecord]:
    """Records of all `chains` in order, `num_workers` processes at a time, `shard_size` chains a task.

    `done` holds records that an earlier, interrupted call handed to `on_records`: these chains are not run again. A
    crashed process (a segfault in a simulator) is retried twice; after that `JobFailed` names its chains. An error
    that `work` raises is not retried.
    """
    records = dict(done or {})
    todo = [(i, chain) for i, chain in enumerate(chains) if i not in records]
    shards = [todo[i : i + shard_size] for i in range(0, len(todo), shard_size)]
    with connected():
        task = ray.remote(num_cpus=1, max_retries=2, retry_exceptions=False)(_run)
        running: dict[ray.ObjectRef, list[tuple[int, Chain]]] = {}
        while shards or running:
            while shards and len(running) < num_workers:
                shard = shards.pop(0)
                running[task.remote(work, shard)] = shard
            (ready, *_), _ = ray.wait(list(running))
            shard = running.pop(ready)
            names = f"chains {shard[0][0]}..{shard[-1][0]}"
            try:
                found = result_of(ready)
            except WorkerCrashedError as error:
                raise JobFailed(
                    f"{names}: their process died three times; look for a crash in the simulator"
                ) from error
            missing = sorted({i for i, _ in shard} - {record.number for record in found})
            if missing:
                raise JobFailed(f"{names}: no record came back for chain {missing[0]}")
            records |= {record.number: record for record in found}
            if on_records:
                on_records(found)
    return [records[i] for i in range(len(chains))]


def _run(work: Work, shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
    return work(shard)  # Ray makes tasks of functions only, and work may be any callable that pickles
