"""The stages of the line as Prefect tasks: progress, artifacts and retries; what is done is `upvla.launch.line`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from upvla.launch.finetune import Finetuning, open_finetuning
from upvla.launch.line import Line, Result
from upvla.launch.pretrain import Pretraining, open_pretraining
from upvla.model.config import ModelConfig

_PROGRESS_S = 5.0  # between two updates of a progress artifact

# A stage is safe to run again at any point, so a passing fault of a server is worth a second attempt.
_stage = partial(task, retries=1, retry_delay_seconds=10, cache_policy=None, persist_result=False)


def _reported(stage: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give the line a progress artifact for the length of a stage, and publish the stage's references at its end."""

    def decorate(work: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(work)
        def run(line: Line, *inputs: Any, **named: Any) -> Result:
            logger, artifact, last = get_run_logger(), create_progress_artifact(0.0, description=stage), [0.0]

            def progress(share: float, text: str) -> None:
                if share < 0:
                    logger.info(text)
                    return
                if time.monotonic() - last[0] > _PROGRESS_S or share >= 1:
                    last[0] = time.monotonic()
                    logger.info(text)
                    update_progress_artifact(artifact, progress=100 * share, description=f"{stage}: {text}")

            line.progress = progress
            result = work(line, *inputs, **named)
            update_progress_artifact(artifact, progress=100.0, description=f"{stage}: done")
            create_markdown_artifact(_markdown(stage, result), key=stage, description=f"references of stage {stage}")
            return result

        return run

    return decorate


@_stage(name="collect")
@_reported("collect")
def collect(line: Pretraining) -> Result:
    return line.collect()


@_stage(name="ingest")
@_reported("ingest")
def ingest(line: Pretraining, recorded: Result) -> Result:
    return line.ingest(recorded["source_url"])


@_stage(name="mix")
@_reported("mix")
def mix(line: Line, data: Result | None = None) -> Result:
    return line.mix()


@_stage(name="text")
@_reported("text")
def train_text(line: Pretraining, plan: Result) -> Result:
    return line.train_text(plan)


@_stage(name="vq")
@_reported("vq")
def train_vq(line: Pretraining, plan: Result) -> Result:
    return line.train_vq(plan)


@_stage(name="encode")
@_reported("encode")
def encode(line: Line, plan: Result, vq: Result, model: ModelConfig) -> Result:
    return line.encode(plan, vq, model)


@_stage(name="stage1")
@_reported("stage1")
def train_stage1(line: Pretraining, plan: Result, text: Result, vq: Result, codes: Result) -> Result:
    return line.train_stage("stage1", plan, text, vq)


@_stage(name="stage2")
@_reported("stage2")
def train_stage2(line: Pretraining, plan: Result, text: Result, vq: Result, parent: Result) -> Result:
    return line.train_stage("stage2", plan, text, vq, parent)


@_stage(name="finetune")
@_reported("finetune")
def train_finetune(line: Finetuning, plan: Result, champion: Result) -> Result:
    return line.train(plan, champion)


@_stage(name="evaluate")
@_reported("evaluate")
def evaluate(line: Line, model: Mapping[str, Any]) -> Result:
    return line.evaluate(model["url"])


@_stage(name="register")
@_reported("register")
def register(line: Line, model: Result, scored: Result) -> Result:
    return line.register(model, scored)


@_stage(name="promote")
@_reported("promote")
def promote(line: Finetuning, model: Result, champion: Result, scored: Result) -> Result:
    return line.promote(model, champion, scored)


@_stage(name="skip")
@_reported("skip")
def skip(line: Finetuning, champion: Result) -> Result:
    return line.skip(champion)


__all__ = ["open_finetuning", "open_pretraining"]


def _markdown(stage: str, result: Result) -> str:
    if "scores" in result:
        return _score_table(result["scores"])
    rows = [f"| {key} | `{json.dumps(value)[:300]}` |" for key, value in result.items()]
    return "\n".join([f"### {stage}", "", "| what | value |", "|---|---|", *rows])


def _score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    policies = list(scores)
    metrics = sorted({metric for each in scores.values() for metric in each})
    lines = ["### Scores, with 95 % intervals", "", f"| metric | {' | '.join(policies)} |", "|---" * (len(policies) + 1) + "|"]
    for metric in metrics:
        cells = []
        for policy in policies:
            score = scores[policy].get(metric)
            cells.append("" if score is None else f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f})")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)
