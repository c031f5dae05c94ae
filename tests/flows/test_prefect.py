"""Against a real Prefect server, with the stack's own settings: deploying, the trainer's one slot, lost runs, restarts.

Prefect reads its settings once a process, so what speaks to this server is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, free_ports
from tests.faults.rows import told
from upvla import stack
from upvla.stack import Ports, StackConfig, processes
from upvla.stack.servers import WORK_POOL, parts, server_environment

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 300
HEAD = """
import json, sys, time
from pathlib import Path
from prefect import flow
from prefect.client.orchestration import get_client
from flows import steps
from upvla.launch.steps import once
from upvla.store import open_store

class Anything:
    def progress(self, share, text): ...
"""


class Prefect:
    """The server of a stack, alone: its command, its settings, a port of its own."""

    def __init__(self, home: Path) -> None:
        self.config = StackConfig(home=home, ports=Ports(prefect=free_ports(1)[0]))
        self.config.home.mkdir()
        stack.prepare(self.config)
        (self._part,) = [part for part in parts(self.config) if part.name == "prefect"]
        quick = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S"}
        self.environment = server_environment(self.config) | quick | {"PYTHONPATH": str(ROOT)}

    def start(self) -> None:
        processes.start(self.config.home, "prefect", self._part.command, self.environment, self._part.log)
        wait(self._answers)

    def _answers(self) -> bool:
        found = processes.main_process(self.config.home, "prefect", self._part.command)
        assert found is not None, self._part.log.read_text()[-2000:]
        return self._part.answers(found)

    def kill(self) -> None:
        """As a power cut does."""
        for process in processes.marked(self.config.home):
            process.kill()
        psutil.wait_procs(processes.marked(self.config.home), 60)

    def begin(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        command, piped = [sys.executable, "-c", code, *arguments], subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=piped, stderr=piped, text=True)

    def run(self, code: str, *arguments: str) -> Any:
        """What `code` prints after SAYS, as JSON."""
        return said(self.begin(code, *arguments))


def said(process: subprocess.Popen[str]) -> Any:
    try:
        out, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, out[-2000:] + errors[-4000:]
    return json.loads(out.rpartition("SAYS ")[2].splitlines()[0])


def wait(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    server = Prefect(tmp_path_factory.mktemp("prefect") / "home")
    try:
        server.start()
        yield server
    finally:
        server.kill()
        stack.down(server.config)  # the link that stands for Ray's folder


@pytest.fixture(scope="module")
def deployed(prefect: Prefect) -> Prefect:
    create = [sys.executable, "-m", "prefect", "work-pool", "create", WORK_POOL, "--type", "process"]
    subprocess.run(create, env=prefect.environment, check=True, capture_output=True, timeout=PATIENCE_S, cwd=ROOT)
    assert prefect.run("import flows.deploy; print('SAYS', flows.deploy.main())") == 0
    return prefect


def test_deploying_again_changes_nothing(deployed: Prefect) -> None:
    listing = f"""{HEAD}
import flows.deploy
assert flows.deploy.main() == 0
with get_client(sync_client=True) as client:
    named = {{flow.id: flow.name for flow in client.read_flows()}}
    deployments = sorted(f"{{named[d.flow_id]}}/{{d.name}}" for d in client.read_deployments())
    automations = [(a.name, a.enabled) for a in client.read_automations_by_name(flows.deploy.ZOMBIES)]
    print("SAYS", json.dumps([deployments, automations, client.read_global_concurrency_limit_by_name("trainer").limit]))
"""
    deployments, automations, limit = deployed.run(listing)
    assert deployments == [
        "evaluate/chains", "finetune/nightly", "ingest/playtable", "ingest/watch", "mix/default", "pretrain/full",
    ]  # fmt: skip
    assert automations == [["upvla: a flow run whose process is gone", True]] and limit == 1


def test_a_lost_nightly_is_crashed_and_the_next_one_runs(deployed: Prefect) -> None:
    """A run that ended is left alone; the one that waited for the lost one's place gets it."""
    code = f"""{HEAD}
from flows.deploy import SILENCE_S, ensure_zombie_automation
from prefect.events import emit_event
from prefect.states import Completed, Pending, Running
assert 60 <= SILENCE_S <= 600  # what is deployed; here it is shorter
ensure_zombie_automation(silence_s=12)

def alive(run):
    emit_event("prefect.flow-run.heartbeat", resource={{"prefect.resource.id": f"prefect.flow-run.{{run.id}}"}})

@flow
def nothing(): ...

with get_client(sync_client=True) as client:
    nightly = client.read_deployment_by_name("finetune/nightly").id
    lost, waits = (client.create_flow_run_from_deployment(nightly) for _ in range(2))
    ended = client.create_flow_run(nothing)
    client.set_flow_run_state(ended.id, Running(), force=True)
    for state in (Pending(), Running()):
        assert client.set_flow_run_state(lost.id, state).status.value == "ACCEPT"
    first = client.set_flow_run_state(waits.id, Pending())
    for _ in range(5):
        alive(lost), alive(ended)
        time.sleep(1)
    client.set_flow_run_state(ended.id, Completed(), force=True)
    while (state := client.read_flow_run(lost.id).state).type.value != "CRASHED":
        time.sleep(0.5)
    second = client.set_flow_run_state(waits.id, Pending())
    told = [state.message, first.state.name, second.status.value, client.read_flow_run(ended.id).state.type.value]
    client.set_flow_run_state(waits.id, Completed(), force=True)
    print("SAYS", json.dumps(told))
"""
    message, first, second, ended = deployed.run(code)
    assert message.startswith("no sign of life")
    assert (first, second, ended) == ("AwaitingConcurrencySlot", "ACCEPT", "COMPLETED")


def test_a_killed_process_is_crashed_because_its_heartbeats_end(prefect: Prefect) -> None:
    """Those that Prefect's engine sends by itself, the first as the flow run begins."""
    code = f"""{HEAD}
from flows.deploy import ensure_zombie_automation
from prefect.runtime import flow_run
ensure_zombie_automation(silence_s=12)

@flow(name="lost")
def lost():
    time.sleep(3)
    print("SAYS", json.dumps(str(flow_run.id)), flush=True)
    time.sleep(600)

lost()
"""
    process = prefect.begin(code)
    assert process.stdout is not None
    run_id = json.loads(next(line for line in process.stdout if line.startswith("SAYS ")).removeprefix("SAYS "))
    process.kill()
    process.communicate()
    ended = f"""{HEAD}
from flows.deploy import ensure_zombie_automation
with get_client(sync_client=True) as client:
    while (state := client.read_flow_run(sys.argv[1]).state).type.value == "RUNNING":
        time.sleep(0.5)
ensure_zombie_automation()  # other tests' runs are silent for longer
print("SAYS", json.dumps([state.type.value, state.message]))
"""
    kind, message = prefect.run(ended, run_id)
    assert kind == "CRASHED" and message.startswith("no sign of life")


@pytest.mark.parametrize("trains", [True, False])
def test_one_flow_run_in_two_processes_does_the_work_once(prefect: Prefect, tmp_path: Path, trains: bool) -> None:
    """As after a pod's restart: a trainer waits for the slot, others for the step. What is kept of a run is JSON."""
    script = tmp_path / "twice.py"
    script.write_text(f"""{HEAD}
@steps._stage("probe", trains={trains})
def probe(line, url):
    def work():
        began = time.time()
        time.sleep(3)
        Path(url, f"done-{{began}}").touch()
        return {{"began": began, "ended": time.time()}}
    return once(open_store(url), "probe", {{"same": True}}, work, in_turn={not trains})

@flow(name="twice", **steps.RESULTS)
def twice(url: str):
    return probe(Anything(), url)
""")
    made = f"""{HEAD}
sys.path.insert(0, {str(tmp_path)!r})
from twice import twice
with get_client(sync_client=True) as client:
    print("SAYS", json.dumps(str(client.create_flow_run(twice, parameters={{"url": {str(tmp_path)!r}}}).id)))
"""
    run_id = prefect.run(made)
    again = prefect.environment | {"PREFECT__FLOW_RUN_ID": run_id}
    command = [sys.executable, "-m", "prefect.flow_engine", f"{script}:twice"]
    running = [subprocess.Popen(command, env=again, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=PATIENCE_S)[1] for process in running]
    assert 0 in [process.returncode for process in running], errors
    works = len(list(tmp_path.glob("done-*")))
    stage = "trains" if trains else "does not train"
    told(f"one flow run in two processes at once; its stage {stage}", lost_steps=0, times_done=works)
    assert works == 1
    state = f"""{HEAD}
with get_client(sync_client=True) as client:
    print("SAYS", json.dumps(client.read_flow_run(sys.argv[1]).state_name))
"""
    assert prefect.run(state, run_id) == "Completed"
    kept = [path for path in (prefect.config.home / "prefect/results").rglob("*") if path.is_file()]
    assert kept and all(json.loads(path.read_bytes()) for path in kept)


def test_what_may_pass_is_tried_again_and_what_is_wrong_is_not(prefect: Prefect) -> None:
    code = f"""{HEAD}
import httpx
from upvla.errors import ConfigError, StoreError
steps._RETRY_S = (0, 0)
tried = {{}}

def stage(name, error, times):
    @steps._stage(name)
    def work(line):
        tried[name] = tried.get(name, 0) + 1
        if tried[name] <= times:
            raise error
        return {{"done": name}}
    return work

away, refused = stage("away", StoreError("503"), 2), stage("refused", httpx.ConnectError("no"), 1)
wrong = stage("wrong", ConfigError("x"), 1)

@flow
def tries():
    return [away(Anything()), refused(Anything()), wrong(Anything(), return_state=True).type.value]

print("SAYS", json.dumps([tries(), tried]))
"""
    (away, refused, wrong), tried = prefect.run(code)
    assert (away, refused, wrong) == ({"done": "away"}, {"done": "refused"}, "FAILED")
    assert tried == {"away": 3, "refused": 2, "wrong": 1}


def test_stages_show_data_scores_progress_and_where_to_look(prefect: Prefect, tmp_path: Path) -> None:
    """Through the stages as the flows call them; what is evaluated was evaluated before."""
    code = f"""{HEAD}
from dataclasses import replace
from tests.rollout.test_policy import make_bundle
from tests.toy_line import JUDGED, record
from upvla.checkpoint import export
from upvla.config import RunConfig, SiteConfig, load
from upvla.launch.pretrain import Pretraining

home = Path(sys.argv[1])
site = SiteConfig(home=home, store_url=f"{{home}}/store", tracking_url=f"sqlite:///{{home}}/mlflow.db", experiment="t")
mine = ("data.ingest.dataset=mine", "data.ingest.options.span_end=exclusive")
line = Pretraining(site, load("pretrain/ci", RunConfig, [*JUDGED, *mine]))
line.logbook.tracker.client.create_experiment("t", artifact_location=f"{{home}}/artifacts")
raw = str(record(home, "raw", (20, 24, 18)))
meta = {{"run": "first", "step": 7, "stage": "stage2", "datasets": {{}}}}
url = export(line.store, "models/first/stage2", replace(make_bundle(), meta=meta)).url
scored = {{
    "model_id": "m", "protocols": {{"mine_d": "p"}},
    "scores": {{line.model_name: {{"mine_d/avg_len": {{"value": 1.5, "low": 1.2, "high": 1.8}}}}}},
}}
once(line.store, "evaluate", {{"key": line.evaluation_key(url)}}, lambda: scored)

@flow(name="shows")
def shows():
    steps.ingest(line, {{"source_url": raw}})
    steps.register(line, {{"url": url}}, steps.evaluate(line, {{"url": url}}))

shows()
with get_client(sync_client=True) as client:
    shown = client.read_artifacts()
run_id = line.logbook.tracker.run_id("first/stage2", "stage2")
print("SAYS", json.dumps([run_id, [[each.type, each.key, each.description, each.data] for each in shown]]))
"""
    run_id, shown = prefect.run(code, str(tmp_path))
    pages = {key: data for kind, key, _, data in shown if kind == "markdown" and key}
    assert "data:image/jpeg;base64," in pages["data-report"] and "| recordings | 3 (" in pages["data-report"]
    assert "| mine_d/avg_len | 1.50 (1.20 to 1.80) |" in pages["evaluate"]
    bars = {said: data for kind, _, said, data in shown if kind == "progress"}
    assert bars["ingest: done"] == bars["register: done"] == 100
    for name, address in (
        ("MLflow run", f"runs/{run_id}"),
        ("Rollout videos", f"runs/{run_id}/artifacts/rollouts"),
        ("upvla-tiny version 1", "/#/models/upvla-tiny/versions/1"),
    ):
        assert [data for _, _, said, data in shown if said == name and address in str(data)], name


def test_a_server_that_is_killed_ends_no_training_and_keeps_no_slot(prefect: Prefect, tmp_path: Path) -> None:
    code = f"""{HEAD}
here = Path(sys.argv[1])

@steps._stage("probe", trains=True)
def train(line):
    (here / "began").touch()
    while not (here / "go").exists():
        line.progress(0.5, "still at it")
        time.sleep(0.2)
    return {{"trained": True}}

@flow(name="outlives", **steps.RESULTS)
def outlives():
    return train(Anything())

print("SAYS", json.dumps(outlives()))
"""
    slots = f"""{HEAD}
with get_client(sync_client=True) as client:
    print("SAYS", client.read_global_concurrency_limit_by_name("trainer").active_slots)
"""
    training = prefect.begin(code, str(tmp_path))
    wait(lambda: (tmp_path / "began").exists() or training.poll() is not None)
    assert prefect.run(slots) == 1
    prefect.kill()
    time.sleep(8)  # longer than between two updates of the progress bar
    assert training.poll() is None
    prefect.start()
    (tmp_path / "go").touch()
    assert said(training) == {"trained": True}
    assert prefect.run(slots) == 0
