"""Training across two hosts with addresses of their own, of which one is cut off. They are network namespaces here.

    apt-get install iproute2; pytest tests/faults/test_two_hosts.py -s

The store is a folder that both can reach, as a cluster's file system would be.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.faults.rows import compared, taken_again, told
from tests.launch.conftest import RAY
from tests.launch.running import SLOW, STEPS, Prepared, stage_of, wait_for
from tests.launch.stages import model, prepared, run_stage
from tests.train.toy import Workers
from upvla.launch.train import RESULT, SPEC, TrainSpec
from upvla.store import Store
from upvla.train.resume import latest

__all__ = ["model", "prepared"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = str(ROOT / "infra" / "two_hosts.sh")
NOT_ALLOWED = 69
GCS = "10.213.77.2:6379"
_STEP = re.compile(r"faulty +(\d+)/\d+ .* lr ")


class Hosts:
    """Two Ray nodes of one CPU each, on hosts `a` (the head) and `b`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "UPVLA_HOSTS": f"upvla{secrets.token_hex(2)}",
            "RAY_ADDRESS": GCS,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_health_check_period_ms": "1000",  # a node that has gone is known as such before its worker is missed
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "2",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
        }

    def tell(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SCRIPT, *words], env=self.env, capture_output=True, text=True, timeout=120, check=False)

    def begin(self, host: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([SCRIPT, "run", host, *command], env=self.env, cwd=ROOT, text=True, **options)

    def node(self, host: str, address: str, *options: str) -> None:
        """Start one that lasts until the hosts are removed."""
        log = (self.folder / f"{host}.log").open("w")
        (self.folder / host).mkdir()
        command = [*RAY, "start", "--block", f"--node-ip-address={address}", "--num-cpus=1", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--temp-dir={self.folder / host}", *options]
        process = self.begin(host, *command, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: "Ray runtime started" in self._log(host) or process.poll() is not None)
        assert process.poll() is None, self._log(host)

    def _log(self, host: str) -> str:
        return (self.folder / f"{host}.log").read_text()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts(Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp")))  # short: Unix sockets lie below it
    try:
        up = made.tell("up")
        if up.returncode == NOT_ALLOWED:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        made.node("a", "10.213.77.2", "--head", "--port=6379", "--include-dashboard=false")
        made.node("b", "10.213.77.3", f"--address={GCS}")
        yield made
    finally:
        made.tell("down")
        shutil.rmtree(made.folder, ignore_errors=True)


class Driver:
    """A driver on host `a`, and the steps that it has told of, by when they came."""

    def __init__(self, hosts: Hosts, store: Store, spec: TrainSpec) -> None:
        self._place = store.sub(spec.prefix)
        self._place.write_json(SPEC, spec.model_dump(mode="json"))
        command = [sys.executable, "-m", "upvla.launch.driver", f"{self._place.url}/{SPEC}"]
        self._process = hosts.begin("a", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.steps: list[tuple[float, int]] = []
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="")
            self.said += line
            if found := _STEP.search(line):
                self.steps.append((time.monotonic(), int(found[1])))

    def result(self) -> dict[str, Any]:
        try:
            assert self._process.wait(700) == 0, self.said[-3000:]
        finally:
            self._process.kill()
        self._reader.join(10)
        return dict(self._place.read_json(RESULT))


def test_two_hosts_train_what_one_would_and_when_one_is_cut_off_the_other_goes_on_from_the_last_resume_point(
    hosts: Hosts, prepared: Prepared, two_workers: Workers, tmp_path: Path
) -> None:
    """What the two held out after every step tells whether they train what two workers on one host do, bit for bit.

    Ray's node on the host that was cut off gives up after a while, as it should: no other test follows on these hosts.
    """
    engine = {"num_workers": (1, 2), "stall_timeout_s": 15, "max_failures": 5}
    alone, reference_spec = stage_of(prepared, tmp_path / "one host", engine=engine, stage=SLOW)
    reference = run_stage(two_workers, reference_spec)
    store, spec = stage_of(prepared, tmp_path, engine=engine, stage=SLOW)
    driver = Driver(hosts, store, spec)
    points = store.sub(f"{spec.prefix}/resume")
    point = wait_for(lambda: (newest := latest(points)) and newest.step >= STEPS / 4 and newest)
    assert point.world_size == 2
    cut = time.monotonic()
    assert hosts.tell("cut", "b").returncode == 0
    result = driver.result()
    for address in ("10.213.77.2", "10.213.77.3"):
        assert f"(ip={address}, pid=" in driver.said, "Ray names where it has put each worker"
    after = next((at - cut, step) for at, step in driver.steps if at > cut + 5)
    fault = f"host b cut off after step {point.step}; step {after[1]} is the first of host a alone"
    lost_steps = taken_again([step for _, step in driver.steps])
    told(fault, lost_steps=lost_steps, first_new_step_s=after[0], **compared(result, reference))
    assert point.step <= result["resumed_from"] < STEPS
    last = latest(points)
    assert last.world_size == 1
    found, expected = (each.meta["validation"] for each in (last, latest(alone.sub(f"{reference_spec.prefix}/resume"))))
    assert list(found) == list(expected)
    for step, means in expected.items():
        if int(step) <= result["resumed_from"]:
            assert found[step] == means, f"two hosts after step {step}"
        else:
            assert found[step] == pytest.approx(means, rel=1e-5), f"one host after step {step}"
    for objective, losses in reference["losses"].items():
        assert result["losses"][objective]["last"] == pytest.approx(losses["last"], rel=1e-5)
