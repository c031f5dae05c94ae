"""evaluate/chains: closed-loop scores of one checkpoint, with reference policies and videos."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps


@flow(name="evaluate", **steps.RESULTS)
def evaluate(
    checkpoint: str, config: str = "pretrain/full", site: str = "", overrides: list[str] | None = None
) -> dict[str, Any]:
    line = steps.open_pretraining(config, site, overrides or [])
    return steps.evaluate(line, {"url": checkpoint})
