"""Training as a Ray Job: who asks for it, and the driver that runs it on Ray Train.

    run_training(store, spec, jobs)         asks: finds the result, or attaches to the running job, or submits one
      -> python -m upvla.launch.train URL   the driver, inside the cluster: owns the key, opens the inputs, then asks
                                            for workers, and asks again when they have left for a reason
           -> upvla.launch.worker           every worker: data, model, engine, resume, fit, export

The result is a JSON beside the resume points, created once. It is what says that a stage is finished: not the job's
status, not the orchestrator's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import ray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from upvla.errors import (
    AlreadyOwned,
    ConfigError,
    JobFailed,
    NotFound,
    OutcomeUnknown,
    StackError,
    StoreError,
    UpvlaError,
    problems_of,
    require_no_login,
    shown,
)
from upvla.launch.cluster import connected
from upvla.launch.jobs import Jobs
from upvla.launch.lease import Lease, require_owner
from upvla.launch.notices import REQUEST, request_stop
from upvla.model.config import ModelConfig
from upvla.store import Store, content_hash, open_store
from upvla.train.config import EngineConfig, StageConfig

RESULT, FAILURE, SPEC = "result.json", "failure.json", "spec.json"
LEFT, BAD_STEPS = "left.json", "bad_steps.json"
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
    def config(self) -> dict[str, Any]:
        """What was asked for, as JSON, without where anything lies: a URL may hold a password."""
        return self.model_dump(mode="json", exclude=_ELSEWHERE)

    @property
    def prefix(self) -> str:
        return f"runs/{self.key}/{self.stage.name}"

    @property
    def environment(self) -> dict[str, str]:
        """Ray's settings for the whole job."""
        return {
            # workers' lines reach the log as they are printed: once each, none taken for a repetition of another
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(self.engine.stall_timeout_s),
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
    if (result := _read(place, RESULT)) is not None:
        return result
    place.write_json(SPEC, spec.model_dump(mode="json"))
    entrypoint = f"{python} -m upvla.launch.train {place.url}/{SPEC}"
    env = spec.environment | ALLOCATOR
    try:
        jobs.run(f"{spec.stage.name}-{spec.key}", entrypoint, env=env, on_line=on_line)
    except JobFailed as error:
        if (failure := _read(place, FAILURE)) is not None:
            raise _recorded(failure) from error
        raise
    result = _read(place, RESULT)
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
        request_stop(store.sub(f"runs/{found['key']}/{found['stage']}"))
    return [found[0] for found in asked]


def share_done(line: str) -> float | None:
    """How far a run is, 0 to 1, if `line` is one of its progress lines."""
    found = _LINE.match(line)
    return int(found[1]) / int(found[2]) if found else None


# --------------------------------------------------------------------------------------------------- the driver


def main(arguments: Sequence[str]) -> int:
    """Run the spec at a URL. Errors become one line on stderr and a record beside the spec."""
    (url,) = arguments
    folder, _, name = url.rpartition("/")
    place = open_store(folder)
    try:
        spec = _spec(place.read_json(name), url)
        with connected():
            train(spec)
    except UpvlaError as error:
        if not isinstance(error, AlreadyOwned):  # then the record is the owner's to write
            with contextlib.suppress(StoreError):
                place.write_json(FAILURE, {"code": error.code, "message": str(error)})
        print(f"upvla: {error.code}: {error}", file=sys.stderr)
        return 1
    return 0


def _spec(value: Any, url: str) -> TrainSpec:
    try:
        return TrainSpec.model_validate(value)
    except ValidationError as error:
        raise ConfigError(
            f"{url} describes no stage ({problems_of(error)}): start the line again, from the version of upvla that "
            "the cluster runs"
        ) from error


def train(spec: TrainSpec) -> dict[str, Any]:
    """Train on the connected cluster, to the result. Wrong inputs fail here, before workers are asked for.

    Raises `AlreadyOwned` when another driver trains the same key, and `JobFailed` with what the workers said.
    """
    began, place = time.time(), open_store(spec.store_url).sub(spec.prefix)
    if (result := _read(place, RESULT)) is not None:
        return result
    with Lease(place, f"training {spec.prefix}") as lease:
        place.delete(FAILURE)
        place.delete(REQUEST)
        _check(spec, place)
        allowed, leaving = spec.engine.worker_range, set[str]()
        while (result := _read(place, RESULT)) is None:
            place.delete(LEFT)
            saved = _newest_point(place)
            try:
                _run_workers(spec, lease.number, began, allowed, _cpus_of_nodes(leaving))
            except JobFailed as error:
                require_owner(place, lease.number, f"training {spec.prefix}")
                if (now := _newest_point(place)) <= saved:
                    raise
                print(f"{spec.stage.name}: {error}; it has come to step {now} meanwhile and goes on", flush=True)
                continue
            if place.exists(RESULT):
                continue
            require_owner(place, lease.number, f"training {spec.prefix}")
            if (failure := _read(place, FAILURE)) is not None:
                raise _recorded(failure)
            if (left := _read(place, LEFT)) is None:
                raise JobFailed(f"{spec.prefix}: the workers ended without a result; see their log")
            allowed = _go_on_after(spec, left)
            leaving.update(left.get("nodes", ()))
    return result


def _newest_point(place: Store) -> int:
    """Step of the newest resume point, -1 before there is one."""
    from upvla.train.resume import points

    return max((point.step for point in points(place.sub("resume"))), default=-1)


def _recorded(failure: Mapping[str, Any]) -> UpvlaError:
    """As the error that it was where trying again later may help, else as `JobFailed`."""
    return _PASSING.get(failure["code"], JobFailed)(failure["message"])


def _check(spec: TrainSpec, place: Store) -> None:
    """Everything that can be known to be wrong without a worker."""
    from upvla.launch.inputs import open_inputs

    open_inputs(spec).check(spec)
    least, gpus = spec.engine.worker_range[0], ray.cluster_resources().get("GPU", 0)
    if spec.engine.use_gpu and gpus < least:
        raise ConfigError(
            f"engine.use_gpu is set for {least} workers and this Ray cluster has {gpus:.0f} GPUs: set it to false, or "
            "add nodes"
        )
    if spec.tracking is not None and not place.list("resume/"):  # later on, nobody waits for MLflow
        from upvla.tracking import Tracker

        Tracker(spec.tracking.uri, spec.tracking.experiment).experiment_id()


def _go_on_after(spec: TrainSpec, left: Mapping[str, Any]) -> tuple[int, int]:
    """How many workers to ask for next, or `JobFailed` where leaving was the wish.

    Fewer than the config allows only right after a number that did not fit: there may be room for more by now.
    """
    if left["reason"] == "stop":
        raise JobFailed(f"{spec.prefix}: stopped after step {left['step']} as asked; start it again to go on")
    print(f"{spec.stage.name}: the workers left ({left['reason']}) and are asked for again", flush=True)
    least, most = left["num_workers"] if left["reason"] == "resize" else spec.engine.worker_range
    return int(least), int(most)


def _cpus_of_nodes(leaving: Collection[str]) -> list[float]:
    """CPUs of every node but those that are about to be taken away."""
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return [float(node["Resources"].get("CPU", 0.0)) for node in staying]


def threads_of_worker(cpus: Sequence[float], num_workers: int) -> int:
    """The most threads that each of `num_workers` can have on nodes with `cpus`: a worker lies on one node."""
    most = int(max(cpus, default=1.0))
    return next((n for n in range(most, 1, -1) if sum(c // n for c in cpus) >= num_workers), 1)


def _run_workers(spec: TrainSpec, owner: int, began: float, allowed: tuple[int, int], cpus: Sequence[float]) -> None:
    """One group of workers, restarted by Ray Train when one is lost, until it ends in good order.

    One that is stopped or out of reach is found by Ray; one that lives and hangs, by the others in their group.
    """
    least, most = allowed
    room = threads_of_worker(cpus, most)
    threads = spec.engine.threads or room
    os.environ |= spec.environment
    folder = Path(tempfile.mkdtemp(prefix="ray-train-", dir=spec.scratch or None))
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "spec": spec.model_dump_json(),
            "threads": threads,
            "owner": owner,
            "began": began,
            "ray": True,
        },
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]  # typed as Ray's first API
            use_gpu=spec.engine.use_gpu,
            resources_per_worker={"CPU": min(threads, room, (sum(cpus) or 1.0) / least)},
        ),
        torch_config=TorchConfig(backend=None if spec.engine.use_gpu else "gloo", timeout_s=spec.engine.patience_s),
        run_config=RunConfig(
            name=f"{spec.stage.name}-{os.getpid()}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=spec.engine.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {0: error}
        rank, cause = min(failures.items())
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise JobFailed(
            f"{spec.prefix}: workers failed {spec.engine.max_failures + 1} times; the last failure of worker {rank}: "
            f"{reason[-1]}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _work(settings: Mapping[str, Any]) -> None:
    """Imported late: Ray's controller unpickles this function too, and should not load the whole model for it."""
    from upvla.launch.worker import work

    work(settings)


def _read(place: Store, name: str) -> dict[str, Any] | None:
    try:
        return dict(place.read_json(name))
    except NotFound:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
