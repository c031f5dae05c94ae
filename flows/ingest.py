"""ingest/playtable: record scripted experts, then turn the recordings into a dataset version."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps


@flow(name="ingest", log_prints=True)
def ingest(config: str = "pretrain/full", site: str = "local", overrides: list[str] | None = None) -> dict[str, Any]:
    line = steps.open_pretraining(config, site, overrides or [])
    return steps.ingest(line, steps.collect(line))
