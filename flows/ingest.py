"""ingest/playtable: record scripted experts and import them. ingest/watch: import what others have recorded since."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps


@flow(name="ingest", **steps.RESULTS)
def ingest(config: str = "pretrain/full", site: str = "", overrides: list[str] | None = None) -> dict[str, Any]:
    line = steps.open_pretraining(config, site, overrides or [])
    return steps.ingest(line, steps.collect(line))


@flow(name="ingest", **steps.RESULTS)
def watch(
    source_url: str = "",
    settle_s: float = 60.0,
    config: str = "pretrain/full",
    site: str = "",
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    return steps.watch(steps.open_pretraining(config, site, overrides or []), source_url, settle_s)
