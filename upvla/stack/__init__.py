"""The local stack: S3 (SeaweedFS), MLflow, Prefect server and worker, Ray head, as real servers on loopback.

    config = load_site("local"); up(config); os.environ.update(environment(config)); ...; down(config)

All state lies under `config.home`: data, logs/<part>.log, secrets/ (mode 0600), stack.json (what runs).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import certifi

from upvla.errors import StackError
from upvla.stack import processes
from upvla.stack.servers import (
    Part,
    Ports,
    StackConfig,
    auth_files,
    environment,
    load_site,
    parts,
    ray_dir,
    recorded,
    server_environment,
)

__all__ = ["Ports", "StackConfig", "down", "environment", "load_site", "prepare", "status", "up"]

_HUNG_S = 20.0  # a process that was there before us and has not answered for so long is replaced
_REMAINS_S = 3.0  # what a killed or hung server left behind has nothing to save
_ATTEMPTS = 2  # of a part that ends at once
_SLOW_S = 20.0  # one that lived for longer is tried again until `timeout_s`: Ray gives itself 30 s, too few under load
_REMIND_S = 15.0
_MEMORY = {
    # SeaweedFS (Go) holds 300 MB of buffers; at the default of 100 as much garbage again becomes resident with time
    "s3": {"GOGC": "25"},
    # by default GCS and the dashboard remember 100,000 ended actors, and as many tasks
    "ray": {"RAY_maximum_gcs_destroyed_actor_cached_count": "1000", "RAY_task_events_max_num_task_in_gcs": "10000"},
    # its threads come and go with flow runs, and glibc gives them up to eight arenas a core, which keep what they had
    "worker": {"MALLOC_ARENA_MAX": "2"},
}
"""Settings of one part that bound what it takes in a long life. One that is set in the environment stays as it is."""

Progress = Callable[[str], None]


def up(config: StackConfig, progress: Progress = print) -> None:
    """Start what does not run and return when everything answers; healthy parts are left alone.

    Raises `StackError` in one sentence: which part and where its log is, or who holds its port. Whatever this call
    started is stopped again when it fails or is interrupted.
    """
    with _lock(config, progress):
        attempts: dict[str, int] = {}
        try:
            prepare(config)
            listing = parts(config)
            for part in listing:
                if _process(config, part) is None:
                    if part.owns_children:
                        processes.stop(processes.marked(config.home, part.name), _REMAINS_S)
                    processes.require_free(part.name, config.host, part.ports)
            _converge(config, listing, attempts, progress)
        except BaseException:
            processes.stop([process for name in attempts for process in processes.marked(config.home, name)])
            if not processes.marked(config.home):
                _forget(config)
            raise


def down(config: StackConfig, progress: Progress = print) -> None:
    """Stop every process of this home, with everything it started; no error when nothing runs."""
    with _lock(config, progress):
        # The worker goes first: a flow run that is told to end still reports to the server.
        for name, part in (("the worker and its flow runs", "worker"), ("the servers", None)):
            if running := processes.marked(config.home, part):
                progress(f"stopping {name}: {len(running)} processes")
                processes.stop(running)
        processes.stop(processes.marked(config.home))  # what was being started meanwhile
        if left := processes.marked(config.home):
            raise StackError(f"still alive after SIGKILL: {', '.join(map(processes.describe, left))}; run it again")
        _forget(config)


def status(config: StackConfig) -> list[dict[str, Any]]:
    """Every part as {name, healthy (it answered just now), address, pid (None: does not run), log}."""
    listing = []
    for part in parts(config):
        process = _process(config, part)
        healthy, pid = process is not None and part.answers(process), process.pid if process else None
        about = {"name": part.name, "healthy": healthy, "address": part.address, "pid": pid, "log": str(part.log)}
        listing.append(about)
    return listing


def _process(config: StackConfig, part: Part) -> Any:
    return processes.main_process(config.home, part.name, part.command)


def _converge(config: StackConfig, listing: Sequence[Part], attempts: dict[str, int], progress: Progress) -> None:
    """Drive every part to health, side by side. `attempts` counts the starts of the parts started here."""
    waiting = {part.name: part for part in listing}
    since = dict.fromkeys(waiting, time.monotonic())
    reminded, started = dict(since), dict(since)
    while waiting:
        for part in [part for part in waiting.values() if part.needs not in waiting]:
            name, process, now = part.name, _process(config, part), time.monotonic()
            waited, ours, slow = now - since[name], name in attempts, now - started[name] > _SLOW_S
            if process is not None and part.answers(process):
                del waiting[name]
                progress(f"{name}: {f'healthy after {waited:.1f} s' if ours else 'already runs'} at {part.address}")
            elif ours and waited > config.timeout_s:
                raise StackError(f"{name} does not answer after {waited:.0f} s; its log is {part.log}")
            elif process is None and attempts.get(name, 0) >= _ATTEMPTS and not slow:
                raise StackError(f"{name} ended while starting: {_last_line(part.log)}; the whole log is {part.log}")
            elif process is None or (not ours and waited > _HUNG_S):
                if process is not None:
                    progress(f"{name}: process {process.pid} does not answer, replacing it")
                elif ours:
                    progress(f"{name}: ended while starting, once more: {_last_line(part.log)}")
                if part.owns_children:
                    processes.stop(processes.marked(config.home, name), _REMAINS_S)
                elif process is not None:
                    processes.stop([process], _REMAINS_S)
                processes.require_free(name, config.host, part.ports)
                if part.before and (done := part.before()):
                    progress(f"{name}: {done}")
                since[name] = since[name] if ours else now
                attempts[name], started[name] = attempts.get(name, 0) + 1, now
                known = _MEMORY.get(name, {}) | server_environment(config)
                processes.start(config.home, name, part.command, known, part.log)
            elif now - reminded[name] > _REMIND_S:
                reminded[name] = now
                progress(f"{name}: still waiting after {waited:.0f} s, log {part.log}")
        time.sleep(0.2)


def prepare(config: StackConfig) -> None:
    """Room on the disk, folders, secrets and the record, before anything is started."""
    home = config.home
    free_mb = shutil.disk_usage(home).free >> 20
    if free_mb < config.min_free_mb:
        raise StackError(
            f"only {free_mb} MB are free under {home}, the stack needs {config.min_free_mb}: "
            "free some, or set UPVLA_HOME to a folder on another disk"
        )
    if processes.marked(home) and (running := recorded(config)) != config:
        raise StackError(f"the stack in {home} runs with another {_differing(running, config)}: run `upvla down` first")
    for folder in ("logs", "ray", "s3", "mlflow", "prefect", "secrets"):
        (home / folder).mkdir(exist_ok=True, mode=0o700)
    keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    s3 = {"identities": [{"name": "upvla", "credentials": [keys], "actions": actions}]}
    wanted = {"s3.json": json.dumps(s3), "ray_token": secrets.token_hex(32), "authority.pem": _one_authority()}
    if config.secured and not (home / "secrets/mlflow_auth.ini").exists():  # written last: both belong together
        wanted |= auth_files(config)
        (home / "secrets/passwords.json").unlink(missing_ok=True)
    for name, text in wanted.items():
        if not (home / "secrets" / name).exists():
            draft = home / "secrets" / f"{name}.new"
            draft.touch(mode=0o600)
            draft.write_text(text)
            draft.rename(home / "secrets" / name)
    for old in sorted((home / "ray").glob("session_2*"))[:-3]:  # Ray itself never deletes the logs of a session
        shutil.rmtree(old, ignore_errors=True)
    if (link := ray_dir(home)) != home / "ray":
        with contextlib.suppress(FileExistsError):
            link.symlink_to(home / "ray")
        if not link.is_symlink() or link.readlink() != home / "ray":
            raise StackError(f"{link} is not our link to {home}/ray: remove it, or set UPVLA_HOME to a shorter path")
    draft = config.record.with_suffix(".new")
    draft.write_text(config.model_dump_json(indent=2))
    draft.replace(config.record)


def _one_authority() -> str:
    """The first certificate of 140. Each of Prefect's clients reads all of them (15 ms, 0.7 MB of OpenSSL's, which
    Python does not see and collects late) even where it speaks plain HTTP, as here; a flow run makes several."""
    first, end, _ = certifi.contents().partition("-----END CERTIFICATE-----\n")
    return first + end


def _differing(running: StackConfig | None, wanted: StackConfig) -> str:
    """`host (127.0.0.1, asked for 10.0.0.5)` of every setting."""
    if running is None:
        return "configuration, of which the record is lost"
    names = [name for name in StackConfig.model_fields if getattr(running, name) != getattr(wanted, name)]
    return ", ".join(f"{name} ({getattr(running, name)}, asked for {getattr(wanted, name)})" for name in names)


def _forget(config: StackConfig) -> None:
    config.record.unlink(missing_ok=True)
    link = ray_dir(config.home)
    if link.is_symlink() and link.readlink() == config.home / "ray":
        link.unlink()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300]


@contextlib.contextmanager
def _lock(config: StackConfig, progress: Progress) -> Iterator[None]:
    try:
        config.home.mkdir(parents=True, exist_ok=True)
        lock = (config.home / "lock").open("w")
    except OSError as error:
        reason = error.strerror or error
        raise StackError(f"{config.home} cannot be used ({reason}): set UPVLA_HOME to a folder of yours") from error
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another `upvla up` or `upvla down` is at work here, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
