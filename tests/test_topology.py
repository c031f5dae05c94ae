"""docker-compose.yml without containers: its services as processes of this machine, with its commands, variables,
health checks and order, on a PostgreSQL of their own; and a night's flows through all of it.

What a machine without names and containers needs is replaced: host names by loopback, ports by free ones, /var/lib by a
folder. Everything else is the file's. The flow worker sees no processes but its own, where the machine allows it: Ray's
drivers look for a node among the processes beside them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import compose
from tests.conftest import ROOT, free_ports
from tests.toy_line import NIGHTLY, record
from upvla.stack import processes

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(3000)]
PATIENCE_S = 600
BROWSERS_NAME = "upvla.example.org"
VALUES = {name: value or f"secret-{name.lower()}" for name, value in compose.example().items()}
VALUES["PUBLIC_HOST"] = BROWSERS_NAME
OTHERS = ("postgres", "ray-worker-gpu", "policy")  # the first is Debian's here, the others are of a profile
HOSTS = re.compile(r"\b(?:s3|mlflow|prefect|ray-head|postgres|localhost)(?=:\d)|(?<=-ip=)s3\b|\b0\.0\.0\.0\b")
APART = ("unshare", "--pid", "--fork", "--mount-proc")
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


class Topology:
    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "var/lib/upvla"
        self.home.mkdir(parents=True)
        names = ("8333", "5000", "4200", "6379", "8265", "52365", "5432", "8080")
        master, volume, filer, admin, client, of_worker, of_flows, *ports = free_ports(7 + len(names))
        self.ports = dict(zip(names, map(str, ports), strict=True))
        node = "--node-ip-address=127.0.0.1 --min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000"
        self._more = {
            "s3": f"-master.port={master} -volume.port={volume} -filer.port={filer} -admin.port={admin}",
            "ray-head": f"{node} --ray-client-server-port={client} --temp-dir={folder}/ray",
        }
        whole = compose.load(VALUES)
        self.services = {name: service for name, service in whole["services"].items() if name not in OTHERS}
        for name, agent in (("ray-worker", of_worker), ("worker", of_flows)):  # on one machine, 52365 is the head's
            self._more[name] = f"{node} --dashboard-agent-listen-port={agent}"
            check = self.services[name]["healthcheck"]
            words = [word.replace("52365", str(agent)) for word in check["test"]]
            self.services[name]["healthcheck"] = {**check, "test": words}
        self.apart = bool(shutil.which(APART[0])) and subprocess.run([*APART, "true"], check=False).returncode == 0
        if not self.apart:
            warnings.warn("no process namespace here: the flow worker sees the processes of Ray's head", stacklevel=2)
        (folder / "mlflow_auth.ini").write_text(self.here(whole["configs"]["mlflow_auth"]["content"]))

    def here(self, text: str) -> str:
        text = text.replace("/var/lib/", f"{self.folder}/var/lib/").replace("/etc/", f"{self.folder}/")
        text = text.replace("/app/", f"{ROOT}/")
        for number, free in self.ports.items():
            text = re.sub(rf"\b{number}\b", free, text)
        return HOSTS.sub("127.0.0.1", text)

    def environment(self, service: str) -> dict[str, str]:
        mine = ("AWS_", "MLFLOW_", "PREFECT_", "RAY_", "UPVLA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        given = {name: self.here(str(value)) for name, value in self.services[service]["environment"].items()}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        image = {"UPVLA_HOME": str(self.home), "PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        health = {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1", "PREFECT_WORKER_WEBSERVER_PORT": self.ports["8080"]}
        return kept | image | health | given | {"SPT_NOENV": "1"}

    def up(self) -> None:
        """Each service when those that it depends on are healthy, or have ended well."""
        done, waiting = {"postgres"}, dict(self.services)
        started: dict[str, float] = {}
        while waiting:
            for name, service in list(waiting.items()):
                if name not in started and set(service.get("depends_on", {})) <= done:
                    self._start(name, service["command"])
                    started[name] = time.monotonic()
                elif name in started and self._is_done(name, service):
                    done.add(name)
                    del waiting[name]
                elif name in started:
                    lives = not service.get("healthcheck") or processes.marked(self.folder, name)
                    assert lives and time.monotonic() - started[name] < PATIENCE_S, f"{name}: {self.log(name)}"
            time.sleep(0.5)

    def _start(self, name: str, command: str) -> None:
        (program, *rest) = shlex.split(self.here(f"{command} {self._more.get(name, '')}"))
        found = shutil.which(program, path=self.environment(name)["PATH"])
        assert found is not None, program
        alone = APART if self.apart and name == "worker" else ()
        processes.start(self.folder, name, [*alone, found, *rest], self.environment(name), self.folder / f"{name}.log")

    def _is_done(self, name: str, service: dict[str, Any]) -> bool:
        check = service.get("healthcheck")
        if not check:
            return not processes.marked(self.folder, name) and "deployed" in self.log(name)
        (_, *words) = [self.here(word) for word in check["test"]]
        done = subprocess.run(words, env=self.environment(name), capture_output=True, timeout=120, check=False)
        return done.returncode == 0

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def run(self, *command: str) -> str:
        """In the worker's place: `docker compose exec worker python ...`."""
        done = subprocess.run(
            [*self._inside(), sys.executable, *command], env=self.environment("worker"), cwd=ROOT, capture_output=True,
            text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + self.log("worker")
        return done.stdout

    def _inside(self) -> list[str]:
        if not self.apart:
            return []
        (outside,) = [found for found in processes.marked(self.folder, "worker") if found.name() == "unshare"]
        (first,) = outside.children()
        return ["nsenter", f"--target={first.pid}", "--pid", "--mount", "env", f"--chdir={ROOT}"]

    def deployment(self, name: str, **parameters: Any) -> None:
        given = json.dumps(parameters)
        self.run("-m", "prefect", "deployment", "run", name, "--params", given, "--watch", "--watch-interval", "1")


def start_postgres(topology: Topology) -> None:
    """As the image does: a cluster, its user, databases.sql. PostgreSQL refuses to run as root."""
    data, secret, port = topology.folder / "postgres", topology.folder / "postgres-password", topology.ports["5432"]
    data.mkdir()
    secret.write_text(VALUES["POSTGRES_PASSWORD"])
    if os.geteuid() == 0:
        for path in (data, secret):
            shutil.chown(path, "postgres")
    postgres(data, "initdb", "-D", data, "-U", "upvla", f"--pwfile={secret}", "--auth=scram-sha-256", "-E", "UTF8")
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1"
    postgres(data, "pg_ctl", "-D", data, "-w", "-t", "200", "-l", data / "log", "-o", options, "start")
    client = ["-h", "127.0.0.1", "-p", port, "-U", "upvla", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]
    postgres(data, "psql", *client, "-f", ROOT / "infra/databases.sql")


def postgres(data: Path, program: str, *arguments: str | Path, check: bool = True) -> None:
    assert POSTGRES is not None
    environment = {**os.environ, "PGPASSWORD": VALUES["POSTGRES_PASSWORD"]}
    owner = "postgres" if os.geteuid() == 0 and program != "psql" else None
    with (data.parent / "postgres.log").open("ab") as log:  # a pipe would stay open as long as the server runs
        command = [POSTGRES / program, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=data, user=owner, stdout=log, stderr=log, timeout=240, check=False
        )
    assert not check or done.returncode == 0, (data.parent / "postgres.log").read_text()[-2000:]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    if POSTGRES is None:
        pytest.skip("no PostgreSQL here: apt-get install -y postgresql")
    folder = Path(
        tempfile.mkdtemp(prefix="top-", dir="/tmp")
    )  # short, for Ray's sockets; and open to PostgreSQL's user
    folder.chmod(0o755)
    made = Topology(folder)
    try:
        start_postgres(made)
        made.up()
        yield made
    finally:
        for process in processes.marked(folder):  # what they keep goes with the folder: nothing to wait for
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        processes.stop(processes.marked(folder))  # what one of them has started meanwhile
        postgres(folder / "postgres", "pg_ctl", "-D", folder / "postgres", "-m", "immediate", "stop", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_every_door_asks_for_a_password(topology: Topology) -> None:
    doors = {
        f"http://127.0.0.1:{topology.ports['5000']}/api/2.0/mlflow/experiments/search": b'{"max_results": 1}',
        f"http://127.0.0.1:{topology.ports['4200']}/api/flows/filter": b"{}",
        f"http://127.0.0.1:{topology.ports['8265']}/api/jobs/": None,
        f"http://127.0.0.1:{topology.ports['8333']}/upvla/": None,
    }
    for url, body in doors.items():
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code in (401, 403), url


def test_pages_work_under_the_machines_public_name_and_no_other(topology: Topology) -> None:
    environment = topology.environment("worker")
    login = f"{environment['MLFLOW_TRACKING_USERNAME']}:{environment['MLFLOW_TRACKING_PASSWORD']}"
    url, port = f"{environment['MLFLOW_TRACKING_URI']}/ajax-api/2.0/mlflow/experiments/search", topology.ports["5000"]
    for page, host, expected in (
        (BROWSERS_NAME, BROWSERS_NAME, 200), ("evil.example", BROWSERS_NAME, 403), (BROWSERS_NAME, "evil.example", 403)
    ):  # fmt: skip
        headers = {"Host": f"{host}:{port}", "Origin": f"http://{page}:{port}", "Content-Type": "application/json"}
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        request = urllib.request.Request(url, b'{"max_results": 1}', headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                code = reply.status
        except urllib.error.HTTPError as error:
            code = error.code
        assert code == expected, (page, host)
    settings = f"{environment['PREFECT_API_URL'].removesuffix('/api')}/ui-settings"
    with urllib.request.urlopen(settings, timeout=60) as reply:
        assert json.load(reply)["api_url"] == f"http://{BROWSERS_NAME}:{topology.ports['4200']}/api"


def test_the_flow_worker_is_a_node_of_its_own(topology: Topology) -> None:
    asked = """
import json, ray
ray.init(log_to_driver=False)
nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
print(json.dumps([nodes.pop(ray.get_runtime_context().get_node_id()), *nodes.values()]))
"""
    ours, *others = json.loads(topology.run("-c", asked).splitlines()[-1])
    assert "CPU" not in ours and sorted(node.get("CPU", 0) for node in others) == [0, 4]
    assert ("node:__internal_head__" in ours) is not topology.apart


def test_a_night_runs_through_it(topology: Topology) -> None:
    record(topology.home / "raw", "inbox", (20, 24, 18, 22, 26, 20, 19))
    landing = {"config": "pretrain/ci", "settle_s": 0}
    landing["overrides"] = ["data.ingest.dataset=mine", "data.ingest.options.span_end=exclusive"]
    topology.deployment("ingest/watch", **landing)
    assert json.loads(topology.run("-m", "tests.toy_line").splitlines()[-1])["alias"] == "champion"
    record(topology.home / "raw", "inbox", (20, 24, 18, 22, 26, 20, 19, 21, 23))
    topology.deployment("ingest/watch", **landing)
    topology.deployment("finetune/nightly", config="finetune/ci", overrides=list(NIGHTLY))
    found = topology.run("-m", "upvla.cli", "data", "ls", "--site", "compose", "--json")
    assert [row["recordings"] for row in json.loads(found)] == [7, 9]
    topology.deployment("finetune/nightly", config="finetune/ci", overrides=list(NIGHTLY))  # whatever the gate said
    asked = """
import json, os
from upvla.tracking import Registry, Tracker
tracker = Tracker(os.environ["MLFLOW_TRACKING_URI"], "upvla")
versions = Registry(tracker).versions("upvla-tiny")
skipped = tracker.client.search_runs([tracker.experiment_id()], "metrics.`nightly/skipped` = 1")
print(json.dumps([[run.data.tags["since"] for run in skipped]]
    + [[version.version, version.tags["datasets"], version.tags.get("gate", "")] for version in versions]))
"""
    (since,), (newest, trained_on, gate), (first, *_) = json.loads(topology.run("-c", asked))
    assert since in ("1, 2", "2")  # the champion, and who was judged against it
    assert (newest, first, trained_on) == ("2", "1", "mine@2") and "mine_d" in gate
