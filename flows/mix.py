"""mix/default: fix the order of all training and validation samples of the newest dataset version."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps


@flow(name="mix", **steps.RESULTS)
def mix(config: str = "pretrain/full", site: str = "", overrides: list[str] | None = None) -> dict[str, Any]:
    return steps.mix(steps.open_pretraining(config, site, overrides or []))
