"""Faults of a training job on Ray: real processes, real signals, and equal results.

Every test compares with the same stage trained without a fault by plain processes. Each prints what it did to whom
and what it cost. Some keep their data and resume points in a folder, some in a bucket.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.conftest import S3Server
from tests.faults.rows import compared, told
from tests.launch.conftest import RayHead, ray_node
from tests.launch.stages import model, prepared, run_stage, spec_of
from tests.train.toy import Workers
from upvla.errors import JobFailed, NotFound
from upvla.launch.jobs import Jobs
from upvla.launch.train import FAILURE, RESULT, SPEC, TrainSpec, run_training, stop_training
from upvla.store import Store, open_store
from upvla.train.resume import latest

__all__ = ["model", "prepared"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
STEPS = 24
# a rate at which steps do not multiply what sums of other parts round otherwise: losses then differ by 2e-7, not 4e-6
STAGE = {"steps": STEPS, "optimizer": {"lr": 3e-4}}
SLOW = {"eval_every": 1, "eval_batches": 2}
"""A step takes its time where it is followed by a validation."""
_STALL_TIMEOUT_S, _MARGIN_S = 10, 20
Prepared = tuple[Store, dict[str, Any]]


def stage_of(prepared: Prepared, place: Path | str, **changes: Any) -> tuple[Store, TrainSpec]:
    """The same stage on a store of its own, below a folder or at a URL, on which nothing is trained yet."""
    store, references = prepared
    other = open_store(place if isinstance(place, str) else str(place / "store"))
    for key in store.list():
        if not key.startswith(("runs/", "models/")):
            other.upload(Path(store.url, key), key)
    stage = STAGE | changes.pop("stage", {})
    spec = spec_of(other, references, name="faulty", weights=WEIGHTS, stage=stage)
    values = spec.model_dump() | {"engine": spec.engine.model_dump() | changes.pop("engine", {})} | changes
    return other, TrainSpec.model_validate(values)


def require_equal(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert result["losses"] == reference["losses"]
    assert result["model_id"] == reference["model_id"], "weights are equal, bit for bit"


class Life(NamedTuple):
    """Workers of one start, as a run's lines told of them."""

    start: int
    steps: list[tuple[float, int]]

    @property
    def last(self) -> int:
        return self.steps[-1][1] if self.steps else self.start


class Running:
    """`run_training` on a thread; what it printed, and what came of it."""

    def __init__(self, store: Store, spec: TrainSpec, head: RayHead) -> None:
        self.lines: list[tuple[float, str]] = []
        self.result: dict[str, Any] = {}
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(store, spec, head))
        self._thread.start()

    def _run(self, store: Store, spec: TrainSpec, head: RayHead) -> None:
        try:
            self.result = run_training(store, spec, Jobs(head.jobs_url), on_line=self._keep, python=sys.executable)
        except Exception as error:
            self.error = error

    def _keep(self, line: str) -> None:
        print(line)
        self.lines.append((time.monotonic(), line))

    def join(self, timeout_s: float = 600) -> dict[str, Any]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no end within {timeout_s} s"
        if self.error is not None:
            raise self.error
        return self.result

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until it is in so many lines, or the run has failed."""
        wait_for(lambda: sum(text in line for _, line in self.lines) >= times or self.error)

    def pid_of(self, rank: int) -> int:
        """Of a worker of the last group that Ray told of."""
        told_of = (re.search(rf"pid=(\d+)\) world_rank={rank}\b", line) for _, line in self.lines)
        return [int(found[1]) for found in told_of if found][-1]

    def left_for(self) -> list[str]:
        """Why workers left, and were asked for again."""
        return [found[1] for _, line in self.lines if (found := re.search(r": the workers left \((.+)\) and", line))]

    def lives(self) -> list[Life]:
        found: list[Life] = []
        for at, line in self.lines:
            if began := re.search(r": from step (\d+) of", line):
                found.append(Life(int(began[1]), []))
            elif " lr " in line:
                found[-1].steps.append((at, int(line.split()[1].partition("/")[0])))
        return found


def cost_of(moment: float, before: Life, after: Life) -> dict[str, Any]:
    """Of a fault at `moment` that ended one life and had another begin."""
    return {"lost_steps": before.last - after.start, "first_new_step_s": after.steps[0][0] - moment}


def wait_for(what: Callable[[], Any], timeout_s: float = 400) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"nothing within {timeout_s} s")


def saved_point(store: Store, spec: TrainSpec) -> Any:
    return wait_for(lambda: latest(store.sub(f"{spec.prefix}/resume")))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def children(head: RayHead, title: str) -> list[psutil.Process]:
    """Processes of the cluster with `title` in their command line."""
    return [p for p in psutil.Process(head.pid).children(recursive=True) if title in " ".join(p.cmdline())]


def test_a_run_outlives_its_node_its_driver_an_operators_stop_and_a_second_driver(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, s3_server: S3Server, tmp_path: Path
) -> None:
    """Workers begin on a node beside the head's, which is drained as a cloud would do it, and go on elsewhere.

    Only that node has four CPUs a worker, for three at once, between whom no batch can be shared out: two are asked for
    instead. They keep as many threads where they have one CPU. Whoever asks again for the stage of a driver that was
    killed, or was told to stop, makes the next attempt.
    """
    from upvla.tracking import Tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    engine = {"zero_stage": 1, "threads": 4, "num_workers": (2, 3)}
    changes = {"engine": engine, "stage": SLOW | {"steps": 36, "save_every": 12}}
    tracker = Tracker(uri, "faults")
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, **changes)[1])
    store, spec = stage_of(prepared, s3_server.url(), **changes, tracking={"uri": uri, "experiment": "faults"})
    points = store.sub(f"{spec.prefix}/resume")

    with ray_node(ray_head, num_cpus=12) as node:
        first = Running(store, spec, ray_head)
        first.wait_for("Started training worker group of size 2")
        faults = [("node drained, went on elsewhere", time.monotonic())]
        node.drain(deadline_s=120)
        first.wait_for("the workers left (preempted)")
    drained_after = saved_point(store, spec).step
    saved = wait_for(lambda: first.error or ((point := latest(points)).step > drained_after and point)).step
    (driver,) = (p for p in children(ray_head, "upvla.launch.driver") if "python" in p.name())
    faults.append((f"driver {driver.pid} killed after resume point {saved} was there", time.monotonic()))
    driver.kill()
    with pytest.raises(JobFailed):
        first.join()
    second = Running(store, spec, ray_head)
    stopped = stopped_by_an_operator(store, spec, second, ray_head)
    result, refused = outcome_of_two_drivers(store, spec)

    assert first.left_for() == ["resize", "preempted"]
    waited = [line for _, line in second.lines if "Deciding NOT to start" in line]
    assert waited == [], "places of a driver that was killed are given back"
    lives, equal = by_start([*first.lives(), *second.lives()]), compared(result, reference)
    costs = [cost_of(moment, *pair) for (_, moment), pair in zip(faults, pairwise(lives), strict=True)]
    for (fault, _), cost in zip(faults, costs, strict=True):
        told(fault, **cost, **equal)
    fault = f"stopped after step {stopped}, then two drivers at once, of which one was refused"
    told(fault, lost_steps=stopped - result["resumed_from"], **equal)
    assert costs[0]["lost_steps"] == 0 and lives[1].start == drained_after, "it was saved when notice was given"
    assert 0 <= costs[1]["lost_steps"] <= spec.stage.save_every
    assert saved <= lives[2].start < stopped == lives[2].last == result["resumed_from"]
    assert "upvla: already_owned: training runs/" in refused
    assert "is already owned by process" in refused
    assert not store.sub(spec.prefix).exists(FAILURE)
    require_equal(result, reference)
    (run,) = tracker.client.search_runs([tracker.experiment_id()])
    steps = [p.step for p in tracker.client.get_metric_history(run.info.run_id, "loss/total")]
    assert steps == list(range(1, spec.stage.steps + 1)), "one curve, without doubles and gaps"


def test_an_elastic_run_takes_more_workers_when_there_is_room_and_loses_no_step(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, tmp_path: Path
) -> None:
    """Two begin, for whom there is room; a node comes on which two more find their place.

    The rate is low: over hundreds of steps a higher one would multiply what other sums round otherwise.
    """
    changes = {"engine": {"zero_stage": 1, "threads": 1, "num_workers": (2, 4)}}
    changes["stage"] = {"steps": 280, "save_every": 1000, "eval_every": 140, "optimizer": {"lr": 1e-5}}
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, **changes)[1])
    store, spec = stage_of(prepared, tmp_path / "elastic", **changes)
    running = Running(store, spec, ray_head)
    running.wait_for("Attempting to start training worker group of size 2")
    with ray_node(ray_head, num_cpus=2):
        joined = time.monotonic()
        running.wait_for("Started training worker group of size 4")
        result = running.join()
    before, after = by_start(running.lives())
    cost, equal = cost_of(joined, before, after), compared(result, reference)
    told("a node joined: from two workers to four", **cost, **equal)
    assert running.left_for() == ["grow"]
    assert cost["lost_steps"] == 0 and after.start > 0, "it was saved when there was room"
    assert equal["loss_difference"] < 1e-5


def by_start(lives: Sequence[Life]) -> list[Life]:
    """Without what was told twice: two nodes of one machine both read its workers' logs."""
    steps: dict[int, dict[int, float]] = {}
    for life in lives:
        for at, step in life.steps:
            steps.setdefault(life.start, {}).setdefault(step, at)
    return [Life(start, [(at, step) for step, at in told_of.items()]) for start, told_of in steps.items()]


def stopped_by_an_operator(store: Store, spec: TrainSpec, running: Running, head: RayHead) -> int:
    """Step after which the run has saved and left, as it was asked to before its first one."""
    running.wait_for("Attempting to start training worker group")
    jobs = Jobs(head.jobs_url)
    (ours,) = (job for job in jobs.running() if job.startswith(f"{spec.stage.name}-{spec.key}-"))
    with pytest.raises(NotFound, match=rf"no training stage runs as vq-0-1; what trains now: .*{ours}"):
        stop_training(store, jobs, "vq-0-1")
    assert stop_training(store, jobs, ours) == [ours]
    with pytest.raises(JobFailed, match=r"stopped after step \d+ as asked; start it again to go on"):
        running.join()
    step = int(saved_point(store, spec).step)
    assert 0 < step < spec.stage.steps
    return step


def outcome_of_two_drivers(store: Store, spec: TrainSpec) -> tuple[dict[str, Any], str]:
    """The result of the one that goes on, and what the other says."""
    place = store.sub(spec.prefix)
    command = [sys.executable, "-m", "upvla.launch.driver", f"{place.url}/{SPEC}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], said
    return dict(place.read_json(RESULT)), said[codes.index(1)]


def killed_at_random(running: Running, points: Store, save_every: int) -> tuple[str, float]:
    """What was done and when: the seed says who dies, after which resume point, and how many steps later."""
    dice = random.Random("ray 3")
    rank, saved, later = dice.randrange(2), save_every * dice.randrange(2, 4), dice.randrange(1, 5)

    def moment_of(step: int) -> float:
        wait_for(lambda: running.error or ((point := latest(points)) and point.step >= step))
        return time.monotonic()

    before = moment_of(saved - save_every)
    time.sleep((moment_of(saved) - before) * later / save_every)
    victim, killed = psutil.Process(running.pid_of(rank)), time.monotonic()
    victim.kill()
    return f"worker {rank} killed, {later} steps after resume point {saved} was there", killed


def test_faults_of_a_run_that_comes_further_do_not_add_up_under_zero_3(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, s3_server: S3Server, tmp_path: Path
) -> None:
    """One failure may be repeated, and the run lives through four: the third life has come further than the first.

    One worker is killed, one stalls, and the third group's gets no more address space: at its next save it cannot go
    on. Then Ray Train's controller is killed, and the workers with it.
    """
    engine = {"zero_stage": 3, "max_failures": 1, "stall_timeout_s": _STALL_TIMEOUT_S}
    changes = {"engine": engine, "stage": SLOW | {"steps": 42, "save_every": 6}}
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, **changes)[1])
    store, spec = stage_of(prepared, s3_server.url(), **changes)
    running, points = Running(store, spec, ray_head), store.sub(f"{spec.prefix}/resume")
    faults = [killed_at_random(running, points, spec.stage.save_every)]

    def next_life() -> None:
        """Until its group has saved more than the one before."""
        running.wait_for("Started training worker group", times=len(faults) + 1)
        last = saved_point(store, spec).step
        wait_for(lambda: running.error or saved_point(store, spec).step > last)

    def worker_of_next_life() -> psutil.Process:
        next_life()
        return psutil.Process(running.pid_of(1))

    stalled = worker_of_next_life()
    stopped = time.monotonic()
    stalled.suspend()
    running.wait_for("[FailurePolicy] RAISE")
    given_up_s = time.monotonic() - stopped
    wait_for(lambda: not is_alive(stalled))  # Ray asks it to end before it makes it
    faults.append((f"worker {stalled.pid} stopped, given up {given_up_s:.1f} s later", stopped))
    starved = worker_of_next_life()
    faults.append((f"worker {starved.pid} starved of memory", time.monotonic()))
    starved.rlimit(psutil.RLIMIT_AS, (2**20, 2**20))
    next_life()
    (controller,) = children(ray_head, "ray::TrainController")
    faults.append((f"controller {controller.pid} killed", time.monotonic()))
    controller.kill()
    result, lives = running.join(), running.lives()
    assert len(lives) == len(faults) + 1
    for (fault, moment), before, after in zip(faults, lives, lives[1:], strict=False):
        cost = cost_of(moment, before, after)
        told(fault, **cost, **compared(result, reference))
        assert 0 <= cost["lost_steps"] <= spec.stage.save_every
    assert given_up_s < _STALL_TIMEOUT_S + _MARGIN_S
    assert sum("it has come to step" in line for _, line in running.lines) == 2
    require_equal(result, reference)
