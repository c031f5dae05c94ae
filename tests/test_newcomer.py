"""docs/operations.md, "My recordings, from folder to robot", as a newcomer types it: on a real stack with passwords."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.rollout.test_policy import observation
from tests.test_stack import fetch, small_stack
from tests.toy_line import JUDGED, MIXTURE, NIGHTLY, record
from upvla import stack
from upvla.config import SiteConfig, load
from upvla.rollout.client import TOKEN, RemotePolicy
from upvla.stack import StackConfig
from upvla.stack.doctor import examine
from upvla.stack.servers import basic_login

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(3000)]
CANARY = {"MY_CLOUD_TOKEN": "canary-0f3a9c51d2e84b67"}
PATIENCE_S = 900


class Shell:
    """A person's shell. What is typed and what comes back is kept."""

    def __init__(self, config: StackConfig) -> None:
        self.config, self.home = config, config.home
        self.typed, self.shown = list[str](), ""
        self.environment = {**os.environ, **CANARY, "UPVLA_HOME": str(config.home), "PYTHONPATH": str(ROOT)}
        self.environment.pop(TOKEN, None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        self.typed.append(words[0])
        command, pipe = [sys.executable, "-m", "upvla.cli", *words], subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def upvla(self, *words: str) -> dict[str, Any]:
        code, out, errors = self._ended(*words)
        assert code == 0, out[-3000:] + errors[-3000:]
        return dict(json.loads(out)) if "--json" in words else {}

    def refused(self, *words: str) -> str:
        code, out, errors = self._ended(*words)
        assert code == 1, out[-3000:] + errors[-3000:]
        return errors

    def _ended(self, *words: str) -> tuple[int, str, str]:
        with self.start(*words) as running:
            try:
                out, errors = running.communicate(timeout=PATIENCE_S)
            finally:
                running.kill()
        self.shown += out + errors
        return running.returncode, out, errors


def setting(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def documented() -> list[str]:
    text = (ROOT / "docs/operations.md").read_text().partition("### My recordings, from folder to robot")[2]
    return re.findall(r"^upvla (\w+)", text.partition("```bash")[2].partition("```")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    config = small_stack(tmp_path_factory.mktemp("newcomer") / "home", auth=True)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in CANARY.items():
            patched.setenv(name, value)
        stack.up(config)
    yield Shell(config)
    stack.down(config)


def test_nobody_gets_in_without_a_password(shell: Shell) -> None:
    known = stack.environment(shell.config)
    mlflow = f"{known['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search"
    doors = {
        mlflow: f"upvla:{known['MLFLOW_TRACKING_PASSWORD']}",
        f"{known['PREFECT_API_URL']}/flows/filter": known["PREFECT_API_AUTH_STRING"],
    }
    for url, key in doors.items():
        for given, expected in ((None, 401), ("upvla:wrong", 401), (key, 200)):
            sent = httpx.BasicAuth(*given.split(":", 1)) if given else None
            assert httpx.post(url, json={"limit": 1, "max_results": 1}, auth=sent).status_code == expected, (url, given)


@pytest.mark.parametrize("server", ["ray", "mlflow", "prefect"])
def test_strangers_get_nothing_whatever_they_send(shell: Shell, server: str) -> None:
    """A wrong key and a body of 16 MiB are refused; paths that climb lead nowhere, even for a friend."""
    known = stack.environment(shell.config)
    token, jobs = (shell.home / "secrets/ray_token").read_text(), known["UPVLA_RAY_JOBS_URL"]
    mlflow, prefect = known["MLFLOW_TRACKING_URI"], known["PREFECT_API_URL"]
    login = f"{known['MLFLOW_TRACKING_USERNAME']}:{known['MLFLOW_TRACKING_PASSWORD']}"
    key, wrong, asked, made, climbs = {
        "ray": ({"Authorization": f"Bearer {token}"}, "Bearer wrong", f"{jobs}/api/version", f"{jobs}/api/jobs/", jobs),
        "mlflow": (
            basic_login(login), "Basic d3Jvbmc6d3Jvbmc=", f"{mlflow}/api/2.0/mlflow/registered-models/search",
            f"{mlflow}/api/2.0/mlflow/experiments/create", f"{mlflow}/api/2.0/mlflow-artifacts/artifacts",
        ),
        "prefect": (
            basic_login(known["PREFECT_API_AUTH_STRING"]), "Basic d3Jvbmc6d3Jvbmc=", f"{prefect}/admin/version",
            f"{prefect}/flows/", prefect,
        ),
    }[server]  # fmt: skip
    body = json.dumps({"name": "stranger", "entrypoint": "touch /tmp/nobody-may", "more": "x" * (16 << 20)}).encode()
    for given in ({}, {"Authorization": wrong}):
        try:
            code = fetch(made, body, "POST", **{"Content-Type": "application/json"}, **given)[0]
        except OSError:  # it hung up on what it does not want to read
            code = 401
        assert code in (401, 403), given
    for path in ("/../../../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd"):
        for given in ({}, {"Authorization": wrong}, key):
            code, reply = fetch(climbs + path, **given)
            assert 400 <= code < 500 and b"root:" not in reply, (path, code)
    assert fetch(asked, **key)[0] == 200


def test_doctor_knows_a_key_that_fits_from_one_that_does_not(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client of servers elsewhere: addresses and credentials are the shell's."""
    for name, value in stack.environment(shell.config).items():
        monkeypatch.setenv(name, value)
    doors = {
        "object store": ("AWS_SECRET_ACCESS_KEY", "AWS_ keys"),
        "MLflow": ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_PASSWORD"),
        "Prefect": ("PREFECT_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"),
        "Ray": ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN"),
    }
    site = load("site/compose", SiteConfig)
    found = {check.what: check for check in examine(site, None)}
    assert {what: found[what].state for what in (*doors, "Ray token")} == dict.fromkeys((*doors, "Ray token"), "ok")
    for variable, _ in doors.values():
        monkeypatch.setenv(variable, "upvla:wrong")
    found = {check.what: check for check in examine(site, None)}
    for what, (_, move) in doors.items():
        assert found[what].state == "broken" and move in found[what].next_move, found[what]


def test_from_recordings_to_a_served_policy(shell: Shell, tmp_path: Path) -> None:
    judged, nightly = setting(*JUDGED), ["--config", "finetune/ci", *setting(*NIGHTLY)]
    recordings = record(tmp_path, "mine", (20, 24, 18, 22, 26, 20, 19, 21))
    (recordings / "episode_0000005.npz").unlink()

    about = ["--source", str(recordings), "--dataset", "mine", "--option", "span_end=exclusive"]
    found = shell.upvla("ingest", "--format", "auto", *about, "--validation-fraction", "0.3", "--json")
    assert (found["version"], found["recordings"], found["quarantined"]) == (1, 7, {"missing_frame": 1})
    shell.upvla("data", "report", "mine", "--out", str(tmp_path / "report.html"))
    assert "missing_frame" in (tmp_path / "report.html").read_text()

    known = {**shell.environment, **stack.environment(shell.config)}
    command = [sys.executable, "-m", "tests.toy_line"]  # stands for the demo, which leaves a champion
    made = subprocess.run(command, env=known, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    champion = json.loads(made.stdout.splitlines()[-1])
    assert (champion["version"], champion["alias"]) == ("1", "champion")

    shell.environment["UPVLA_CONFIGS"] = str(site_with_a_login(shell, tmp_path / "configs"))
    tuned = shell.upvla("finetune", *nightly, "--json")
    del shell.environment["UPVLA_CONFIGS"]
    assert tuned["parent"].endswith("models/first/stage2") and tuned["model_id"] != champion["model_id"]
    assert tuned["drift"] == {"drift/worst_shift": 0.0, "drift/dims_outside": 0.0}  # it knows these recordings
    scored = shell.upvla("evaluate", tuned["url"], "--config", "pretrain/ci", *judged, "--json")
    assert scored["model_id"] == tuned["model_id"] and scored["scores"].keys() == {"upvla-tiny", "random", "still"}
    verdict = shell.upvla("promote", tuned["url"], *nightly, "--json")
    assert (verdict["version"], verdict["against"]) == ("2", "1") and verdict["gains"][0]["pairs"] == 4
    if not verdict["promoted"]:
        assert "mine_d" in verdict["because"]
        assert shell.upvla("promote", "--to", "2", "--because", "tried by hand", *nightly, "--json")["to"] == "2"

    with shell.start("serve", "models:/upvla-tiny@champion", "--port", "0", "--deadline-ms", "120000") as server:
        try:
            assert server.stderr is not None
            said = [server.stderr.readline(), server.stderr.readline()]
            assert f"{tuned['model_id']} (version 2)" in said[1], said
            url, token = said[1].split()[-1], (shell.home / "secrets/policy_token").read_text()
            with RemotePolicy(url, token, deadline_s=None, timeout_s=120) as robot:
                robot.reset("open the drawer")
                assert robot.act(observation(0)).actions.shape == (10, 7)
            shell.environment[TOKEN] = token
            served = shell.upvla("evaluate", "--policy-url", url, "--config", "pretrain/ci", *judged, "--json")
        finally:
            server.terminate()
            shell.shown += server.communicate(timeout=120)[1]
    assert served["scores"] == scored["scores"]["upvla-tiny"]
    assert (served["model_id"], served["protocols"]) == (scored["model_id"], scored["protocols"])
    assert list(dict.fromkeys(shell.typed)) == documented()


def site_with_a_login(shell: Shell, folder: Path) -> Path:
    """Configurations of which the site names MLflow with the password in the address, as people copy it."""
    known = stack.environment(shell.config)
    login = f"{known['MLFLOW_TRACKING_USERNAME']}:{known['MLFLOW_TRACKING_PASSWORD']}"
    address = known["MLFLOW_TRACKING_URI"].replace("://", f"://{login}@")
    shutil.copytree(ROOT / "configs", folder)
    with (folder / "site/local.yaml").open("a") as site:
        site.write(f"\ntracking_url: {address}\n")
    return folder


class Buckets:
    """Both, as a client reads them: on its disk SeaweedFS keeps what it can compress compressed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._s3 = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def put(self, key: str, body: bytes) -> None:
        bucket, _, name = key.partition("/")
        self._s3.put_object(Bucket=bucket, Key=name, Body=body)

    def holding(self, values: Mapping[str, str]) -> set[tuple[str, str]]:
        """Which value lies in which object."""
        found = set()
        for key, body in self.objects():
            for plain in unpacked(body):
                found |= {(name, key) for name, value in values.items() if value.encode() in plain}
        return found

    def objects(self) -> Iterator[tuple[str, bytes]]:
        for bucket in ("upvla", "mlflow"):
            listed = 0
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for entry in page.get("Contents", ()):
                    listed += 1
                    body = self._s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"]
                    yield f"{bucket}/{entry['Key']}", body.read()
            assert listed, f"nothing lies in {bucket}"


def unpacked(body: bytes) -> Iterator[bytes]:
    """The bytes themselves, and what gzip or Parquet's columns hide."""
    yield body
    if body.startswith(b"\x1f\x8b"):
        yield from unpacked(gzip.decompress(body))
    elif body.startswith(b"PAR1"):
        table, plain = pq.read_table(io.BytesIO(body)), pa.BufferOutputStream()
        with pa.ipc.new_stream(plain, table.schema) as stream:
            stream.write_table(table)
        yield plain.getvalue().to_pybytes()


def parquet(note: str, about: str) -> bytes:
    lines = [f"line {number}" for number in range(999)]
    table = pa.table({"said": [[{"note": line}] for line in (*lines, f"line 500: {note}")]})  # neither first nor last
    plain = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"about": about}), plain, compression="zstd")
    return plain.getvalue()


def test_no_secret_was_written_anywhere(shell: Shell) -> None:
    """After all of it, and a flow run: logs, databases, artifacts, Parquet and models on the store, Ray's session.
    A password in a URL is one, too: MLflow's was in its address while the champion was tuned."""
    shell.upvla("deploy", "--json")
    flow = [sys.executable, "-m", "prefect", "deployment", "run", "mix/default", "--watch", "--watch-interval", "1"]
    flow += ["--params", json.dumps({"config": "pretrain/ci", "overrides": [*JUDGED, MIXTURE]})]
    known = {**shell.environment, **stack.environment(shell.config)}
    done = subprocess.run(flow, env=known, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shell.shown += done.stdout + done.stderr
    login = {"login": "canary-7be1950c44d2af38"}
    url = f"http://robot:{login['login']}@127.0.0.1:9"
    for words in (
        ("evaluate", f"{url}/model"),
        ("ingest", "--format", "calvin", "--source", f"{url}/set", "--dataset", "mine"),
    ):
        assert "http://127.0.0.1:9/" in shell.refused(*words)

    secrets = {**CANARY, **login, **json.loads((shell.home / "secrets/passwords.json").read_text())}
    secrets |= {name: (shell.home / "secrets" / name).read_text() for name in ("ray_token", "policy_token")}
    (keys,) = json.loads((shell.home / "secrets/s3.json").read_text())["identities"][0]["credentials"]
    secrets["s3"] = keys["secretKey"]
    assert all(len(value) > 16 for value in secrets.values())
    written = [path for path in shell.home.rglob("*") if path.is_file() and path.parent.name != "secrets"]
    assert {"s3", "mlflow", "prefect", "ray", "logs"} <= {path.relative_to(shell.home).parts[0] for path in written}
    leaks = [
        (name, str(path)) for path in written for name, value in secrets.items() if value.encode() in path.read_bytes()
    ]
    assert leaks == []
    assert not [name for name, value in secrets.items() if value in shell.shown]
    buckets = Buckets(stack.environment(shell.config))
    assert buckets.holding(secrets) == set()
    specs = [json.loads(body) for key, body in buckets.objects() if key.endswith("/spec.json")]
    plain = stack.environment(shell.config)["MLFLOW_TRACKING_URI"]
    assert [spec["tracking"]["uri"] for spec in specs] == [plain]

    column, log = "upvla/planted/column.parquet", "mlflow/planted/log.gz"
    planted = {
        "upvla/planted/report.json": json.dumps(["planted-42b7c1", *["a line of some length"] * 999]).encode(),
        "upvla/planted/metadata.parquet": parquet("nothing", "planted-42b7c1"),
        column: parquet("planted-42b7c1", "nothing"),
        log: gzip.compress(b"a line of some length, planted-42b7c1"),
    }
    assert [key for key, body in planted.items() if b"planted-42b7c1" not in body] == [column, log]  # these hide it
    for key, body in planted.items():
        buckets.put(key, body)
    assert buckets.holding({"marker": "planted-42b7c1"}) == {("marker", key) for key in planted}
