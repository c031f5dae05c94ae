"""Training as a Ray Job: what a stage is, as a spec on the store, and who asks for it to be trained.

    run_training(store, spec, jobs)           finds the result, or attaches to the running job, or submits one
      -> python -m upvla.launch.driver URL    inside the cluster: owns the key, opens the inputs, asks for workers
           -> upvla.launch.worker             every worker: data, model, engine, resume, fit, export

The result is a JSON beside the resume points, created once. It is what says that a stage is finished: not the job's
status, not the orchestrator's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from upvla.errors import (
    JobFailed,
    NotFound,
    OutcomeUnknown,
    StackError,
    StoreError,
    UpvlaError,
    require_no_login,
    shown,
)
from upvla.launch.jobs import Jobs
from upvla.launch.notices import request_stop
from upvla.model.config import ModelConfig
from upvla.store import Store, content_hash
from upvla.train.config import EngineConfig, StageConfig

RESULT, FAILURE, SPEC = "result.json", "failure.json", "spec.json"
LEFT, BAD_STEPS, CLAIM, UNSENT = "left.json", "bad_steps.json", "claim.json", "unsent.json"
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_ARENA_MAX": "1",
}
"""Environment of training processes: glibc keeps a step's memory for the next step, instead of giving it back and
touching every page anew (of the tiny model 3,000 page faults a step, or none). One arena, because Ray Train runs the
loop in a thread, and the arena of a thread gives back what lies above 64 MB whatever the other two settings say."""
_PASSING = {kind.code: kind for kind in (StoreError, OutcomeUnknown, StackError)}
_ELSEWHERE = {"store_url", "parent_url", "weights_urls", "tracking", "scratch"}
_LINE = re.compile(r"^\S+ +(\d+)/(\d+) ")
_JOB = re.compile(r"(?P<stage>.+)-(?P<key>[0-9a-f]{16})-\d+")


class TrackingSpec(BaseModel):
    """Where a stage's curves go. `parent` is the id of the run that they nest under.

    `uri` is kept without the login that it may hold: a spec lies on the store. A driver and its workers have theirs,
    like the store's keys, from Ray's own environment, since a job's can be read in Ray's list of jobs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: Annotated[str, AfterValidator(shown)]
    experiment: str
    parent: str | None = None
    tags: dict[str, str] = {}


class TrainSpec(BaseModel):
    """Everything a training stage needs to know, as JSON on the store. Its inputs are references by content.

    The tokenizers come from `parent_url`, an exported checkpoint whose weights are the start, where one is given;
    otherwise `model`, `text_id` and `vq_id` name them (a `vq` stage needs only `model`), and `weights_urls` imported
    weights that fill the fresh model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vq", "policy"]
    store_url: str
    stage: StageConfig
    engine: EngineConfig
    train_plan: str
    validation_plan: str
    model: ModelConfig | None = None
    text_id: str = ""
    vq_id: str = ""
    parent_url: str = ""
    parent_id: str = ""
    description_id: str = ""
    tower_id: str = ""
    weights_urls: tuple[str, ...] = ()
    weights_ids: tuple[str, ...] = ()
    bad_steps_before: tuple[dict[str, Any], ...] = Field(
        default=(), description="what the image tokenizer's training passed over; a parent's own is in its meta"
    )
    seed: int = 0
    tracking: TrackingSpec | None = None
    scratch: str = Field(
        default="", description="folder on the workers for shards in transit; default: a temporary one"
    )

    @model_validator(mode="after")
    def _without_login(self) -> Self:
        require_no_login(f"{self.stage.name}:", self.store_url, self.parent_url, *self.weights_urls)
        return self

    @property
    def key(self) -> str:
        """Identity of the result: what is learnt from what, not where, nor on how many workers."""
        value = self.model_dump(mode="json", exclude={*_ELSEWHERE, "engine", "bad_steps_before"}) | {
            "stage": self.stage.identity()
        }
        return content_hash(value | {"engine": self.engine.model_dump(include={"precision", "gradient_clipping"})})

    @property
    def identity(self) -> dict[str, str]:
        """What its resume points must have been made for."""
        return {"key": self.key, "train_plan": self.train_plan}

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for, as JSON, without where anything lies: a URL may hold a password."""
        return self.model_dump(mode="json", exclude=_ELSEWHERE)

    @property
    def prefix(self) -> str:
        return f"runs/{self.key}/{self.stage.name}"

    @property
    def environment(self) -> dict[str, str]:
        """Ray's settings for the whole job."""
        least, most = self.engine.worker_range
        # an elastic group asks only for places that Ray believes are there: one on a node that has gone is not awaited
        patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"} if least < most else {}
        return patience | {
            # workers' lines reach the log as they are printed: once each, none taken for a repetition of another
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(self.engine.stall_timeout_s),
            # a worker that has died, or all that have ended, are found within a second, not two
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
            # of the half minute that some clouds give notice, not five seconds
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            # whoever stalls or is out of reach takes no part in parting either: Ray would wait half a minute for it
            "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        }

    @property
    def scratch_folder(self) -> Path:
        """One for all workers of a machine."""
        return Path(self.scratch or tempfile.gettempdir(), "upvla-resume")


def run_training(
    store: Store,
    spec: TrainSpec,
    jobs: Jobs,
    *,
    on_line: Callable[[str], None] = print,
    python: str = "python",
) -> dict[str, Any]:
    """Result of the stage, trained now if it never was. Calling it twice, or after being killed, trains once.

    `python` is the interpreter's name on the cluster. Raises the failure that the run recorded: `JobFailed`, or what it
    was where it may pass (`StoreError`, `OutcomeUnknown`, `StackError`).
    """
    place = store.sub(spec.prefix)
    if (result := record_of(place, RESULT)) is not None:
        return result
    place.write_json(SPEC, spec.model_dump(mode="json"))
    entrypoint = f"{python} -m upvla.launch.driver {place.url}/{SPEC}"
    env = spec.environment | ALLOCATOR
    try:
        jobs.run(f"{spec.stage.name}-{spec.key}", entrypoint, env=env, on_line=on_line)
    except JobFailed as error:
        if (failure := record_of(place, FAILURE)) is not None:
            raise error_of(failure) from error
        raise
    result = record_of(place, RESULT)
    if result is None:
        raise JobFailed(f"the job of {spec.prefix} ended well but left no {RESULT} under {place.url}: run it again")
    return result


def stop_training(store: Store, jobs: Jobs, job_id: str = "") -> list[str]:
    """Ask the stage that trains as `job_id`, by default every one, to save and leave; the jobs that were asked.

    They do so after their present step. Raises `NotFound` where no such stage trains.
    """
    running = [found for each in jobs.running() if (found := _JOB.fullmatch(each))]
    asked = [found for found in running if job_id in ("", found[0])]
    if not asked:
        names = ", ".join(found[0] for found in running) or "nothing"
        raise NotFound(f"no training stage runs as {job_id or 'a job of this cluster'}; what trains now: {names}")
    for found in asked:
        request_stop(store.sub(f"runs/{found['key']}/{found['stage']}"), found[0])
    return [found[0] for found in asked]


def share_done(line: str) -> float | None:
    """How far a run is, 0 to 1, if `line` is one of its progress lines."""
    found = _LINE.match(line)
    return int(found[1]) / int(found[2]) if found else None


def record_of(place: Store, name: str) -> dict[str, Any] | None:
    """The record of that name beside the spec, None where there is none."""
    try:
        return dict(place.read_json(name))
    except NotFound:
        return None


def error_of(failure: Mapping[str, Any]) -> UpvlaError:
    """As the error that it was where trying again later may help, else as `JobFailed`."""
    return _PASSING.get(failure["code"], JobFailed)(failure["message"])
