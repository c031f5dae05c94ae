"""The stages of the line as Prefect tasks: progress, artifacts and retries; what is done is `upvla.launch.line`.

Retries are for what passes (a store or a server that is away), never for what is wrong. What is only shown (progress,
artifacts) never fails a stage. What a task or a flow returns is references as JSON; nothing of it is ever pickled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.states import State

from flows.deploy import TRAINER, ensure_trainer_slot
from upvla.errors import OutcomeUnknown, StackError, StoreError, UpvlaError

if TYPE_CHECKING:
    from upvla.launch.finetune import Finetuning
    from upvla.launch.line import Line, Result
    from upvla.launch.pretrain import Pretraining

_PROGRESS_S = 5.0  # between two updates of a progress artifact
_RETRY_S = (10, 60)  # a server that restarts is back within the first pause, a machine within the second
_LEASE_S = 120  # renewed at three quarters of it; a trainer that was killed keeps the slot for so long at most
_PASSING = (StoreError, OutcomeUnknown, StackError, httpx.TransportError)  # the last: Prefect's own server is away

RESULTS: dict[str, Any] = {"persist_result": True, "result_serializer": "json", "log_prints": True}
"""How every flow keeps what it returns: as JSON, so that a results folder others may write to cannot run code."""


def _may_pass(task: Any, run: Any, state: State[Any]) -> bool:
    """A server's fault may pass, and every stage is safe to run again; a wrong config or bad data stays wrong."""
    try:
        state.result()
    except _PASSING:
        return True
    except Exception:
        return False
    return False


def _stage(
    name: str, *, trains: bool = False, shows: Callable[..., None] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A task that shows the line's progress, and publishes the stage's references at its end.

    One that `trains` first waits for the trainer's slot, which all deployments of a cluster share. `shows`, called with
    the line, the result and the inputs, publishes what this stage alone has to show.
    """

    def decorate(work: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(work)
        def run(line: Line, *inputs: Any, **named: Any) -> Result:
            line.progress = progress = _Progress(name)
            with _trainer() if trains else nullcontext():
                result = work(line, *inputs, **named)
            progress(1.0, "done")
            with _only_shown(progress.logger):
                create_markdown_artifact(references(name, result), key=name, description=f"references of stage {name}")
                if shows:
                    shows(line, result, *inputs)
            return result

        settings: dict[str, Any] = {"retry_condition_fn": _may_pass, "cache_policy": NO_CACHE, "persist_result": False}
        made = task(name=name, retries=len(_RETRY_S), retry_delay_seconds=list(_RETRY_S), **settings)(run)
        return cast("Callable[..., Result]", made)

    return decorate


@contextmanager
def _trainer() -> Iterator[None]:
    """The cluster's one slot for trainers. A lost lease ends nothing: the Ray job goes on, and is found again."""
    ensure_trainer_slot()
    with concurrency(TRAINER, occupy=1, strict=True, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False):
        yield


@contextmanager
def _only_shown(logger: Any) -> Iterator[None]:
    """Prefect's server, or where what is shown comes from, may be away while a stage is at work."""
    try:
        yield
    except (httpx.HTTPError, UpvlaError) as error:
        logger.warning("Prefect does not show this: %s", error)


class _Progress:
    """Lines to the flow run's log, and a bar in the Prefect UI."""

    def __init__(self, stage: str) -> None:
        self.logger, self._stage, self._last = get_run_logger(), stage, 0.0
        self._artifact: UUID | None = None
        with _only_shown(self.logger):
            self._artifact = cast(UUID, create_progress_artifact(0.0, description=stage))

    def __call__(self, share: float, text: str) -> None:
        """`share` in 0..1, or negative for a line that says nothing about progress."""
        if share < 0:
            self.logger.info(text)
        elif share >= 1 or time.monotonic() - self._last > _PROGRESS_S:
            self._last = time.monotonic()
            self.logger.info(text)
            with _only_shown(self.logger):
                if self._artifact is not None:
                    what = f"{self._stage}: {text}"
                    update_progress_artifact(self._artifact, progress=100 * share, description=what)


def _show_data(line: Pretraining, ingested: Result, *inputs: Any) -> None:
    if report := line.data_report(ingested):
        create_markdown_artifact(report, key="data-report", description=f"{ingested['dataset']}@{ingested['version']}")


def _link_judged(line: Line, scored: Result, model: Mapping[str, Any]) -> None:
    _link(line.judged_pages(model["url"]))


def _link_version(line: Line, registered: Result, *inputs: Any) -> None:
    _link(line.version_pages(registered))


def _link(pages: Mapping[str, str]) -> None:
    for name, address in pages.items():
        create_link_artifact(address, name, description=name)


def site_here(site: str = "") -> str:
    """The site that is asked for, else the one of whoever runs the flow: a schedule names none."""
    return site or os.environ.get("UPVLA_SITE") or "local"


def open_pretraining(config: str, site: str, overrides: list[str]) -> Pretraining:
    from upvla.launch.pretrain import open_pretraining  # late: deploying a flow loads this module, and no engine

    return open_pretraining(config, site_here(site), overrides)


def open_finetuning(config: str, site: str, overrides: list[str]) -> Finetuning:
    from upvla.launch.finetune import open_finetuning

    return open_finetuning(config, site_here(site), overrides)


@_stage("collect")
def collect(line: Pretraining) -> Result:
    return line.collect()


@_stage("ingest", shows=_show_data)
def ingest(line: Pretraining, recorded: Result) -> Result:
    return line.ingest(recorded["source_url"])


@_stage("watch", shows=_show_data)
def watch(line: Pretraining, source_url: str, settle_s: float) -> Result:
    return line.watch(source_url, settle_s)


@_stage("mix")
def mix(line: Line, data: Result | None = None) -> Result:
    return line.mix()


@_stage("text")
def train_text(line: Pretraining, plan: Result) -> Result:
    return line.train_text(plan)


@_stage("vq", trains=True)
def train_vq(line: Pretraining, plan: Result) -> Result:
    return line.train_vq(plan)


@_stage("encode")
def encode(line: Line, plan: Result, vq: Result) -> Result:
    return line.encode(plan, vq)


@_stage("stage1", trains=True)
def train_stage1(line: Pretraining, plan: Result, text: Result, vq: Result, codes: Result) -> Result:
    return line.train_stage("stage1", plan, text, vq)


@_stage("stage2", trains=True)
def train_stage2(line: Pretraining, plan: Result, text: Result, vq: Result, parent: Result) -> Result:
    return line.train_stage("stage2", plan, text, vq, parent)


@_stage("finetune", trains=True)
def train_finetune(line: Finetuning, plan: Result, champion: Result) -> Result:
    return line.train(plan, champion)


@_stage("drift")
def drift(line: Finetuning, plan: Result, champion: Result) -> Result:
    return line.drift(plan, champion)


@_stage("evaluate", shows=_link_judged)
def evaluate(line: Line, model: Mapping[str, Any]) -> Result:
    return line.evaluate(model["url"])


@_stage("register", shows=_link_version)
def register(line: Line, model: Result, scored: Result) -> Result:
    return line.register(model, scored)


@_stage("promote", shows=_link_version)
def promote(line: Finetuning, model: Result, champion: Result, scored: Result) -> Result:
    return line.promote(model, champion, scored)


@_stage("skip")
def skip(line: Finetuning, champion: Result) -> Result:
    return line.skip(champion)


def references(stage: str, result: Result) -> str:
    """What a stage returns, a row a key; scores as a table of their own."""
    if "scores" in result:
        return score_table(result["scores"])
    rows = [f"| {key} | `{json.dumps(value)[:300]}` |" for key, value in result.items()]
    return "\n".join([f"### {stage}", "", "| what | value |", "|---|---|", *rows])


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Policies beside each other, a row a metric."""
    policies = list(scores)
    metrics = sorted({metric for each in scores.values() for metric in each})
    lines = [
        "### Scores, with 95 % intervals",
        "",
        f"| metric | {' | '.join(policies)} |",
        "|---" * (len(policies) + 1) + "|",
    ]
    for metric in metrics:
        cells = []
        for policy in policies:
            score = scores[policy].get(metric)
            cells.append("" if score is None else f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f})")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)
