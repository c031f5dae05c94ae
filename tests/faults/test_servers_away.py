"""MLflow, or Prefect's server and its flow run, are gone while a stage trains: it goes on, and nothing comes twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.deploy import TRAINER
from tests.conftest import ROOT, free_ports
from tests.faults.proxy import FaultProxy
from tests.faults.rows import compared, told
from tests.launch.conftest import RayHead
from tests.launch.running import saved_point, wait_for
from tests.launch.stages import model, prepared, run_stage, spec_of
from tests.tracking.conftest import Server, server
from tests.train.toy import Workers
from upvla.config import RunConfig, SiteConfig, load
from upvla.launch.jobs import Jobs
from upvla.launch.logbook import Logbook
from upvla.launch.train import RESULT, SPEC, UNSENT
from upvla.launch.worker import work
from upvla.store import Store
from upvla.train.resume import latest

__all__ = ["model", "prepared", "server"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.timeout(900)]

STEPS, WEIGHTS = 24, {"act": 1.0}
Prepared = tuple[Store, dict[str, Any]]


def work_with_short_pauses(settings: dict[str, Any]) -> None:
    """The worker's own body; an MLflow that was away is asked again after half a second."""
    from upvla.tracking import runs

    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    runs._RETRY_S = 0.5
    work(settings)


@pytest.fixture(scope="module")
def calm(two_workers: Workers, prepared: Prepared) -> dict[str, Any]:
    """The stage's result when every server is there."""
    store, references = prepared
    return run_stage(two_workers, spec_of(store, references, name="calm", weights=WEIGHTS, stage={"steps": STEPS}))


@pytest.mark.parametrize("fault", ["reset before", "500", "slow body"])
def test_what_mlflow_missed_is_sent_once_when_it_is_back(
    two_workers: Workers, prepared: Prepared, calm: dict[str, Any], server: Server, fault: str
) -> None:
    from upvla.tracking import Tracker

    store, references = prepared
    stage = {"steps": STEPS}
    server.wait_healthy()
    experiment = f"away-{fault.replace(' ', '-')}"
    with FaultProxy(server.uri, rate=1.0, faults=(fault,)) as proxy:
        tracking = {"uri": proxy.url, "experiment": experiment}
        spec = spec_of(store, references, name=experiment, weights=WEIGHTS, stage=stage, tracking=tracking)
        points = store.sub(f"{spec.prefix}/resume")

        def come_back() -> None:
            wait_for(lambda: (point := latest(points)) is not None and point.step >= 6)
            proxy.rate = 0.0

        back = threading.Thread(target=come_back)
        back.start()
        two_workers.run(work_with_short_pauses, {"spec": spec.model_dump_json(), "threads": 1})
        back.join()
    assert proxy.seen[fault] > 0 and proxy.seen["well"] > 0
    result = store.sub(spec.prefix).read_json(RESULT)
    equal = compared(result, calm)
    assert result["resumed_from"] == 0, "nothing was taken twice"
    told(f"MLflow away ({fault}) until step 6 was saved", lost_steps=0, **equal)
    assert equal["bit_identical"]
    tracker = Tracker(server.uri, experiment)
    (run,) = tracker.client.search_runs([tracker.experiment_id()])
    assert run.info.status == "FINISHED"
    for name, steps in (("loss/total", range(1, STEPS + 1)), ("val_loss/act", range(0, STEPS + 1, 4))):
        found = [point.step for point in tracker.client.get_metric_history(run.info.run_id, name)]
        assert found == list(steps), f"{name}: every point once, none left out"


def test_what_mlflow_missed_to_the_end_of_a_stage_is_sent_by_whoever_goes_on(
    two_workers: Workers, prepared: Prepared, server: Server
) -> None:
    """The run is made then, with all that a stage tells of itself; once more changes nothing."""
    store, references = prepared
    server.wait_healthy()
    site, notes = SiteConfig(tracking_url=server.uri, experiment="late"), list[str]()
    logbook = Logbook(site, load("pretrain/ci", RunConfig), "toy", notes.append)
    with FaultProxy(server.uri, rate=1.0, faults=("reset before",)) as proxy:
        tracking = {"uri": proxy.url, "experiment": "late", "tags": {"datasets": "toy@1"}}
        spec = spec_of(store, references, name="late", weights=WEIGHTS, stage={"steps": STEPS}, tracking=tracking)
        place = store.sub(spec.prefix)
        two_workers.run(work_with_short_pauses, {"spec": spec.model_dump_json(), "threads": 1})
    assert place.exists(RESULT) and place.exists(UNSENT)
    tracker = logbook.tracker
    for _ in range(2):
        logbook.send_late(place)
        assert not place.exists(UNSENT) and not notes
        (run,) = tracker.client.search_runs([tracker.experiment_id()])
        assert (run.info.status, run.data.tags["datasets"]) == ("FINISHED", "toy@1")
        assert run.data.params["stage.steps"] == str(STEPS)
        found = [point.step for point in tracker.client.get_metric_history(run.info.run_id, "loss/total")]
        assert found == list(range(1, STEPS + 1))


class PrefectServer:
    """A real server on a database of its own, which outlives it."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self._url, self._folder = f"http://127.0.0.1:{port}/api", folder
        self._command = [sys.executable, "-m", "prefect", "server", "start", "--host=127.0.0.1", f"--port={port}"]
        own = {"PREFECT_HOME": str(folder), "PREFECT_API_URL": self._url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        own["PREFECT_SERVER_UI_STATIC_DIRECTORY"] = str(folder / "ui")
        # on disk, as the stack's: a server that forgot who holds the trainer's slot would count him for ever
        own["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = "prefect.server.concurrency.lease_storage.filesystem"
        self.env = os.environ | own
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._is_ready)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def allow_two_trainers(self) -> None:
        """As an administrator may. One that was killed keeps its slot for two minutes, for which nobody waits here."""
        body, kind = json.dumps({"name": TRAINER, "limit": 2}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/v2/concurrency_limits/", body, kind)
        urllib.request.urlopen(request, timeout=60).close()

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False


@pytest.fixture
def prefect_server(tmp_path: Path) -> Iterator[PrefectServer]:
    (tmp_path / "prefect").mkdir()
    made = PrefectServer(tmp_path / "prefect")
    made.start()
    yield made
    made.kill()


@pytest.mark.slow
def test_training_goes_on_without_prefect_and_the_next_flow_run_attaches_to_it(
    ray_head: RayHead, prepared: Prepared, calm: dict[str, Any], prefect_server: PrefectServer, tmp_path: Path
) -> None:
    """The first flow run is killed, and the server with it. The second comes while it still trains."""
    store, references = prepared
    spec = spec_of(store, references, name="orphaned", weights=WEIGHTS, stage={"steps": STEPS})
    place, log = store.sub(spec.prefix), tmp_path / "second.log"
    place.write_json(SPEC, spec.model_dump(mode="json"))
    prefect_server.allow_two_trainers()
    command = [sys.executable, "-m", "tests.faults.one_stage", f"{place.url}/{SPEC}", ray_head.jobs_url]
    flow_runs = [subprocess.Popen(command, cwd=ROOT, env=prefect_server.env)]
    try:
        point = saved_point(store, spec)
        flow_runs[0].kill()
        prefect_server.kill()
        killed = time.monotonic()
        later = wait_for(lambda: (newest := saved_point(store, spec)).step > point.step and newest)
        took = time.monotonic() - killed
        with held(ray_head.training_workers()[-1]):  # so that it still trains when the second comes
            prefect_server.start()
            with log.open("wb") as output:
                second = subprocess.Popen(command, cwd=ROOT, env=prefect_server.env, stdout=output, stderr=output)
            flow_runs.append(second)
            wait_for(lambda: "orphaned: from step 0 of" in log.read_text() or second.poll() is not None)
            assert second.poll() is None and not place.exists(RESULT), log.read_text()
            ours = [job for job in Jobs(ray_head.jobs_url).running() if spec.key in job]
            assert ours == [f"orphaned-{spec.key}-1"], "the second follows the job of the first"
        assert second.wait(400) == 0, log.read_text()
    finally:
        for each in flow_runs:
            each.kill()
            each.wait()
    result = place.read_json(RESULT)
    fault = f"flow run and Prefect server killed after step {point.step}; step {later.step} was saved without them"
    equal = compared(result, calm)
    assert result["resumed_from"] == 0, "nothing was taken twice"
    told(fault, lost_steps=0, first_new_step_s=took, **equal)
    assert equal["bit_identical"]
    assert len(place.list("owner-")) == 1, "nobody trained this a second time"


@contextlib.contextmanager
def held(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()
