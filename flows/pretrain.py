"""pretrain/full: the whole line, from a robot's recordings to a registered policy."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps
from flows.evaluate import evaluate


@flow(name="pretrain", **steps.RESULTS)
def pretrain(config: str = "pretrain/full", site: str = "", overrides: list[str] | None = None) -> dict[str, Any]:
    line = steps.open_pretraining(config, site, overrides or [])
    recorded = steps.collect(line)
    data = steps.ingest(line, recorded)
    plan = steps.mix(line, data)
    text = steps.train_text(line, plan)
    vq = steps.train_vq(line, plan)
    codes = steps.encode(line, plan, vq)
    first = steps.train_stage1(line, plan, text, vq, codes)
    model = steps.train_stage2(line, plan, text, vq, first)
    scored = evaluate(model["url"], config, site, overrides)  # a flow run of its own, as `evaluate/chains` makes one
    version = steps.register(line, model, scored)
    stages = {"collect": recorded, "ingest": data, "mix": plan, "text": text, "vq": vq, "encode": codes}
    stages |= {"stage1": first, "stage2": model, "evaluate": scored, "register": version}
    return line.conclude(stages)
