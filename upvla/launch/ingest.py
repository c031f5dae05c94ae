"""Ingest on Ray: one task stages one portion of the recordings; the driver alone commits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

from upvla.data.ingest import IngestConfig, Portion, ingest, stage_portion
from upvla.data.shards import Staged
from upvla.store import Store


def run_ingest(
    store: Store, config: IngestConfig, source_url: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Add what is new at `source_url` to the dataset; see `upvla.data.ingest.ingest` for what comes back.

    Uses the cluster that `RAY_ADDRESS` names or that runs on this machine, else starts one for the time of the call.
    """
    return ingest(store, config, source_url, fan_out=_on_ray, progress=progress)


def _on_ray(portions: Sequence[Portion], progress: Callable[[int, int], None]) -> list[Staged]:
    if not portions:
        return []
    ours = not ray.is_initialized()
    if ours:
        _connect()
    try:
        stage = ray.remote(num_cpus=1, max_retries=3)(stage_portion)  # repeating a portion is harmless
        number = {stage.remote(portion): i for i, portion in enumerate(portions)}
        staged: dict[int, Staged] = {}
        total, done, waiting = sum(len(portion.recordings) for portion in portions), 0, list(number)
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            staged[number[ready]] = ray.get(ready)
            done += len(portions[number[ready]].recordings)
            progress(done, total)
        return [staged[i] for i in range(len(portions))]
    finally:
        if ours:
            ray.shutdown()


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except ConnectionError:
            if "RAY_ADDRESS" in os.environ:
                raise
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
