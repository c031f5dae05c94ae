"""Training across two hosts with addresses of their own, of which one is cut off for a while. They are network
namespaces here.

    apt-get install iproute2; pytest tests/faults/test_two_hosts.py -s

The store is a folder that both can reach, as a cluster's file system would be.
"""

from __future__ import annotations

import os
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
from tests.faults.rows import told
from tests.launch.conftest import RAY
from tests.launch.running import HELD_OUT, Prepared, by_start, cost_of, lives_of, saved_point, stage_of, wait_for
from tests.launch.stages import model, prepared, run_stage
from tests.train.toy import Workers
from upvla.launch.notices import request_stop
from upvla.launch.train import SPEC, TrainSpec
from upvla.store import Store
from upvla.train.resume import ResumePoint, latest

__all__ = ["model", "prepared"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = str(ROOT / "infra" / "two_hosts.sh")
NOT_ALLOWED = 69
HOST_A, HOST_B = "10.213.77.2", "10.213.77.3"
GCS = f"{HOST_A}:6379"


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

    def node(self, host: str, address: str, *options: str) -> subprocess.Popen[str]:
        """Start one that lasts until it is told that it is taken for dead, or the hosts are removed."""
        folder = Path(tempfile.mkdtemp(prefix=host, dir=self.folder))
        log = folder / "log"
        command = [*RAY, "start", "--block", f"--node-ip-address={address}", "--num-cpus=1", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--temp-dir={folder}", *options]
        with log.open("w") as output:
            process = self.begin(host, *command, stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts(Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp")))  # short: Unix sockets lie below it
    try:
        up = made.tell("up")
        if up.returncode == NOT_ALLOWED:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        made.node("a", HOST_A, "--head", "--port=6379", "--include-dashboard=false")
        yield made
    finally:
        made.tell("down")
        shutil.rmtree(made.folder, ignore_errors=True)


class Driver:
    """A driver on host `a`, what it has printed, and when."""

    def __init__(self, hosts: Hosts, store: Store, spec: TrainSpec) -> None:
        self._place = store.sub(spec.prefix)
        self._place.write_json(SPEC, spec.model_dump(mode="json"))
        command = [sys.executable, "-m", "upvla.launch.driver", f"{self._place.url}/{SPEC}"]
        self._process = hosts.begin("a", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="")
            self.lines.append((time.monotonic(), line))

    @property
    def said(self) -> str:
        return "".join(line for _, line in self.lines)

    def saved_by(self, num_workers: int, *, after: int = 0) -> ResumePoint:
        """The newest resume point, once it is of so many workers and of a later step."""

        def found() -> ResumePoint | None:
            assert self._process.poll() is None, self.said[-3000:]
            point = latest(self._place.sub("resume"))
            return point if point and point.world_size == num_workers and point.step > after else None

        point = wait_for(found)
        assert isinstance(point, ResumePoint)
        return point

    def stop(self) -> ResumePoint:
        """What it leaves when it is asked to."""
        request_stop(self._place, "")
        try:
            assert self._process.wait(60) == 1
        finally:
            self._process.kill()
        self._reader.join(10)
        assert " as asked; start it again to go on" in self.said
        point = latest(self._place.sub("resume"))
        assert point is not None
        return point


def test_two_hosts_train_what_one_would_one_goes_on_when_the_other_is_cut_off_and_both_when_it_is_back(
    hosts: Hosts, prepared: Prepared, two_workers: Workers, tmp_path: Path
) -> None:
    """What was held out tells whether they learn what two workers on one host do: bit for bit until one is cut off,
    and afterwards up to what other sums round, at a rate that does not multiply it."""
    optimizer = {"lr": 1e-5, "schedule": "constant"}
    stage = {"steps": 9000, "save_every": 6, "eval_every": 3, "eval_batches": 2, "optimizer": optimizer}
    engine = {"num_workers": (1, 2), "stall_timeout_s": 15, "max_failures": 5}
    store, spec = stage_of(prepared, tmp_path / "two hosts", engine=engine, stage=stage)
    b = hosts.node("b", HOST_B, f"--address={GCS}")
    driver = Driver(hosts, store, spec)
    driver.saved_by(2)
    cut = time.monotonic()
    assert hosts.tell("cut", "b").returncode == 0
    alone = driver.saved_by(1)
    assert hosts.tell("join", "b").returncode == 0
    b.wait(120)  # it is told that it was given up
    hosts.node("b", HOST_B, f"--address={GCS}")
    came = time.monotonic()
    driver.saved_by(2, after=alone.step)
    last = driver.stop()

    found = {int(step): means for step, means in last.meta["validation"].items()}
    other, reference = stage_of(prepared, tmp_path / "one host", engine=engine, stage=stage | {"steps": max(found)})
    run_stage(two_workers, reference)
    expected = {int(step): means for step, means in saved_point(other, reference).meta["validation"].items()}
    assert list(found) == list(expected)
    for address in (HOST_A, HOST_B):
        assert f"(ip={address}, pid=" in driver.said, "Ray names where it has put each worker"
    two, one, two_again = by_start(lives_of(driver.lines))
    differences = {
        step: max(abs(found[step][name] / means[name] - 1) for name in HELD_OUT) for step, means in expected.items()
    }
    equal = {
        "bit_identical": all(found[step] == expected[step] for step in expected if step <= one.start),
        "loss_difference": max(differences.values()),
    }
    back, gone = cost_of(came, one, two_again), cost_of(cut, two, one)
    told(f"host b cut off after step {two.last}, which was bit-identical", **gone, **equal)
    told(f"host b back, after step {one.last}", **back, **equal)
    assert equal["bit_identical"] and equal["loss_difference"] < 1e-5
    assert 0 <= gone["lost_steps"] <= 2 * spec.stage.save_every, "the newest resume point may have been on its way"
    assert back["lost_steps"] == 0, "it was saved when there was room"
