"""The driver of a training stage: a process inside the cluster that owns the stage's key and asks for its workers.

    python -m upvla.launch.driver URL       of the spec that `launch/train.py` has written; what a training job runs

It opens the inputs, so that what is wrong fails before a worker is asked for; it asks again when workers have left for
a reason, or were lost more often than Ray Train may repeat and had come further meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from upvla.errors import AlreadyOwned, ConfigError, JobFailed, StoreError, UpvlaError, problems_of
from upvla.launch.cluster import connected, give_back
from upvla.launch.jobs import JOB_ID
from upvla.launch.lease import Lease, require_owner
from upvla.launch.notices import REQUEST
from upvla.launch.train import ALLOCATOR, CLAIM, FAILURE, LEFT, RESULT, TrainSpec, error_of, record_of
from upvla.store import Store, open_store

_NEVER_S = 1e9  # Ray Train would end a group to make a larger one: ours saves and leaves (`launch/notices.py`)


def main(arguments: Sequence[str]) -> int:
    """Run the spec at a URL. Errors become one line on stderr and a record beside the spec."""
    (url,) = arguments
    folder, _, name = url.rpartition("/")
    place = open_store(folder)
    try:
        spec = _spec(place.read_json(name), url)
        with connected(spec.environment | ALLOCATOR):
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
    if (result := record_of(place, RESULT)) is not None:
        return result
    with Lease(place, f"training {spec.prefix}") as lease:
        if (claim := record_of(place, CLAIM)) is not None:  # of a driver that was killed
            give_back(claim["places_of"])
        place.delete(FAILURE)
        _require_unasked(spec, place)
        _check(spec, place)
        allowed, leaving = spec.engine.worker_range, set[str]()
        while (result := record_of(place, RESULT)) is None:
            place.delete(LEFT)
            saved = _newest_point(place)
            try:
                _run_workers(spec, place, lease.number, began, allowed, _cpus_of_nodes(leaving))
            except JobFailed as error:
                require_owner(place, lease.number, f"training {spec.prefix}")
                if (now := _newest_point(place)) <= saved:
                    raise
                print(f"{spec.stage.name}: {error}; it has come to step {now} meanwhile and goes on", flush=True)
                continue
            if place.exists(RESULT):
                continue
            require_owner(place, lease.number, f"training {spec.prefix}")
            if (failure := record_of(place, FAILURE)) is not None:
                raise error_of(failure)
            if (left := record_of(place, LEFT)) is None:
                raise JobFailed(f"{spec.prefix}: the workers ended without a result; see their log")
            if left["reason"] == "stop":  # a job of the same name may come, of a Ray that has forgotten this one
                place.delete(REQUEST)
            allowed = _go_on_after(spec, left)
            leaving.update(left.get("nodes", ()))
    return result


def _require_unasked(spec: TrainSpec, place: Store) -> None:
    """`JobFailed` where this job was asked to stop while it waited. What an earlier one was asked is over."""
    if (request := record_of(place, REQUEST)) is None:
        return
    job = os.environ.get(JOB_ID)
    place.delete(REQUEST)
    if job and request.get("job") == job:
        raise JobFailed(f"{spec.prefix}: stopped before it began, as asked; start it again to go on")


def _newest_point(place: Store) -> int:
    """Step of the newest resume point, -1 before there is one."""
    from upvla.train.resume import latest

    return point.step if (point := latest(place.sub("resume"))) else -1


def _check(spec: TrainSpec, place: Store) -> None:
    """Everything that can be known to be wrong without a worker."""
    from upvla.launch.inputs import open_inputs
    from upvla.train.resume import points, require_same

    inputs, saved = open_inputs(spec, weights=False), place.sub("resume")
    inputs.check(spec)
    if _trains_here():
        inputs.require_space(spec)
    for point in points(saved)[:1]:
        require_same(point, spec.identity, spec.engine.zero_stage, saved.url)
    least, gpus = spec.engine.worker_range[0], ray.cluster_resources().get("GPU", 0)
    if spec.engine.use_gpu and gpus < least:
        raise ConfigError(
            f"engine.use_gpu is set for {least} workers and this Ray cluster has {gpus:.0f} GPUs: set it to false, or "
            "add nodes"
        )
    if spec.tracking is not None and not place.list("resume/"):  # later on, nobody waits for MLflow
        from upvla.tracking import Tracker

        Tracker(spec.tracking.uri, spec.tracking.experiment).experiment_id()


def _trains_here() -> bool:
    """Whether this machine's node takes workers: the head of a cluster does not."""
    this = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == this and node["Resources"].get("CPU", 0.0) > 0 for node in ray.nodes())


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


def _run_workers(
    spec: TrainSpec, place: Store, owner: int, began: float, allowed: tuple[int, int], cpus: Sequence[float]
) -> None:
    """One group of workers, restarted by Ray Train when one is lost, until it ends in good order."""
    folder = Path(tempfile.mkdtemp(prefix="ray-train-", dir=spec.scratch or None))
    trainer = _trainer(spec, {"owner": owner, "began": began}, allowed, cpus, folder)
    run_id = trainer.train_run_context.run_id  # type: ignore[attr-defined]  # typed as Ray's first API
    try:
        place.write_json(CLAIM, {"places_of": run_id})
        with _environment(spec.environment):
            trainer.fit()
    except TrainingFailedError as error:
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {0: error}
        rank, cause = min(failures.items())
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise JobFailed(
            f"{spec.prefix}: workers failed {spec.engine.max_failures + 1} times; the last failure of worker {rank}: "
            f"{reason[-1]}"
        ) from error
    except RayError as error:
        give_back(run_id)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise JobFailed(
            f"{spec.prefix}: Ray Train's controller was lost ({reason[0]}): the next start goes on from the newest "
            "resume point"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainer(
    spec: TrainSpec, driver: Mapping[str, Any], allowed: tuple[int, int], cpus: Sequence[float], folder: Path
) -> TorchTrainer:
    """A worker that is stopped or out of reach is found by Ray; one that lives and hangs, by the others in their
    group."""
    least, most = allowed
    room = threads_of_worker(cpus, most)
    threads = spec.engine.threads or room
    needs = {"CPU": min(threads, room, (sum(cpus) or 1.0) / least)} | ({"GPU": 1.0} if spec.engine.use_gpu else {})
    elastic = spec.engine.worker_range[0] < spec.engine.worker_range[1]
    settings = {"spec": spec.model_dump_json(), "threads": threads, "ray": True}
    settings |= {"needs": needs, "most": most} if elastic else {}
    return TorchTrainer(
        _work,
        train_loop_config={**settings, **driver},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # typed as Ray's first API
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=spec.engine.use_gpu,
            resources_per_worker=needs,
            elastic_resize_monitor_interval_s=_NEVER_S,
        ),
        torch_config=TorchConfig(backend=None if spec.engine.use_gpu else "gloo", timeout_s=spec.engine.patience_s),
        run_config=RunConfig(
            name=f"{spec.stage.name}-{os.getpid()}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=spec.engine.max_failures),
        ),
    )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Ray Train reads its settings here, and hands them on to its controller."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(settings: Mapping[str, Any]) -> None:
    """Imported late, like all that has the model: Ray's controller unpickles this function too, and does without it."""
    from upvla.launch.worker import work

    work(settings)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is put away: taking what was imported apart takes two seconds, and the next stage waits
