"""What this machine and its servers are like, before anything long is started: each check with the next move.

    for check in examine(load_site_or_none): print(check.what, check.state, check.detail, check.next_move)

Nothing here changes anything, except for one probe object that is written to the store and deleted again.
"""

from __future__ import annotations

import http.client
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from upvla.config import SiteConfig
from upvla.errors import StackError, UpvlaError, login_of, shown
from upvla.stack import processes
from upvla.stack.servers import StackConfig, basic_login, environment, parts, recorded
from upvla.store import open_store, supports_conditional_create

State = Literal["ok", "warning", "broken"]

_WATCHED = (
    "torch",
    "deepspeed",
    "ray",
    "prefect",
    "mlflow",
    "fastapi",
    "sqlalchemy",
    "transformers",
    "pyarrow",
    "mujoco",
)
_LOCK = Path(__file__).parents[2] / "constraints.txt"
_RENDER = """
import sys, numpy as np
from upvla.sim.playtable.env import PlaytableEnv
env = PlaytableEnv("A")
try:
    about, frame = env.fingerprint(), env.observe().images["static"]
finally:
    env.close()
assert frame.std() > 5, "the picture is of one colour"
print(", ".join(f"{k} {v}" for k, v in sorted(about.items()) if "gl" in k.lower() or "render" in k.lower()))
"""
_RENDER_S = 120


class Check(NamedTuple):
    what: str
    state: State
    detail: str
    next_move: str = ""


def examine(site: SiteConfig, config: StackConfig | None) -> list[Check]:
    """All checks of a site; `config` is its local stack, None where its servers run elsewhere."""
    checks = [*_packages(), _compiler(), _disk(site.home, config)]
    running = False
    if config is not None:
        running = recorded(config) is not None
        checks += [*_ports(config), *_credentials(config)]
        if running:
            os.environ.update(environment(config))
            site = SiteConfig.model_validate(site.model_dump(include={"experiment", "num_workers", "use_gpu", "stack"}))
    if config is None or running:
        checks += [_store(site), *_servers(site)]
    else:
        checks.append(Check("servers", "warning", "the local stack does not run", "`upvla up` starts it"))
    return [*checks, _rendering()]


def _packages() -> Iterator[Check]:
    python = platform.python_version()
    fits = (3, 11) <= sys.version_info < (3, 13)
    yield Check(
        "python", "ok" if fits else "broken", python, "" if fits else "install Python 3.11; `make setup` uses it"
    )
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", _LOCK.read_text(), re.MULTILINE)) if _LOCK.exists() else {}
    lock = {name.lower(): number for name, number in locked.items()}
    for name in _WATCHED:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, "broken", "not installed", "`make setup` installs what constraints.txt locks")
            continue
        expected = lock.get(name, found.partition("+")[0])
        if found.partition("+")[0] == expected:
            yield Check(name, "ok", found)
        else:
            yield Check(name, "warning", f"{found}, tested with {expected}", f"pip install {name}=={expected}")


def _compiler() -> Check:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found:
        return Check("c++ compiler", "ok", found)
    return Check("c++ compiler", "broken", "none; DeepSpeed builds one operator", "apt-get install -y g++, or set CXX")


def _disk(home: Path, config: StackConfig | None) -> Check:
    needed_mb = config.min_free_mb if config else 2048
    home = home.expanduser().resolve()
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free_mb = shutil.disk_usage(place).free >> 20
    if not os.access(place, os.W_OK):
        return Check("disk", "broken", f"{place} cannot be written", "set UPVLA_HOME to a folder of yours")
    if free_mb < needed_mb:
        return Check(
            "disk", "broken", f"{free_mb} MB free at {place}, {needed_mb} needed", "free some, or set UPVLA_HOME"
        )
    return Check("disk", "ok", f"{free_mb} MB free at {place}")


def _ports(config: StackConfig) -> Iterator[Check]:
    for part in parts(config):
        if processes.main_process(config.home, part.name, part.command) is not None:
            yield Check(f"port of {part.name}", "ok", f"ours, {part.address}")
            continue
        try:
            processes.require_free(part.name, config.host, part.ports)
        except StackError as error:
            what, _, move = str(error).partition(": ")
            yield Check(f"port of {part.name}", "broken", what, move)
        else:
            yield Check(f"port of {part.name}", "ok", "free: " + (", ".join(map(str, part.ports)) or "needs none"))


def _credentials(config: StackConfig) -> Iterator[Check]:
    folder = config.home / "secrets"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            yield Check(f"secret {path.name}", "broken", f"others may read it ({mode:o})", f"chmod 600 {path}")
        elif not path.read_bytes().strip():
            yield Check(f"secret {path.name}", "broken", "empty", f"rm {path}; `upvla up` makes a new one")
        else:
            yield Check(f"secret {path.name}", "ok", "mode 600")


def _store(site: SiteConfig) -> Check:
    if not site.store_url:
        return Check("object store", "broken", "no address", "set UPVLA_STORE_URL, or store_url in the site file")
    store = open_store(site.store_url)
    try:
        store.list("registry/")
        if supports_conditional_create(store):
            return Check("object store", "ok", f"{site.store_url}: creates only what is not there")
    except UpvlaError as error:
        return Check("object store", "broken", str(error), "check AWS_ENDPOINT_URL and the AWS_ keys (`upvla env`)")
    move = "use a store that honours `If-None-Match: *` (AWS, SeaweedFS, MinIO); versions would be lost on this one"
    return Check("object store", "broken", f"{site.store_url} overwrites instead of refusing", move)


def _servers(site: SiteConfig) -> Iterator[Check]:
    """Each is asked for what it gives to nobody without a password; `/health` would answer everyone."""
    user, password, prefect = map(_value, ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_URL"))
    if any(login_of(site.tracking_url)):
        user, password = login_of(site.tracking_url)
    asked, login = "/api/2.0/mlflow/experiments/search", basic_login(f"{user}:{password}" if password else "")
    proof = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    yield _answers(
        "MLflow", shown(site.tracking_url), asked, login, "MLFLOW_TRACKING_URI", proof, b'{"max_results": 1}'
    )
    login, proof = basic_login(_value("PREFECT_API_AUTH_STRING")), "PREFECT_API_AUTH_STRING"
    yield _answers("Prefect", prefect, "/flows/filter", login, "PREFECT_API_URL", proof, b'{"limit": 1}')
    token = _value("RAY_AUTH_TOKEN") or _text(_value("RAY_AUTH_TOKEN_PATH"))
    login, proof = {"Authorization": f"Bearer {token}"}, "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    ray = _answers("Ray", site.ray_jobs_url, "/api/version", login, "UPVLA_RAY_JOBS_URL", proof)
    yield ray
    if ray.state == "ok":
        code = _status(f"{site.ray_jobs_url}/api/jobs/", {})
        closed = code in (401, 403)
        detail = "asked for" if closed else f"whoever reaches {site.ray_jobs_url} may run code there (status {code})"
        move = "" if closed else "start Ray with RAY_AUTH_MODE=token"
        yield Check("Ray token", "ok" if closed else "broken", detail, move)


def _answers(
    name: str, url: str, path: str, login: dict[str, str], variable: str, proof: str, body: bytes | None = None
) -> Check:
    """`variable` holds its address, `proof` our right to ask. With a body it is a POST of JSON."""
    if not url:
        return Check(name, "broken", "no address", f"set {variable}, or the site file's field")
    code, url = _status(url.rstrip("/") + path, login, body), shown(url)
    if code == 200:
        return Check(name, "ok", url)
    if code in (401, 403):
        return Check(name, "broken", f"{url} refuses our credentials ({code})", f'eval "$(upvla env)", or set {proof}')
    detail = f"{url} does not answer" if code is None else f"{url} answers with status {code}"
    return Check(name, "broken", detail, "`upvla status` shows its log; `upvla up` starts what does not run")


def _rendering() -> Check:
    """In a process of its own: a GL library that is missing may end the process that asks for it."""
    command = [sys.executable, "-c", _RENDER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RENDER_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("rendering", "broken", f"no picture within {_RENDER_S} s", "try MUJOCO_GL=osmesa or MUJOCO_GL=egl")
    if done.returncode == 0:
        return Check("rendering", "ok", done.stdout.strip() or "a picture with something on it")
    why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]
    move = "apt-get install -y libosmesa6, or MUJOCO_GL=egl where there is a GPU driver"
    return Check("rendering", "broken", why, move)


_direct: Callable[..., http.client.HTTPResponse] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def _status(url: str, headers: dict[str, str], body: bytes | None = None) -> int | None:
    """Status code of a GET, or of a POST of JSON; None where nobody answers."""
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
        with _direct(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _value(variable: str) -> str:
    return os.environ.get(variable, "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip() if path else ""
    except OSError:
        return ""
