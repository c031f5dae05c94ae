from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.conftest import ROOT, free_ports
from tests.train.conftest import two_workers  # noqa: F401  (a fixture)


class RayHead(NamedTuple):
    """A running Ray head with its job server; its environment is also this process's."""

    jobs_url: str
    pid: int
    address: str

    def training_workers(self) -> list[psutil.Process]:
        return training_workers(self.pid)


class RayNode(NamedTuple):
    """A node that joined a head."""

    pid: int
    node_id: str
    address: str

    def training_workers(self) -> list[psutil.Process]:
        return training_workers(self.pid)

    def drain(self, deadline_s: int) -> None:
        """As a cloud does with a spot machine: no new work, and an end in `deadline_s`."""
        command = [*RAY, "drain-node", f"--address={self.address}", f"--node-id={self.node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=reclaimed"]
        subprocess.run([*command, f"--deadline-remaining-seconds={deadline_s}"], check=True, timeout=240)


RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def training_workers(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


@contextlib.contextmanager
def ray_node(head: RayHead, *, num_cpus: int) -> Iterator[RayNode]:
    """A second node of this machine under `head`, for as long as the block lasts."""
    folder = Path(tempfile.mkdtemp(prefix="rayn-", dir="/tmp"))
    marker = f"node-{folder.name}"
    command = [*RAY, "start", f"--address={head.address}", "--block", f"--num-cpus={num_cpus}"]
    command += [f"--resources={json.dumps({marker: 1})}", "--object-store-memory=100000000", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    with (folder / "node.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        yield RayNode(process.pid, _node_id(head, marker, process), head.address)
    finally:
        kill_all(process)
        shutil.rmtree(folder, ignore_errors=True)


def _node_id(head: RayHead, marker: str, process: subprocess.Popen[bytes]) -> str:
    """Of the node that has `marker` among its resources, as soon as the head knows it."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with urllib.request.urlopen(f"{head.jobs_url}/api/v0/nodes?detail=1", timeout=60) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        if found := [node for node in nodes if marker in node["resources_total"] and node["state"] == "ALIVE"]:
            return str(found[0]["node_id"])
        time.sleep(0.2)
    raise RuntimeError("the second Ray node did not come up")


def kill_all(process: subprocess.Popen[bytes]) -> None:
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:  # Ray would drain for half a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A Ray head of our own with two CPUs."""
    with started_head() as head:
        yield head


@contextlib.contextmanager
def started_head() -> Iterator[RayHead]:
    """Its jobs find this process's environment as it is now."""
    port, client, dashboard = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Unix sockets lie below it
    env = {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "disabled",  # Ray reads it once a process, and other tests may have imported Ray before
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    command = [*RAY, "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--include-dashboard=true", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        _wait(f"http://127.0.0.1:{dashboard}", process, log)
        yield RayHead(f"http://127.0.0.1:{dashboard}", process.pid, env["RAY_ADDRESS"])
    finally:
        kill_all(process)
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from upvla.errors import StackError
    from upvla.launch.jobs import Jobs

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            Jobs(url).cancel("nothing")
            return
        except StackError:
            time.sleep(0.3)
    raise RuntimeError(f"Ray did not come up; its log ends:\n{log.read_text()[-3000:]}")
