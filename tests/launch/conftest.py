from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
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

    def training_workers(self) -> list[psutil.Process]:
        found = psutil.Process(self.pid).children(recursive=True)
        return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A Ray head of our own with two CPUs."""
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
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--include-dashboard=true", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        _wait(f"http://127.0.0.1:{dashboard}", process, log)
        yield RayHead(f"http://127.0.0.1:{dashboard}", process.pid)
    finally:
        everything = [*psutil.Process(process.pid).children(recursive=True), process]
        for each in everything:  # Ray would drain for half a minute
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from upvla.errors import StackError
    from upvla.launch.jobs import Jobs

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            Jobs(url).cancel("nothing")
            return
        except StackError:
            time.sleep(0.3)
    raise RuntimeError(f"Ray did not come up; its log ends:\n{log.read_text()[-3000:]}")
