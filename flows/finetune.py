"""finetune/nightly: fine-tune the champion on what has landed since, keep the better of the two."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import steps


@flow(name="finetune", **steps.RESULTS)
def finetune(config: str = "finetune/nightly", site: str = "", overrides: list[str] | None = None) -> dict[str, Any]:
    line = steps.open_finetuning(config, site, overrides or [])
    champion = line.champion()
    if not line.is_due(champion):
        return steps.skip(line, champion)
    plan = steps.mix(line)
    steps.drift(line, plan, champion)
    steps.encode(line, plan, champion)
    model = steps.train_finetune(line, plan, champion)
    scored = steps.evaluate(line, model)
    return steps.promote(line, model, champion, scored)
