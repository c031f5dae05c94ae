"""Faults of a training job on Ray: real processes, real signals, and equal results.

Every test compares with the same stage trained without a fault by plain processes. Each prints what it did to whom
and what it cost. Some keep their data and resume points in a folder, some in a bucket.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import S3Server
from tests.faults.rows import compared, told
from tests.launch.conftest import RayHead, ray_node
from tests.launch.running import (
    SLOW,
    Prepared,
    Running,
    by_start,
    cost_of,
    saved_point,
    stage_of,
    wait_for,
)
from tests.launch.stages import model, prepared, run_stage
from tests.train.toy import Workers
from upvla.errors import JobFailed, NotFound
from upvla.launch.jobs import Jobs
from upvla.launch.notices import REQUEST
from upvla.launch.train import FAILURE, RESULT, SPEC, TrainSpec, stop_training
from upvla.store import Store
from upvla.train.resume import latest

__all__ = ["model", "prepared"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]

_STALL_TIMEOUT_S, _MARGIN_S = 10, 20


def require_equal(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert result["losses"] == reference["losses"]
    assert result["model_id"] == reference["model_id"], "weights are equal, bit for bit"


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def children(head: RayHead, title: str) -> list[psutil.Process]:
    """Processes of the cluster with `title` in their command line."""
    return [p for p in psutil.Process(head.pid).children(recursive=True) if title in " ".join(p.cmdline())]


def test_a_run_outlives_its_node_its_driver_an_operators_stop_and_a_second_driver(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, s3_server: S3Server, tmp_path: Path
) -> None:
    """Workers begin on a node beside the head's, which is drained as a cloud would do it, and go on elsewhere.

    Only that node has four CPUs a worker; they keep as many threads where they have one. Whoever asks again for the
    stage of a driver that was killed, or was told to stop, makes the next attempt.
    """
    from upvla.tracking import Tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    engine = {"zero_stage": 1, "threads": 4, "num_workers": (1, 2)}
    changes = {"engine": engine, "stage": SLOW | {"steps": 36, "save_every": 12}}
    tracker = Tracker(uri, "faults")
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, **changes)[1])
    store, spec = stage_of(prepared, s3_server.url(), **changes, tracking={"uri": uri, "experiment": "faults"})
    points = store.sub(f"{spec.prefix}/resume")

    with ray_node(ray_head, num_cpus=8) as node:
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

    assert first.left_for() == ["preempted"]
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
    assert not store.sub(spec.prefix).exists(REQUEST), "a later job may have the same name"
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
    engine = {"zero_stage": 3, "num_workers": (1, 2), "max_failures": 1, "stall_timeout_s": _STALL_TIMEOUT_S}
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
