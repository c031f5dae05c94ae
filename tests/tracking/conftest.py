from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import free_ports


class Server(NamedTuple):
    uri: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(self.log.read_text()[-2000:])


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server that also keeps artifacts. It needs half a minute to start, and is not waited for here."""
    (port,), folder = free_ports(1), tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
    yield Server(f"http://127.0.0.1:{port}", process, folder / "log")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
