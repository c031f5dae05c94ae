"""The real servers on free ports in a temporary home: healthy, idempotent, repairable, and gone after `down`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from upvla import stack
from upvla.errors import ConfigError, StackError
from upvla.stack import Ports, StackConfig, processes
from upvla.stack.servers import parts

pytestmark = pytest.mark.timeout(1500)  # a busy machine needs minutes to start five servers


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports() -> Ports:
    while True:
        base = random.Random(os.urandom(8)).randrange(11000, 20000)
        if all(_is_free(port) for port in (*range(base, base + 10), *range(base + 10000, base + 10005))):
            return Ports(s3=base, mlflow=base + 5, prefect=base + 6, ray=base + 7, dashboard=base + 9)


def small_stack(home: Path, **more: Any) -> StackConfig:
    """On ports of its own."""
    return StackConfig(home=home, ports=_free_ports(), num_cpus=2, object_store_mb=100, **more)


def _s3(environment: dict[str, str], secret: str | None = None):
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret or environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


def fetch(url: str, data: bytes | None = None, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackConfig]:
    # A space, and a path far too long for Ray's sockets.
    config = small_stack(tmp_path_factory.mktemp("stack") / "a home" / "with-a-rather-long-name-below-it")
    stack.up(config)
    yield config
    stack.down(config)


@pytest.mark.seam
def test_every_part_is_healthy_and_says_where_it_is(running: StackConfig) -> None:
    parts = stack.status(running)
    assert [part["name"] for part in parts] == ["s3", "mlflow", "prefect", "ray", "worker"]
    assert all(part["healthy"] and psutil.pid_exists(part["pid"]) and Path(part["log"]).is_file() for part in parts)
    assert {oct((running.home / "secrets" / name).stat().st_mode)[-3:] for name in ("s3.json", "ray_token")} == {"600"}
    known = {part["name"]: psutil.Process(part["pid"]).environ() for part in parts}
    assert {"GOGC", "MALLOC_ARENA_MAX"} - os.environ.keys() <= known["s3"].keys() | known["worker"].keys()
    assert "MALLOC_ARENA_MAX" in os.environ or "MALLOC_ARENA_MAX" not in known["ray"]
    authority = ssl.create_default_context(cafile=known["worker"]["PREFECT_API_SSL_CERT_FILE"])
    assert authority.cert_store_stats()["x509_ca"] == 1


@pytest.mark.seam
def test_only_loopback_is_listened_on(running: StackConfig) -> None:
    ours = {process.pid for process in processes.marked(running.home)}
    open_to = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours}
    assert open_to
    assert open_to <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.seam
def test_object_store_knows_the_generated_keys_and_no_others(running: StackConfig) -> None:
    environment = stack.environment(running)
    client = _s3(environment)
    client.put_object(Bucket="upvla", Key="a/b", Body=b"bytes")
    assert client.get_object(Bucket="upvla", Key="a/b")["Body"].read() == b"bytes"
    with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|Forbidden|AccessDenied"):
        _s3(environment, secret="wrong").get_object(Bucket="upvla", Key="a/b")


@pytest.mark.seam
def test_mlflow_keeps_artifacts_in_the_object_store(running: StackConfig) -> None:
    environment = stack.environment(running)
    url = f"{environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow-artifacts/artifacts/folder/picture.png"
    assert fetch(url, b"pixels", "PUT")[0] == 200
    assert _s3(environment).get_object(Bucket="mlflow", Key="folder/picture.png")["Body"].read() == b"pixels"
    root = url.removesuffix("folder/picture.png")
    for path in ("../../../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd"):
        for method in ("GET", "PUT"):
            code, reply = fetch(root + path, b"x" if method == "PUT" else None, method)
            assert code == 400 and b"Invalid path" in reply, (method, path, code)


@pytest.mark.seam
def test_ray_wants_its_token(running: StackConfig) -> None:
    environment = stack.environment(running)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    jobs = f"{environment['UPVLA_RAY_JOBS_URL']}/api/jobs/"
    job, as_json = json.dumps({"entrypoint": "touch /tmp/nobody-may"}).encode(), {"Content-Type": "application/json"}
    for key, code in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        assert fetch(jobs, **key)[0] == code
        assert fetch(jobs, job, "POST", **key, **as_json)[0] == code
    assert fetch(jobs, Authorization=f"Bearer {token}") == (200, b"[]")


CONNECT = "from upvla.launch.cluster import connected\nwith connected(): pass"
ASK = "import os; from upvla.launch.jobs import Jobs; Jobs(os.environ['UPVLA_RAY_JOBS_URL'])"


@pytest.mark.seam
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (CONNECT, "no Ray cluster at {RAY_ADDRESS} lets us in: check its token, RAY_AUTH_TOKEN_PATH"),
        (ASK, "the Ray job server at {UPVLA_RAY_JOBS_URL} refuses our token: check RAY_AUTH_TOKEN_PATH"),
    ],
    ids=["cluster", "jobs"],
)
def test_a_wrong_ray_token_is_one_sentence(running: StackConfig, tmp_path: Path, code: str, sentence: str) -> None:
    """In a process of its own: Ray reads its token once."""
    (tmp_path / "token").write_text("0" * 64)
    environment = stack.environment(running) | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280).stderr
    last = said.strip().splitlines()[-1]
    assert last.startswith("upvla.errors.StackError: " + sentence.format(**environment))


@pytest.mark.seam
def test_a_flow_run_that_lost_its_process_does_not_block_the_next(running: StackConfig) -> None:
    api = stack.environment(running)["PREFECT_API_URL"]

    def post(path: str, **body: object) -> dict:
        for _ in range(20):  # 503 is Prefect's "SQLite is busy, try again"
            code, reply = fetch(api + path, json.dumps(body).encode(), "POST", **{"Content-Type": "application/json"})
            if code != 503:
                break
            time.sleep(0.3)
        assert code < 300, (path, reply)
        return json.loads(reply)

    flow = post("/flows/", name="line")
    deployment = post(
        "/deployments/", name="full", flow_id=flow["id"], work_pool_name="local", entrypoint="none.py:none"
    )
    worker = next(part["pid"] for part in stack.status(running) if part["name"] == "worker")
    psutil.Process(worker).kill()  # before it can take one of them up
    runs = {name: post(f"/deployments/{deployment['id']}/create_flow_run", name=name) for name in ("lost", "alive")}
    for run in runs.values():
        for state in ("PENDING", "RUNNING"):
            post(f"/flow_runs/{run['id']}/set_state", state={"type": state}, force=True)
    marks = {"UPVLA_STACK": str(running.home), "UPVLA_PART": "worker", "PREFECT__FLOW_RUN_ID": runs["alive"]["id"]}
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, **marks})
    try:
        _wait(lambda: runs["alive"]["id"] in processes.values(running.home, "PREFECT__FLOW_RUN_ID"))
        said: list[str] = []
        stack.up(running, said.append)
        assert alive.poll() is None  # a worker that is replaced does not take its runs with it
    finally:
        alive.kill()
        alive.wait()
    assert "worker: flow run lost lost its process and is now Crashed: run it again" in said
    states = {name: json.loads(fetch(f"{api}/flow_runs/{run['id']}")[1])["state"]["type"] for name, run in runs.items()}
    assert states == {"lost": "CRASHED", "alive": "RUNNING"}


@pytest.mark.seam
def test_up_again_repairs_what_died_and_touches_nothing_else(running: StackConfig) -> None:
    _s3(stack.environment(running)).put_object(Bucket="upvla", Key="kept", Body=b"kept")
    before = {part["name"]: part["pid"] for part in stack.status(running)}
    os.kill(before["s3"], signal.SIGKILL)
    while psutil.pid_exists(before["s3"]) and psutil.Process(before["s3"]).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert [part["name"] for part in stack.status(running) if not part["healthy"]] == ["s3"]

    for expected in ("healthy after", "already runs"):
        said: list[str] = []
        stack.up(running, said.append)
        assert [line for line in said if line.startswith(f"s3: {expected}")], said
    after = {part["name"]: part["pid"] for part in stack.status(running) if part["healthy"]}
    assert {name for name in before if before[name] != after[name]} == {"s3"}
    assert _s3(stack.environment(running)).get_object(Bucket="upvla", Key="kept")["Body"].read() == b"kept"


@pytest.mark.seam
def test_up_replaces_a_server_that_hangs_and_clears_what_a_killed_one_left(running: StackConfig) -> None:
    before = {part["name"]: part["pid"] for part in stack.status(running)}
    psutil.Process(before["mlflow"]).suspend()
    for child in psutil.Process(before["mlflow"]).children():
        child.suspend()
    psutil.Process(before["ray"]).kill()  # its raylet, dashboard and agents live on
    _wait(lambda: not psutil.pid_exists(before["ray"]) or psutil.Process(before["ray"]).status() == "zombie")
    said: list[str] = []
    stack.up(running, said.append)
    assert f"mlflow: process {before['mlflow']} does not answer, replacing it" in said
    after = {part["name"]: part["pid"] for part in stack.status(running) if part["healthy"]}
    assert {name for name in before if before[name] != after[name]} == {"mlflow", "ray"}
    mains = [p for p in processes.marked(running.home, "ray") if "ray.scripts.scripts" in p.cmdline()]
    assert len(mains) == 1


@pytest.mark.seam
def test_another_configuration_is_refused_while_it_runs(running: StackConfig) -> None:
    with pytest.raises(StackError, match="upvla down"):
        stack.up(running.model_copy(update={"num_cpus": 5}))


@pytest.mark.seam
def test_down_leaves_nothing_of_ours_and_stops_nothing_else(running: StackConfig) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    left_behind = subprocess.Popen(sleep, env={**os.environ, "UPVLA_STACK": str(running.home), "UPVLA_PART": "worker"})
    foreign = subprocess.Popen(sleep, env={**os.environ, **stack.environment(running)})
    try:
        _wait(lambda: any(process.pid == left_behind.pid for process in processes.marked(running.home)))
        stack.down(running)
        assert left_behind.poll() is not None
        assert foreign.poll() is None
        assert processes.marked(running.home) == []
        assert not any(part["healthy"] for part in stack.status(running))
        stack.down(running)  # nothing to do is no error
    finally:
        foreign.kill()
        foreign.wait()


def test_passwords_are_drawn_once_and_only_where_others_reach_the_stack(tmp_path: Path) -> None:
    alone, shared = StackConfig(home=tmp_path / "a"), StackConfig(home=tmp_path / "b", host="10.1.2.3")
    assert (alone.secured, shared.secured) == (False, True)
    for config in (alone, shared):
        config.home.mkdir()
        stack.prepare(config)
    assert "PREFECT_API_AUTH_STRING" not in stack.environment(alone)
    found = stack.environment(shared)
    assert found["PREFECT_API_AUTH_STRING"].startswith("upvla:") and len(found["MLFLOW_TRACKING_PASSWORD"]) >= 24
    assert found["MLFLOW_TRACKING_URI"] == "http://10.1.2.3:5000"
    (mlflow,) = [part.command for part in parts(shared) if part.name == "mlflow"]
    assert "--cors-allowed-origins=http://10.1.2.3:5000" in mlflow  # else its page could not ask for anything
    stack.prepare(shared)
    assert stack.environment(shared) == found
    assert {oct(path.stat().st_mode)[-3:] for path in (shared.home / "secrets").iterdir()} == {"600"}
    with pytest.raises(ValueError, match="no address to call"):
        StackConfig(home=tmp_path, host="0.0.0.0")


@pytest.mark.seam
def test_an_interrupted_up_leaves_nothing_half_started(tmp_path: Path) -> None:
    config = small_stack(tmp_path)
    code = (
        "import signal, sys; from upvla import stack; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs inherit it ignored
        "stack.up(stack.StackConfig.model_validate_json(sys.argv[1]))"
    )
    starting = subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], stdout=subprocess.PIPE)
    assert starting.stdout is not None
    assert starting.stdout.readline().startswith(b"s3: healthy")  # and the others are on their way
    starting.send_signal(signal.SIGINT)
    assert starting.wait(timeout=240) != 0
    starting.stdout.close()
    assert processes.marked(tmp_path) == []
    assert not [
        link for link in Path("/tmp").glob("upvla-*") if link.is_symlink() and link.readlink().is_relative_to(tmp_path)
    ]


@pytest.mark.seam
def test_what_a_background_shell_starts_can_still_be_interrupted(tmp_path: Path) -> None:
    """`make demo &` in a script ignores SIGINT; a Prefect that had inherited that would not end when it is told to."""
    log = tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        show = "import signal, pathlib; print('ignores' if signal.getsignal(2) is signal.SIG_IGN else 'listens')"
        processes.start(tmp_path, "child", [sys.executable, "-c", show], dict(os.environ), log)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    _wait(lambda: log.read_text().endswith(("ignores\n", "listens\n")))
    assert log.read_text().splitlines()[-1] == "listens"


def test_a_server_that_cannot_start_is_tried_twice_then_named_with_its_log(tmp_path: Path) -> None:
    config = small_stack(tmp_path)
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3/filerldb2").write_text("in the way of a folder that the server wants")
    said: list[str] = []
    with pytest.raises(StackError, match=r"s3 ended while starting: .*logs/s3\.log"):
        stack.up(config, said.append)
    assert [line for line in said if line.startswith("s3: ended while starting, once more")]
    assert processes.marked(tmp_path) == []


def test_a_taken_port_is_named_with_its_holder_and_the_way_out(tmp_path: Path) -> None:
    config = small_stack(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", config.ports.mlflow))
        taken.listen()
        with pytest.raises(StackError) as caught:
            stack.up(config)
    message = str(caught.value)
    assert f"port {config.ports.mlflow}, which mlflow needs" in message
    assert f"(pid {os.getpid()})" in message
    assert "UPVLA_PORTS=mlflow=NUMBER" in message
    assert processes.marked(tmp_path) == []


def test_ports_are_looked_for_on_the_address_that_servers_listen_on() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        processes.require_free("mlflow", "127.0.0.1", {port: "mlflow"})
        with pytest.raises(StackError, match=rf"port {port}, which mlflow needs"):
            processes.require_free("mlflow", "127.0.0.2", {port: "mlflow"})
    with pytest.raises(StackError, match=r"192\.0\.2\.1 is no address of this machine"):
        processes.require_free("mlflow", "192.0.2.1", {port: "mlflow"})


def test_a_full_disk_is_seen_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="MB are free under"):
        stack.up(small_stack(tmp_path, min_free_mb=10**12))
    assert processes.marked(tmp_path) == []


def test_clients_are_sent_to_up_before_the_first_start(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="run `upvla up`"):
        stack.environment(small_stack(tmp_path))


@contextlib.contextmanager
def something_running(home: Path) -> Iterator[None]:
    """A process that bears the mark of a home's stack."""
    code = "import time; print('here', flush=True); time.sleep(600)"
    marks = {"UPVLA_STACK": str(home), "UPVLA_PART": "s3"}
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **marks}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_ports_come_from_the_shell_then_the_running_stack_then_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    monkeypatch.delenv("UPVLA_PORTS", raising=False)
    assert stack.load_site("local").ports == Ports()
    recorded = StackConfig(home=tmp_path, ports=Ports(s3=9333, mlflow=5001))
    recorded.record.write_text(recorded.model_dump_json())
    with something_running(tmp_path):
        assert stack.load_site("local") == recorded
        monkeypatch.setenv("UPVLA_PORTS", "mlflow=5002,ray=7000")
        assert stack.load_site("local").ports == Ports(s3=9333, mlflow=5002, ray=7000)
    for wrong in ("mlflow=high", "mlfow=5002", "mlflow", "s3=30000"):
        monkeypatch.setenv("UPVLA_PORTS", wrong)
        with pytest.raises(ConfigError, match="UPVLA_PORTS"):
            stack.load_site("local")
    with pytest.raises(ConfigError, match="no site 'moon'"):
        stack.load_site("moon")


def test_the_site_file_counts_again_once_nothing_runs_however_that_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that a power cut left listens on the LAN no more; one that is torn locks nobody out."""
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    monkeypatch.delenv("UPVLA_PORTS", raising=False)
    was = StackConfig(home=tmp_path, host="10.0.0.5", ports=Ports(mlflow=5001))
    was.record.write_text(was.model_dump_json())
    assert stack.load_site("local").host == stack.load_site("local", starting=True).host == "127.0.0.1"
    with something_running(tmp_path):
        assert stack.load_site("local") == was
        wanted = stack.load_site("local", starting=True)
        assert (wanted.host, wanted.ports) == ("127.0.0.1", was.ports)
        with pytest.raises(StackError, match=r"another host \(10\.0\.0\.5, asked for 127\.0\.0\.1\): run `upvla down`"):
            stack.up(wanted)
        was.record.write_text(was.model_dump_json()[:40])
        torn = stack.load_site("local")
        assert torn.host == "127.0.0.1"
        with pytest.raises(StackError, match="the record is lost: run `upvla down`"):
            stack.up(torn)
        stack.down(torn)
        assert processes.marked(tmp_path) == []
    assert not was.record.exists()
    stack.prepare(torn)
    assert StackConfig.model_validate_json(torn.record.read_bytes()) == torn and not list(tmp_path.glob("*.new"))


def _wait(happened: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
