"""pretrain/full: the whole line, from a robot's recordings to a registered policy."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.deployments import run_deployment

from flows import steps


@flow(name="pretrain", log_prints=True)
def pretrain(config: str = "pretrain/full", site: str = "local", overrides: list[str] | None = None) -> dict[str, Any]:
    line = steps.open_line(config, site, overrides)
    recorded = steps.collect(line)
    data = steps.ingest(line, recorded)
    plan = steps.mix(line, data)
    text = steps.train_text(line, data)
    vq = steps.train_vq(line, plan)
    codes = steps.encode(line, data, vq)
    first = steps.train(line, "stage1", plan=plan, text=text, vq=vq, codes=codes)
    model = steps.train(line, "stage2", plan=plan, text=text, vq=vq, codes=codes, parent=first)
    run_deployment(
        "evaluate/chains",
        parameters={"config": config, "site": site, "overrides": overrides or [], "checkpoint": model["url"]},
        idempotency_key=line.evaluation_key(model["url"]),
        as_subflow=True,
    )
    scores = steps.evaluate(line, model)  # what the deployment found; runs here if it could not
    version = steps.register(line, model, scores)
    return steps.report(line, version)
