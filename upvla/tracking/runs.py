"""Runs and their metrics.

Runs are found by a deterministic key (a tag), so that logging a run twice attaches to it instead of making a second
one. Metrics are sent by a thread: training never waits for MLflow, and a server that is down costs one warning; what
was measured meanwhile is kept (up to a limit) and sent once when it is back. A metric point is its (name, step):
points that the server already has are not sent again, so a resumed run, which brings along what was unsent when it was
saved (`unsent`, `replay`), continues its curves without doubles and gaps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from requests import RequestException

from upvla.errors import ConfigError, NotFound, StackError, UpvlaError, cause, login_of, shown
from upvla.types import Manifest

log = logging.getLogger(__name__)

PROTOCOL = "protocol."
"""Tags that begin so say by which protocol the scores of a suite came: `protocol.<suite>` = fingerprint."""
_KEY = "upvla.key"
_FLUSH_S = 1.0
_RETRY_S = 10.0
_SPOOL = 200_000  # metric points kept while the server is away; the oldest go first
_PICTURES = 100
_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
BATCH = 900  # MLflow takes at most 1000 entries a request
_MAKING = threading.Lock()  # a run's sender and whoever logs to it may ask for its id at the same moment


class Tracker:
    """One experiment on one tracking server. Making one contacts nobody; methods raise `StackError` if it is down."""

    def __init__(self, uri: str, experiment: str, pages_url: str = "") -> None:
        """`pages_url` is the server's address for browsers, where that is another than `uri`. A login in `uri` goes
        where MLflow's client looks for one, so nothing that is made from the address holds it."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is `--json`'s
        if uri.startswith(("http://", "https://")):
            _use_login(uri)
            uri = shown(uri)
        self.uri, self.shown = uri, shown(uri)
        self.experiment = experiment
        self._pages_url = pages_url or uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def experiment_id(self) -> str:
        with translated(self.uri):
            with contextlib.suppress(MlflowException):  # it exists, or somebody was faster: the look-up decides
                if self.client.get_experiment_by_name(self.experiment) is None:
                    self.client.create_experiment(self.experiment)
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                raise StackError(
                    f"MLflow at {self.uri} cannot make experiment {self.experiment!r}: restore or rename it"
                )
            return str(found.experiment_id)

    def run_id(self, key: str, name: str, parent: str | None = None) -> str:
        """Id of the run with this key, created if there is none; `parent` is the id of the run it nests under.

        Threads of one process always agree. Two processes that create it at the same moment may not: MLflow has
        nothing that only one of them can make.
        """
        experiment_id = self.experiment_id()
        with _MAKING, translated(self.uri):
            if found := self._find(experiment_id, key):
                return found[0]
            tags = {_KEY: key} | ({"mlflow.parentRunId": parent} if parent else {})
            made = str(self.client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
            first = self._find(experiment_id, key)[0]
            if first != made:  # two creators at once: the earlier run stays
                self.client.delete_run(made)
            return first

    def log_datasets(self, run_id: str, manifests: Sequence[Manifest], store_url: str) -> None:
        """Dataset versions as inputs of a run; the digest is the content id. Logging one again changes nothing."""
        inputs = []
        for manifest in manifests:
            counts = {"recordings": manifest.num_episodes, "segments": manifest.num_spans, "steps": manifest.num_steps}
            source = json.dumps({"uri": f"{store_url}/datasets/{manifest.dataset}", "version": manifest.version})
            about = (f"{manifest.dataset}@{manifest.version}", manifest.content_id, "upvla", source)
            inputs.append(
                DatasetInput(Dataset(*about, profile=json.dumps(counts)), [InputTag("mlflow.data.context", "training")])
            )
        with translated(self.uri):
            self.client.log_inputs(run_id, inputs)

    def protocols(self, run_id: str) -> dict[str, str]:
        """{suite: fingerprint} of the scores that a run has; `unknown` where nothing says by which they came."""
        with translated(self.uri):
            data = self.client.get_run(run_id).data
        scored = {name.removesuffix("/avg_len"): "unknown" for name in data.metrics if name.endswith("/avg_len")}
        tagged = {tag: mark for tag, mark in data.tags.items() if tag.startswith(PROTOCOL)}
        return scored | {tag.removeprefix(PROTOCOL): mark for tag, mark in tagged.items()}

    def run_page(self, run_id: str, folder: str = "") -> str:
        """Where a browser finds a run, or a folder of its artifacts."""
        place = f"artifacts/{folder}" if folder else ""
        return f"{self._pages()}/experiments/{self.experiment_id()}/runs/{run_id}/{place}".rstrip("/")

    def version_page(self, name: str, version: str) -> str:
        """Where a browser finds a registered version."""
        return f"{self._pages()}/models/{quote(name, safe='')}/versions/{version}"

    def _pages(self) -> str:
        """Root of the server's pages: its address, without the password that it may hold."""
        return shown(self._pages_url).rstrip("/") + "/#"

    def artifacts(self, run_id: str, folder: str) -> list[str]:
        """Paths of a run's artifacts in a folder."""
        with translated(self.uri):
            return sorted(item.path for item in self.client.list_artifacts(run_id, folder))

    def start(
        self,
        key: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Run:
        """Attach to the run `key` or begin it, in the background: returns at once, whether the server is up or not."""
        return Run(self, key, name, parent, params or {}, tags or {})

    def _find(self, experiment_id: str, key: str) -> list[str]:
        runs = self.client.search_runs(
            [experiment_id], f"tags.`{_KEY}` = '{key}'", order_by=["attributes.start_time ASC", "attributes.run_id ASC"]
        )
        return [str(run.info.run_id) for run in runs]


class Point(NamedTuple):
    name: str
    value: float
    step: int
    time_ms: int


class Run:
    """One MLflow run. Nothing here raises because MLflow is away, except `run_id`."""

    def __init__(
        self,
        tracker: Tracker,
        key: str,
        name: str,
        parent: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        self._tracker, self._client = tracker, tracker.client
        self._identity = (key, name, parent)
        self._about = (flatten(params), tags)
        self._head: tuple[dict[str, Any], Mapping[str, str]] | None = self._about
        self._spool: deque[Point] = deque(maxlen=_SPOOL)
        self._on_the_way: list[Point] = []
        self._taking = threading.Lock()
        self._pictures: deque[tuple[np.ndarray, str]] = deque(maxlen=_PICTURES)
        self._newest: dict[str, int] = {}  # metric -> newest step that the server has
        self._run_id: str | None = None
        self._warned, self._warning = False, threading.Lock()
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send_forever, name=f"mlflow-{name}", daemon=True)
        self._sender.start()

    @property
    def run_id(self) -> str:
        """Raises `StackError` when MLflow cannot be reached."""
        if self._run_id is None:
            self._run_id = self._tracker.run_id(*self._identity)
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue points; never blocks. Values that are not finite are left out: MLflow cannot draw them."""
        now_ms = int(time.time() * 1000)
        self.replay([Point(n, float(v), step, now_ms) for n, v in metrics.items() if math.isfinite(v)])

    def unsent(self) -> list[Point]:
        """Points that the server has not said to have: what is lost with this process, if nobody keeps it."""
        with self._taking:
            return [*self._on_the_way, *self._spool]

    def replay(self, points: Iterable[Sequence[Any]]) -> None:
        """Queue what `unsent` gave, here or in a process before this one. What has arrived since is not sent again."""
        with self._taking:
            self._spool.extend(Point(*point) for point in points)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file: a video, a picture, a report."""
        self._quietly(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def picture(self, image: np.ndarray, name: str) -> None:
        """Queue u8[H,W,3] as an image artifact called `name` (with its suffix); never blocks."""
        self._pictures.append((image, name))

    def record(self, value: Any, name: str) -> None:
        """A JSON artifact."""
        self._quietly(lambda: self._client.log_dict(self.run_id, value, name))

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Send what is left, for at most `timeout_s`, and mark the run `FINISHED`, `FAILED` or `KILLED`, unless it is
        empty: then it is somebody else's by now."""
        self._closing.set()
        self._sender.join(timeout_s)
        if (points := self.unsent()) or self._pictures:
            unsent = len(points), len(self._pictures)
            log.warning("MLflow at %s: %d metric points and %d pictures were never sent", self._tracker.shown, *unsent)
        if status:
            self._quietly(lambda: self._client.set_terminated(self.run_id, status))

    def _send_forever(self) -> None:
        while not self._closing.is_set():
            self._closing.wait(_FLUSH_S if self._send_all() else _RETRY_S)
        self._send_all()

    def _send_all(self) -> bool:
        try:
            with translated(self._tracker.uri):
                self._send_head()
                while self._take():
                    self._send(self._on_the_way)
                    self._on_the_way = []
                while self._pictures:  # one that arrives twice replaces itself
                    self._client.log_image(self.run_id, *self._pictures[0])
                    self._pictures.popleft()
        except UpvlaError as error:
            if isinstance(error, NotFound):  # somebody has removed the run, or restored an older server: make it again
                self._run_id, self._head = None, self._about
            self._newest.clear()  # whether the last batch arrived is unknown: ask before sending it again
            self._warn_once(error)
            return False
        if self._warned:
            log.warning("MLflow at %s is back; what was measured meanwhile has been sent", self._tracker.shown)
        self._warned = False
        return True

    def _take(self) -> list[Point]:
        """The next points to send: those of a request that failed, or the oldest of the spool."""
        with self._taking:
            if not self._on_the_way:
                self._on_the_way = [self._spool.popleft() for _ in range(min(BATCH, len(self._spool)))]
            return self._on_the_way

    def _send_head(self) -> None:
        if self._head is None:
            return
        params, tags = self._head
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, str(value)[:6000]) for name, value in params.items() if name not in known]
        if not self._closing.is_set():  # else `close` says how it ended, and perhaps already has
            self._client.update_run(self.run_id, status="RUNNING")
        self._client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])
        for i in range(0, len(new), 100):  # MLflow takes at most 100 params a request
            self._client.log_batch(self.run_id, params=new[i : i + 100])
        self._head = None

    def _send(self, points: Sequence[Point]) -> None:
        self._ask_for_newest({point.name for point in points} - self._newest.keys())
        fresh = [Metric(p.name, p.value, p.time_ms, p.step) for p in points if p.step > self._newest[p.name]]
        if fresh:
            self._client.log_batch(self.run_id, metrics=fresh)
        self._newest |= {metric.key: metric.step for metric in fresh}

    def _ask_for_newest(self, names: set[str]) -> None:
        """One request for metrics that the run does not have yet: an evaluation brings hundreds of them."""
        if not names:
            return
        known = self._client.get_run(self.run_id).data.metrics
        for name in names:
            history = self._client.get_metric_history(self.run_id, name) if name in known else []
            self._newest[name] = max((point.step for point in history), default=-1)

    def _quietly(self, send: Callable[[], object]) -> None:
        try:
            with translated(self._tracker.uri):
                send()
        except (UpvlaError, OSError) as error:
            self._warn_once(error)

    def _warn_once(self, error: Exception) -> None:
        with self._warning:  # the sender's thread and the caller's may find out at the same moment
            if not self._warned:
                log.warning("%s; going on without it, metrics are kept until it is back", error)
            self._warned = True


def _use_login(uri: str) -> None:
    """Put the login of `uri`, or of an MLFLOW_TRACKING_URI that names the same server, into MLflow's own variables."""
    given = next((each for each in (uri, os.environ.get("MLFLOW_TRACKING_URI", "")) if any(login_of(each))), "")
    if shown(given).rstrip("/") != shown(uri).rstrip("/"):
        return
    for name, value in zip(_LOGIN, login_of(given), strict=True):
        if (os.environ.get(name) or value) != value:
            raise ConfigError(
                f"MLflow at {uri}: its address holds another login than {' and '.join(_LOGIN)}: take it out of the "
                "address, or unset these"
            )
        os.environ[name] = value


def protocol_tags(protocols: Mapping[str, str]) -> dict[str, str]:
    """Of whatever has scores under these protocols, {suite: fingerprint}: a run, a logged model, a version."""
    return {f"{PROTOCOL}{suite}": mark for suite, mark in protocols.items()}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `a.b.c` keys: what MLflow shows as params."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """MLflow's errors in our words."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise NotFound(f"MLflow at {uri}: {error.message}") from cause(error, uri)
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            refused = f"MLflow at {uri} refuses our login: set {' and '.join(_LOGIN)}, and for training where Ray runs"
            raise StackError(refused) from cause(error, uri)
        raise StackError(f"MLflow at {uri}: {error.message}; is it up? (`upvla status`)") from cause(error, uri)
    except RequestException as error:  # of artifacts, whose errors MLflow's client hands on as they come
        said = f"MLflow at {uri}: {error}; are it and its object store up? (`upvla status`)"
        raise StackError(said) from cause(error, uri)
