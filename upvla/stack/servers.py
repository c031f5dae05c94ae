"""What the local stack is made of: its configuration, the servers (command, ports, health), the clients' variables."""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import json
import os
import secrets
import shutil
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from upvla.errors import ConfigError, StackError
from upvla.stack import processes

STORE_BUCKET, ARTIFACT_BUCKET = "upvla", "mlflow"
WORK_POOL = "local"
_USER = "upvla"
_RAY_DIR_LIMIT = 36  # Ray appends up to 67 characters; the path of a Unix socket holds 107


class Ports(BaseModel):
    """One number a server. SeaweedFS takes s3..s3+4 and the same +10000 (gRPC); Ray also takes ray+1 (its client)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    s3: int = Field(default=8333, ge=1024, le=22763)  # +4 +10000 stays below the ephemeral range (32768)
    mlflow: int = Field(default=5000, ge=1024, le=65535)
    prefect: int = Field(default=4200, ge=1024, le=65535)
    ray: int = Field(default=6379, ge=1024, le=65534)
    dashboard: int = Field(default=8265, ge=1024, le=65535)


class StackConfig(BaseModel):
    """Where the local stack keeps its state and how big it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(default="local", description="the site file that this comes from: flows that name none run there")
    home: Path = Field(default_factory=lambda: Path(os.environ.get("UPVLA_HOME") or ".upvla"), validate_default=True)
    ports: Ports = Ports()
    host: str = Field(default="127.0.0.1", description="the one address that servers listen on and clients call")
    auth: bool | None = Field(
        default=None, description="passwords for MLflow and Prefect; default: wherever others reach them"
    )
    num_cpus: int = Field(default_factory=lambda: max(2, os.cpu_count() or 2), gt=0)
    """What Ray may hand out; at least two, so that two training workers find a place on one core too."""
    object_store_mb: int = Field(default=512, ge=80)
    worker_limit: int = Field(default=4, gt=0, description="flow runs at a time; training ones take turns anyway")
    timeout_s: float = Field(default=300.0, gt=0, description="for one part to answer; a busy machine takes minutes")
    min_free_mb: int = 2048

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("host")
    @classmethod
    def _one_address(cls, host: str) -> str:
        if ipaddress.ip_address(host).is_unspecified:
            raise ValueError(f"{host} is no address to call: name the one that others reach this machine by")
        return host

    @property
    def secured(self) -> bool:
        """Whether MLflow and Prefect ask for a password. S3 and Ray always want their keys."""
        return not ipaddress.ip_address(self.host).is_loopback if self.auth is None else self.auth

    @property
    def record(self) -> Path:
        """What the running stack was started with."""
        return self.home / "stack.json"


class Part(NamedTuple):
    """One server. `answers` asks whether the given process of it does its work now."""

    name: str
    command: list[str]
    address: str
    ports: dict[int, str]  # each with the field of `Ports` that moves it
    answers: Callable[[psutil.Process], bool]
    log: Path
    needs: str = ""
    before: Callable[[], str] | None = None  # done just before a start; says what it did
    owns_children: bool = True  # False: what it started outlives it, and is not stopped when it is restarted


def load_site(site: str = "local", *, starting: bool = False) -> StackConfig:
    """The `stack` section of `configs/site/<site>.yaml`; over it, while anything runs, what that was started with; over
    that the ports in UPVLA_PORTS (`mlflow=5001,s3=9333`).

    starting: only its ports, and only where the section names none. What else differs is for `up` to refuse.
    """
    root = os.environ.get("UPVLA_CONFIGS")
    path = (Path(root) if root else Path(__file__).parents[2] / "configs") / f"site/{site}.yaml"
    source: str = f"`stack` of {path}"
    kind: type[BaseModel] = StackConfig
    try:
        section = (yaml.safe_load(path.read_text()) or {}).get("stack")
        if section is None:
            raise ConfigError(f"{path} has no `stack` section: its servers run elsewhere and `upvla up` is not for it")
        config = StackConfig.model_validate({**section, "site": site})
        if (running := recorded(config)) is not None:
            moved_to = config.ports if "ports" in section else running.ports
            config = config.model_copy(update={"ports": moved_to}) if starting else running
        ports: dict[str, Any] = config.ports.model_dump()
        moved = filter(None, os.environ.get("UPVLA_PORTS", "").split(","))
        ports |= {name.strip(): number for name, _, number in (pair.partition("=") for pair in moved)}
        source, kind = "UPVLA_PORTS", Ports
        return config.model_copy(update={"ports": Ports.model_validate(ports)})
    except FileNotFoundError as error:
        raise ConfigError(f"no site {site!r}: {path} does not exist") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        from upvla.config import explained  # late: seconds of imports, which starting servers does not need

        raise ConfigError(explained(error, kind, source)) from error


def recorded(config: StackConfig) -> StackConfig | None:
    """What the processes of this home were started with. None where nothing runs, whatever a power cut left lying
    there, and where the record cannot be read."""
    if not config.record.exists() or not processes.marked(config.home):
        return None
    try:
        return StackConfig.model_validate_json(config.record.read_bytes())
    except (OSError, ValueError):
        return None


def environment(config: StackConfig) -> dict[str, str]:
    """Every variable that a client of the stack needs. Raises `StackError` before the first `up`."""
    home, ports, host = config.home, config.ports, config.host
    try:
        keys = json.loads((home / "secrets/s3.json").read_bytes())["identities"][0]["credentials"][0]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StackError(f"no stack was ever started in {home}: run `upvla up`, or set UPVLA_HOME") from error
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host, "localhost")))
    return {
        **_client_passwords(config),
        "UPVLA_SITE": config.site,
        "UPVLA_HOME": str(home),
        "UPVLA_STORE_URL": f"s3://{STORE_BUCKET}",
        "UPVLA_PAGES_URL": f"http://{host}:{ports.mlflow}",
        "UPVLA_RAY_JOBS_URL": f"http://{host}:{ports.dashboard}",
        "AWS_ENDPOINT_URL": f"http://{host}:{ports.s3}",
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_SESSION_TOKEN": "",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": f"http://{host}:{ports.mlflow}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"http://{host}:{ports.prefect}/api",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "prefect/results"),
        "RAY_ADDRESS": f"{host}:{ports.ray}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "secrets/ray_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: keeps Ray on loopback on every system
        # one build of DeepSpeed's operator for every home: set-up makes it
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(Path(sys.prefix, "torch_extensions")),
        "RAY_worker_niceness": "0",  # Ray would let training yield to everything else on the machine
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR") or ("cuda" if Path("/dev/nvidiactl").exists() else "cpu"),
        "DO_NOT_TRACK": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))),  # ninja
    }


def server_environment(config: StackConfig) -> dict[str, str]:
    """What the servers themselves get: a client's variables and their own settings, nobody else's credentials."""
    foreign = ("AWS_PROFILE", "PREFECT_API_KEY", "PREFECT_PROFILE", "RAY_AUTH_TOKEN")
    return {
        **{name: value for name, value in os.environ.items() if name not in foreign},
        **environment(config),
        **_server_passwords(config),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # seconds; SQLite on a busy machine
        # on disk: a server that is restarted and has forgotten who holds a slot never frees it, and ends every run
        # that holds one when it asks to keep it
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(config.home / "prefect/ui"),  # else inside the installed package
        "PREFECT_API_SSL_CERT_FILE": str(config.home / "secrets/authority.pem"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # seconds; Ray Train leaves an actor behind that nothing ends, and Ray would wait half a minute for it
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # seconds; flows/deploy.py says what follows from silence
    }


def _passwords(config: StackConfig) -> dict[str, str]:
    return dict(json.loads((config.home / "secrets/passwords.json").read_bytes())) if config.secured else {}


def _client_passwords(config: StackConfig) -> dict[str, str]:
    found = _passwords(config)
    if not found:
        return {}
    return {
        "PREFECT_API_AUTH_STRING": f"{_USER}:{found['prefect']}",
        "MLFLOW_TRACKING_USERNAME": _USER,
        "MLFLOW_TRACKING_PASSWORD": found["mlflow"],
    }


def _server_passwords(config: StackConfig) -> dict[str, str]:
    found = _passwords(config)
    if not found:
        return {}
    return {
        "PREFECT_SERVER_API_AUTH_STRING": f"{_USER}:{found['prefect']}",
        "MLFLOW_AUTH_CONFIG_PATH": str(config.home / "secrets/mlflow_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": found["mlflow_cookies"],
    }


def _prefect_header(config: StackConfig) -> dict[str, str]:
    return basic_login(_client_passwords(config).get("PREFECT_API_AUTH_STRING", ""))


def basic_login(pair: str) -> dict[str, str]:
    """The header for `USER:PASSWORD`; none for an empty one."""
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"} if pair else {}


def auth_files(config: StackConfig) -> dict[str, str]:
    """What `secrets/` holds for MLflow and Prefect where they ask for passwords, by file name; drawn anew each call."""
    drawn = {name: secrets.token_urlsafe(24) for name in ("prefect", "mlflow", "mlflow_cookies")}
    ini = f"""[mlflow]
default_permission = READ
database_uri = sqlite:///{config.home}/mlflow/auth.db
admin_username = {_USER}
admin_password = {drawn["mlflow"]}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
    return {"passwords.json": json.dumps(drawn), "mlflow_auth.ini": ini}


def parts(config: StackConfig) -> list[Part]:
    """The servers, in the order in which they are reported."""
    home, ports, host = config.home, config.ports, config.host
    _, master, volume, filer, admin = s3 = range(ports.s3, ports.s3 + 5)
    prefect, mlflow, ray = (f"http://{host}:{port}" for port in (ports.prefect, ports.mlflow, ports.dashboard))

    def buckets_exist(_: psutil.Process) -> bool:
        folders = [f"http://{host}:{filer}/buckets/{name}/?limit=1" for name in (STORE_BUCKET, ARTIFACT_BUCKET)]
        return all(_get(url) is not None for url in (f"http://{host}:{ports.s3}/healthz", *folders))

    def node_alive(_: psutil.Process) -> bool:
        token = (home / "secrets/ray_token").read_text()
        return b'"ALIVE"' in (_get(f"{ray}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}) or b"")

    def worker_online(process: psutil.Process) -> bool:
        asked = f"{prefect}/api/work_pools/{WORK_POOL}/workers/filter"
        workers = json.loads(_get(asked, body=b"{}", headers=_prefect_header(config)) or b"[]")
        beats = [w["last_heartbeat_time"] for w in workers if w["name"] == "upvla" and w["status"] == "ONLINE"]
        return any(datetime.fromisoformat(beat).timestamp() >= process.create_time() - 1 for beat in beats if beat)

    names: dict[str, Any] = {f"{name}_port": number for name, number in ports.model_dump().items()}
    names |= {"master": master, "volume": volume, "filer": filer, "admin": admin, "client": ports.ray + 1}
    names |= {"store": STORE_BUCKET, "artifacts": ARTIFACT_BUCKET, "pool": WORK_POOL, "limit": config.worker_limit}
    names |= {"cpus": config.num_cpus, "memory": config.object_store_mb << 20}
    names |= {"home": home, "ray_dir": ray_dir(home), "host": host}
    names |= {"mlflow_app": "--app-name=basic-auth" if config.secured else ""}

    def part(name: str, command: str, address: str, ports: dict[int, str], answers: Any, **more: Any) -> Part:
        program, *arguments = command.split()  # split first: a home with a space in it stays one argument
        start = [_program(program)] if program == "weed" else [sys.executable, "-m", program]
        start += [filled for argument in arguments if (filled := argument.format(**names))]
        return Part(name, start, address, ports, answers, home / f"logs/{name}.log", **more)

    return [
        part(
            "s3",
            "weed -logtostderr=true mini -dir={home}/s3 -ip={host} -ip.bind={host} -s3.port={s3_port}"
            " -master.port={master} -volume.port={volume} -filer.port={filer} -admin.port={admin} -admin.ui=false"
            " -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false"
            " -master.volumeSizeLimitMB=1024 -bucket={store},{artifacts} -s3.config={home}/secrets/s3.json",
            f"http://{host}:{ports.s3}",
            dict.fromkeys([*s3, *(port + 10000 for port in s3)], "s3"),
            buckets_exist,
        ),
        part(
            "mlflow",
            "mlflow server --host {host} --port {mlflow_port} --workers 1 --serve-artifacts {mlflow_app}"
            " --allowed-hosts=localhost:*,127.0.0.1:*,{host}:* --cors-allowed-origins=http://{host}:{mlflow_port}"
            " --backend-store-uri sqlite:///{home}/mlflow/mlflow.db --artifacts-destination s3://{artifacts}",
            mlflow,
            {ports.mlflow: "mlflow"},
            lambda _: _get(f"{mlflow}/health") is not None,
        ),
        part(
            "prefect",
            "prefect server start --host {host} --port {prefect_port}",
            prefect,
            {ports.prefect: "prefect"},
            lambda _: _get(f"{prefect}/api/ready") is not None,
        ),
        part(
            "ray",
            "ray.scripts.scripts start --head --block --disable-usage-stats --log-style=record"
            " --node-ip-address={host} --port={ray_port} --ray-client-server-port={client} --temp-dir={ray_dir}"
            " --dashboard-host={host} --dashboard-port={dashboard_port} --include-dashboard=true"
            " --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0"
            " --num-cpus={cpus} --object-store-memory={memory}",
            ray,
            {ports.ray: "ray", ports.ray + 1: "ray", ports.dashboard: "dashboard"},
            node_alive,
        ),
        part(
            "worker",
            "prefect worker start --pool {pool} --type process --name upvla --limit {limit} --install-policy never",
            f"{prefect}/work-pools/work-pool/{WORK_POOL}",
            {},
            worker_online,
            needs="prefect",
            before=lambda: _crash_lost_runs(home, f"{prefect}/api", _prefect_header(config)),
            owns_children=False,
        ),
    ]


def ray_dir(home: Path) -> Path:
    """Ray's folder, which holds Unix sockets: where `home` is too long for one, a link from /tmp stands for it."""
    folder = home / "ray"
    if len(str(folder)) <= _RAY_DIR_LIMIT:
        return folder
    return Path("/tmp") / f"upvla-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _crash_lost_runs(home: Path, api_url: str, headers: dict[str, str]) -> str:
    """Mark flow runs whose process is gone (a `down`, a power cut) as Crashed.

    Without it Prefect keeps them Running, and a deployment with a concurrency limit waits for them for ever.
    """
    states = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    asked = {"flow_runs": states, "work_pools": {"name": {"any_": [WORK_POOL]}}}
    runs = json.loads(_post(f"{api_url}/flow_runs/filter", asked, headers))
    living = processes.values(home, "PREFECT__FLOW_RUN_ID")
    lost = [run for run in runs if run["id"] not in living]
    crashed = {"state": {"type": "CRASHED", "message": "its process is gone: the stack was stopped. Run it again."}}
    for run in lost:
        _post(f"{api_url}/flow_runs/{run['id']}/set_state", crashed, headers)
    return ", ".join(f"flow run {run['name']} lost its process and is now Crashed: run it again" for run in lost)


def _program(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if path is None:
        raise StackError(f"the program {name!r} is not installed: run `make setup`")
    return path


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy


def _get(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes | None:
    """The reply's body, or None when nobody answers well."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with _direct.open(request, timeout=5) as reply:
            return bytes(reply.read())
    except (OSError, http.client.HTTPException):
        return None


def _post(url: str, body: Any, headers: dict[str, str]) -> bytes:
    """`_get` until it succeeds: on SQLite, Prefect answers 503 to writes that collide and expects another try."""
    for pause_s in (0.2, 0.5, 1.0, 2.0, 4.0, 0.0):
        if (reply := _get(url, json.dumps(body).encode(), headers)) is not None:
            return reply
        time.sleep(pause_s)
    raise StackError(f"{url} does not answer well: see the log of prefect (`upvla status` says where)")
