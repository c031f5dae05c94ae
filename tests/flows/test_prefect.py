"""Against a real Prefect server: deploying, the trainer's one slot, lost runs, results that are no pickles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_ports

pytestmark = [pytest.mark.seam, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    (port,), folder = free_ports(1), tmp_path_factory.mktemp("prefect")
    made = {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "results"),
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
        server = subprocess.Popen(command, env=made, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api/ready") or server.poll() is not None, 240)
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        yield made
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def wait(happened: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.3)


def run(environment: dict[str, str], code: str) -> str:
    """Prefect reads its settings once a process, so each of these is one."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_deploying_again_changes_nothing(environment: dict[str, str]) -> None:
    made = "prefect work-pool create local --type process --overwrite"
    subprocess.run([sys.executable, "-m", *made.split()], env=environment, check=True, capture_output=True, timeout=120)
    listing = """
from prefect.automations import Automation
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    flows = {flow.id: flow.name for flow in client.read_flows()}
    print(sorted(f"{flows[d.flow_id]}/{d.name}" for d in client.read_deployments()))
    print([(a.name, a.enabled) for a in client.read_automations_by_name("upvla: a flow run whose process is gone")])
    print(client.read_global_concurrency_limit_by_name("trainer").limit)
"""
    for _ in range(2):
        assert "deployed" in run(environment, "import sys, flows.deploy; sys.exit(flows.deploy.main())")
        lines = run(environment, listing).splitlines()
        assert "ingest/watch" in lines[0] and "finetune/nightly" in lines[0]
        assert lines[1:] == ["[('upvla: a flow run whose process is gone', True)]", "1"]


def test_a_lost_flow_run_is_crashed_and_one_that_ended_is_not(environment: dict[str, str]) -> None:
    assert timedelta(seconds=300) <= timedelta(minutes=10)  # what is deployed; here it is ten seconds
    names = {state: f"{state}-{uuid.uuid4().hex[:6]}" for state in ("lost", "ended")}
    code = f"""
import time
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.states import Completed, Running
from flows.deploy import ensure_zombie_automation
ensure_zombie_automation(silence_s=10)

@flow
def nothing(): pass

with get_client(sync_client=True) as client:
    runs = {{name: client.create_flow_run(nothing, name=name) for name in {list(names.values())!r}}}
    for run in runs.values():
        client.set_flow_run_state(run.id, Running(), force=True)
    time.sleep(3)
    for run in runs.values():
        emit_event("prefect.flow-run.heartbeat", resource={{"prefect.resource.id": f"prefect.flow-run.{{run.id}}"}})
    time.sleep(2)
    client.set_flow_run_state(runs[{names["ended"]!r}].id, Completed(), force=True)
    lost = runs[{names["lost"]!r}].id
    deadline = time.monotonic() + 90
    while (state := client.read_flow_run(lost).state).type.value != "CRASHED" and time.monotonic() < deadline:
        time.sleep(1)
    print(state.type.value, state.message)
    print(client.read_flow_run(runs[{names["ended"]!r}].id).state.type.value)
"""
    lost, ended = run(environment, code).splitlines()[-2:]
    assert lost.startswith("CRASHED no sign of life") and ended == "COMPLETED"


def test_trainers_take_turns_and_results_are_json(environment: dict[str, str], tmp_path: Path) -> None:
    code = """
import json, sys, time
from prefect import flow
from flows import steps

@flow(name="turns", **steps.RESULTS)
def turns():
    with steps._trainer():
        began = time.time()
        time.sleep(3)
        return {"began": began, "ended": time.time()}

if __name__ == "__main__":
    print("TURN", json.dumps(turns()))
"""
    script = tmp_path / "turns.py"
    script.write_text(code)
    running = [
        subprocess.Popen([sys.executable, str(script)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    spoken = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    import json

    one, other = sorted(
        (json.loads(text.rpartition("TURN ")[2].splitlines()[0]) for text in spoken), key=lambda turn: turn["began"]
    )
    assert one["ended"] <= other["began"]
    kept = [path for path in Path(environment["PREFECT_RESULTS_LOCAL_STORAGE_PATH"]).rglob("*") if path.is_file()]
    assert kept and all(json.loads(path.read_bytes()) for path in kept)
