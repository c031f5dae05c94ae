"""Ingest on Ray: one task stages one portion of the recordings; the driver alone commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from upvla.data.ingest import IngestConfig, Portion, ingest, stage_here, stage_portion
from upvla.data.shards import Staged
from upvla.launch.cluster import connected, result_of
from upvla.launch.steps import turn
from upvla.store import Store, open_store


def run_ingest(
    store: Store, config: IngestConfig, source_url: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Add what is new at `source_url` to the dataset; see `upvla.data.ingest.ingest` for what comes back."""
    whole = open_store(source_url).url  # a relative path means another folder to a worker, whose own is Ray's
    return ingest(store, config, whole, fan_out=_in_turn, progress=progress)


def _in_turn(portions: Sequence[Portion], progress: Callable[[int, int], None]) -> list[Staged]:
    """Who ingests the same at the same time comes after the first, and finds its receipts."""
    if not portions:
        return []
    first = portions[0]
    key = {"config": first.config.model_dump(mode="json"), "source": first.source_url}
    with turn(first.store, "ingest", key | {"recordings": [portion.recordings for portion in portions]}):
        return _on_ray(portions, progress)


def _on_ray(portions: Sequence[Portion], progress: Callable[[int, int], None]) -> list[Staged]:
    if len(portions) < 2:
        return stage_here(portions, progress)  # not worth a cluster
    with connected():
        stage = ray.remote(num_cpus=1, max_retries=3)(stage_portion)  # repeating a portion is harmless
        number = {stage.remote(portion): i for i, portion in enumerate(portions)}
        staged: dict[int, Staged] = {}
        total, done, waiting = sum(len(portion.recordings) for portion in portions), 0, list(number)
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            staged[number[ready]] = result_of(ready)
            done += len(portions[number[ready]].recordings)
            progress(done, total)
        return [staged[i] for i in range(len(portions))]
