"""Faults of a training job on Ray: real processes, real signals, and equal results.

Every test compares with the same stage trained without a fault by two plain processes. Each prints what it did to whom
and what it cost. Some keep their data and resume points in a folder, some in a bucket.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import S3Server
from tests.faults.rows import compared, taken_again, told
from tests.launch.conftest import RayHead, ray_node
from tests.launch.stages import model, plans_of, prepared, run_stage, spec_of
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
_STALL_TIMEOUT_S, _MARGIN_S = 10, 20  # Ray looks every few seconds
Prepared = tuple[Store, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(two_workers: Workers, prepared: Prepared) -> dict[str, Any]:
    """The stage without a fault and without Ray."""
    store, references = prepared
    return run_stage(two_workers, spec_of(store, references, name="faulty", weights=WEIGHTS, stage=STAGE))


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

    def wait_for(self, text: str) -> None:
        """Until it is in a line, or the run has failed."""
        wait_for(lambda: any(text in line for _, line in self.lines) or self.error)

    def pid_of(self, rank: int) -> int:
        """Of a worker of the last group that Ray told of."""
        told_of = (re.search(rf"pid=(\d+)\) world_rank={rank}\b", line) for _, line in self.lines)
        return [int(found[1]) for found in told_of if found][-1]

    def steps(self) -> list[tuple[float, int]]:
        """When it told of which training step."""
        return [(at, int(line.split()[1].partition("/")[0])) for at, line in self.lines if " lr " in line]

    def first_step_after(self, moment: float) -> float:
        """Seconds from `moment` to the next line that tells of a training step."""
        return next(at - moment for at, _ in self.steps() if at > moment)

    def first_step_of_next_life(self, moment: float) -> float:
        """Seconds from `moment` to the first training step of the workers that began after it."""
        began = next(at for at, line in self.lines if at > moment and ": from step" in line)
        return began - moment + self.first_step_after(began)


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


def drivers(head: RayHead) -> list[psutil.Process]:
    found = psutil.Process(head.pid).children(recursive=True)
    return [p for p in found if "upvla.launch.train" in " ".join(p.cmdline()) and "python" in p.name()]


def test_a_killed_driver_is_followed_by_the_next_attempt(
    ray_head: RayHead, prepared: Prepared, reference: dict[str, Any], s3_server: S3Server, tmp_path: Path
) -> None:
    from upvla.tracking import Tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, "faults")
    store, spec = stage_of(prepared, s3_server.url(), tracking={"uri": uri, "experiment": "faults"})
    first = Running(store, spec, ray_head)
    point = saved_point(store, spec)
    driver = wait_for(lambda: drivers(ray_head))[-1]
    killed = time.monotonic()
    driver.kill()
    with pytest.raises(JobFailed):
        first.join()
    second = Running(store, spec, ray_head)
    result = second.join()
    steps = [step for run in (first, second) for _, step in run.steps()]
    fault = f"driver {driver.pid} killed after step {point.step}"
    cost = {"lost_steps": taken_again(steps), "first_new_step_s": second.first_step_after(killed)}
    told(fault, **cost, **compared(result, reference))
    require_equal(result, reference)
    assert result["resumed_from"] >= point.step
    runs = tracker.client.search_runs([tracker.experiment_id()])
    assert len(runs) == 1
    steps = [p.step for p in tracker.client.get_metric_history(runs[0].info.run_id, "loss/total")]
    assert steps == list(range(1, STEPS + 1)), "one curve, without doubles and gaps"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_worker_killed_at_a_random_step_changes_nothing_under_any_zero_stage(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, s3_server: S3Server, tmp_path: Path, zero_stage: int
) -> None:
    """The seed says who dies, after which resume point, and how many steps later."""
    dice, save_every, steps = random.Random(f"ray {zero_stage}"), 12, 60
    rank, saved, later = dice.randrange(2), save_every * dice.randrange(2, 4), dice.randrange(1, 5)
    # a step takes its time where every one is followed by a validation
    stage = {"steps": steps, "save_every": save_every, "eval_every": 1, "eval_batches": 2}
    changes = {"engine": {"zero_stage": zero_stage}, "stage": stage}
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, **changes)[1])
    store, spec = stage_of(prepared, s3_server.url(), **changes)
    running, points = Running(store, spec, ray_head), store.sub(f"{spec.prefix}/resume")

    def moment_of(step: int) -> float:
        wait_for(lambda: running.error or ((point := latest(points)) and point.step >= step))
        return time.monotonic()

    before = moment_of(saved - save_every)
    time.sleep((moment_of(saved) - before) * later / save_every)
    victim, killed = psutil.Process(running.pid_of(rank)), time.monotonic()
    victim.kill()
    result = running.join()
    lost_steps = taken_again([step for _, step in running.steps()])
    cost = {"lost_steps": lost_steps, "first_new_step_s": running.first_step_of_next_life(killed)}
    fault = f"ZeRO {zero_stage}: worker {rank} killed, {later} steps after the resume point of step {saved} was there"
    told(fault, **cost, resumed_from=result["resumed_from"], **compared(result, reference))
    assert saved <= result["resumed_from"] < steps
    assert 0 <= lost_steps <= save_every
    require_equal(result, reference)


def test_a_worker_that_stalls_and_one_that_runs_out_of_memory_are_replaced(
    ray_head: RayHead, prepared: Prepared, reference: dict[str, Any], tmp_path: Path
) -> None:
    """One is stopped. Of the group after it one gets no more address space: at its next save it cannot go on."""
    engine, slow_steps = {"stall_timeout_s": _STALL_TIMEOUT_S, "max_failures": 3}, {"picture_every": 1}
    store, spec = stage_of(prepared, tmp_path, engine=engine, stage=slow_steps)
    running = Running(store, spec, ray_head)
    saved_point(store, spec)
    stalled = ray_head.training_workers()[-1]
    stopped_at = time.monotonic()
    stalled.suspend()
    running.wait_for("[FailurePolicy] RETRY")
    given_up_s = time.monotonic() - stopped_at
    wait_for(lambda: not is_alive(stalled))  # Ray asks it to end before it makes it
    first = saved_point(store, spec)
    second = wait_for(lambda: (point := saved_point(store, spec)).step > first.step and point)
    starved = ray_head.training_workers()[-1]
    starved_at = time.monotonic()
    starved.rlimit(psutil.RLIMIT_AS, (2**20, 2**20))
    result = running.join()
    steps = [step for _, step in running.steps()]
    faults = (
        f"worker {stalled.pid} stopped, given up {given_up_s:.1f} s later",
        f"worker {starved.pid} starved of memory",
    )
    for fault, moment in zip(faults, (stopped_at, starved_at), strict=True):
        cost = {"lost_steps": taken_again(steps), "first_new_step_s": running.first_step_of_next_life(moment)}
        told(f"{fault} (lost steps: of both)", **cost, **compared(result, reference))
    assert given_up_s < _STALL_TIMEOUT_S + _MARGIN_S
    require_equal(result, reference)
    assert second.step <= result["resumed_from"] < STEPS


def test_failures_with_a_resume_point_between_them_do_not_add_up(
    ray_head: RayHead, prepared: Prepared, reference: dict[str, Any], tmp_path: Path
) -> None:
    """No failure may be repeated, and the run lives through two: each life has come further than the one before."""
    stage = {"picture_every": 1, "save_every": 2}
    store, spec = stage_of(prepared, tmp_path, engine={"max_failures": 0}, stage=stage)
    running, points, last, killed = Running(store, spec, ray_head), store.sub(f"{spec.prefix}/resume"), 0, 0.0
    for number in (1, 2):
        last = wait_for(lambda: (point := latest(points)) and point.step > last and point.step)  # noqa: B023
        killed = time.monotonic()
        ray_head.training_workers()[-1].kill()
        wait_for(lambda: sum("it has come to step" in line for _, line in running.lines) == number)  # noqa: B023
    result = running.join()
    steps = [step for _, step in running.steps()]
    cost = {"lost_steps": taken_again(steps), "first_new_step_s": running.first_step_of_next_life(killed)}
    told("a worker killed twice (lost steps: of both)", **cost, **compared(result, reference))
    require_equal(result, reference)


def test_an_operator_stops_a_run_and_of_two_drivers_that_go_on_one_works(
    ray_head: RayHead, prepared: Prepared, reference: dict[str, Any], tmp_path: Path
) -> None:
    store, spec = stage_of(prepared, tmp_path)
    place = store.sub(spec.prefix)
    running = Running(store, spec, ray_head)
    running.wait_for("Attempting to start training worker group")  # seconds before its steps, which last a few too
    jobs = Jobs(ray_head.jobs_url)
    (ours,) = (job for job in jobs.running() if job.startswith(f"{spec.stage.name}-{spec.key}-"))
    with pytest.raises(NotFound, match=rf"no training stage runs as vq-0-1; what trains now: .*{ours}"):
        stop_training(store, jobs, "vq-0-1")
    assert stop_training(store, jobs, ours) == [ours]
    with pytest.raises(JobFailed, match=r"stopped after step \d+ as asked; start it again to go on"):
        running.join()
    point = saved_point(store, spec)
    assert 0 < point.step < STEPS

    command = [sys.executable, "-m", "upvla.launch.train", f"{place.url}/{SPEC}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], said
    refused = said[codes.index(1)]
    assert "upvla: already_owned: training runs/" in refused
    assert "is already owned by process" in refused
    assert not place.exists(FAILURE)
    result = dict(place.read_json(RESULT))
    lost_steps = point.step - result["resumed_from"]
    fault = f"stopped after step {point.step}, then two drivers at once, of which one was refused"
    told(fault, lost_steps=lost_steps, **compared(result, reference))
    assert lost_steps == 0
    require_equal(result, reference)


def test_a_node_that_is_taken_away_costs_no_step(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, s3_server: S3Server, tmp_path: Path
) -> None:
    """Workers run on a node beside the head's; it is drained as a cloud would do it, and they go on elsewhere.

    Only that node has four CPUs a worker; they keep as many threads where they have one.
    """
    engine, stage = {"threads": 4}, {"save_every": 1000, "picture_every": 1}
    reference = run_stage(two_workers, stage_of(prepared, tmp_path, engine=engine, stage=stage)[1])
    store, spec = stage_of(prepared, s3_server.url(), engine=engine, stage=stage)
    with ray_node(ray_head, num_cpus=8) as node:
        running = Running(store, spec, ray_head)
        running.wait_for("Started training worker group")
        drained = time.monotonic()
        node.drain(deadline_s=120)
        result = running.join()
    resumed_from = result["resumed_from"]
    assert any("the workers left (preempted" in line for _, line in running.lines)
    again = next(at for at, line in running.lines if f"from step {resumed_from} of" in line)
    # each line comes twice: two nodes of one machine both read its workers' logs
    before = {step for at, step in running.steps() if at < again}
    after = {step for at, step in running.steps() if at >= again}
    cost = {"lost_steps": len(before & after), "first_new_step_s": running.first_step_after(again) + again - drained}
    told("node drained; elsewhere", **cost, **compared(result, reference))
    assert before == set(range(1, resumed_from + 1)), "not one step was lost"
    assert after == set(range(resumed_from + 1, STEPS + 1)), "none was taken twice"
    require_equal(result, reference)


def test_a_number_of_workers_that_does_not_fit_leaves_and_a_smaller_one_is_asked_for(
    ray_head: RayHead, prepared: Prepared, one_worker: Workers, tmp_path: Path
) -> None:
    """There is room for two, and an order of one lane is one worker's."""
    store, spec = stage_of(prepared, tmp_path, engine={"num_workers": (1, 4)})
    spec = spec.model_copy(update=plans_of(store, lanes=1))
    alone = stage_of(prepared, tmp_path / "alone", engine={"num_workers": 1})[1]
    reference = run_stage(one_worker, alone.model_copy(update=plans_of(open_store(alone.store_url), lanes=1)))
    running = Running(store, spec, ray_head)
    result = running.join()
    assert [line for _, line in running.lines if "the workers left" in line] == [
        "faulty: the workers left (resize) and are asked for again"
    ]
    assert saved_point(store, spec).world_size == 1
    for objective, losses in reference["losses"].items():
        assert result["losses"][objective]["last"] == pytest.approx(losses["last"], rel=1e-5)
