"""Serving a registered model or a checkpoint: the registry says which, the checkpoint is verified, uvicorn listens."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upvla.checkpoint import load_bundle, read_marker
from upvla.errors import ConfigError, Mismatch, NoAnswer
from upvla.rollout.benchmarks import line_suite
from upvla.rollout.client import TOKEN, RemotePolicy
from upvla.rollout.evaluate import EvalConfig, scores, summarise
from upvla.rollout.golden import proven
from upvla.rollout.judge import SuiteJudge
from upvla.rollout.predictor import Load, Served
from upvla.rollout.protocol import identity, protocol
from upvla.rollout.server import PolicyServer, ServerConfig, as_uvicorn
from upvla.store import content_hash, open_store
from upvla.types import ModelVersion, Observation

Newest = Callable[[], ModelVersion | str]
"""What is to be served now: a version of the registry (asked again and again), or the URL of a checkpoint."""

_WARM_PX, _WARM_STATE = 200, 15
_AGAIN_S, _AT_MOST_S = 10.0, 300.0  # between two attempts to load one model


def loader(newest: Newest) -> Load:
    """Loads what `newest` names, whenever that has changed; every hash is checked before anything is parsed.

    A model that could not be loaded is tried again later and later, since reading it costs what serving has; another
    one is tried at once.
    """
    failed, pause_s, due = "", 0.0, 0.0

    def load(known: str) -> Served | None:
        nonlocal failed, pause_s, due
        found = newest()
        url, version = (found, "") if isinstance(found, str) else (found.checkpoint.url, found.version)
        model_id = read_marker(open_store(url)).model_id
        if not isinstance(found, str) and model_id != found.checkpoint.model_id:
            raise Mismatch(
                f"{url} holds model {model_id}, version {version} was registered as {found.checkpoint.model_id}"
            )
        if model_id != failed:
            failed, pause_s, due = "", _AGAIN_S, 0.0
        if model_id == known or time.monotonic() < due:
            return None
        try:
            return _opened(url, model_id, version)
        except Exception:
            failed, due = model_id, time.monotonic() + pause_s
            pause_s = min(2 * pause_s, _AT_MOST_S)
            raise

    return load


def _opened(url: str, model_id: str, version: str) -> Served:
    bundle = load_bundle(url)
    cameras = bundle.config.cameras
    policy = proven(bundle, model_id)
    blank = {camera: np.zeros((_WARM_PX, _WARM_PX, 3), np.uint8) for camera in cameras}
    policy.reset("warm up")  # the first prediction builds what later ones reuse
    policy.act(Observation(blank, np.zeros(_WARM_STATE, np.float32)))
    return Served(policy, model_id, version, cameras, content_hash(bundle.stats))


def serve(newest: Newest, config: ServerConfig, token: str, say: Callable[[str], None], threads: int = 1) -> None:
    """Serve until told to stop (SIGINT, SIGTERM).

    With `threads` of 1 answers are those of an evaluation but for rounding: its passes have other `slots`.
    """
    torch.set_num_threads(threads)
    listening = _listen(config)
    host, port = listening.getsockname()[:2]
    server = PolicyServer(loader(newest), token, config)
    served = server.served
    say(f"serving {served.model_id} (version {served.version or 'none'}) at ws://{host}:{port}")
    with listening:
        as_uvicorn(server).run(sockets=[listening])


def evaluate_served(policy_url: str, config: EvalConfig) -> dict[str, Any]:
    """Closed-loop scores of the policy behind `policy_url`, from this process, as a robot would drive it.

    Raises `NoAnswer` where a chain ended because the server said nothing: that is no score of its policy.
    """
    with RemotePolicy(policy_url) as policy:
        about = dict(policy.about)
    found: dict[str, dict[str, Any]] = {}
    protocols: dict[str, str] = {}
    for suite in config.suites:
        opened = line_suite(config, suite)
        chains = opened.chains(suite.num)
        asked, cameras = protocol(opened, chains, config.control)
        who = identity(policy_url, opened, cameras)
        records = SuiteJudge(opened, policy_url, config.control)(list(enumerate(chains)))
        if lost := [record for record in records if record.error.startswith(NoAnswer.__name__)]:
            raise NoAnswer(
                "away",
                f"{len(lost)} of {len(records)} chains of {suite.name} got no answer, the first: "
                f"{lost[0].error}; nothing is scored. A slow machine: `upvla serve --deadline-ms 60000`",
            )
        report = summarise(about["model_id"], suite.name, asked, who, records)
        protocols[suite.name] = report.fingerprint
        found |= {name: estimate._asdict() for name, estimate in scores(report).items()}
    return {"model_id": about["model_id"], "version": about["version"], "scores": found, "protocols": protocols}


def server_token(home: Path) -> tuple[str, str]:
    """(token, where it comes from): the environment's, else the one of `home`, made at the first use, mode 0600."""
    if given := os.environ.get(TOKEN):
        return given, f"${TOKEN}"
    path = home.expanduser().resolve() / "secrets/policy_token"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):  # of two servers that start at once one's token counts
            os.link(draft, path)
        draft.unlink()
    token = path.read_text().strip()
    if not token:
        raise ConfigError(f"{path} is empty: delete it and a new token is made, or set {TOKEN}")
    return token, str(path)


def _listen(config: ServerConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error}; another port: `--port`, 0 for a free one"
        ) from error
