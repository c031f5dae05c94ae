"""What the line tells MLflow: runs nested below the pipeline's, what went in and what came out of each."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upvla.checkpoint import read_facts, read_marker, read_meta
from upvla.config import LineConfig, SiteConfig, fingerprint
from upvla.data.table import load_manifest
from upvla.errors import ConfigError, StackError
from upvla.launch.scores import run_key
from upvla.launch.train import UNSENT, TrackingSpec, TrainSpec, record_of
from upvla.store import Store, content_hash, open_store
from upvla.tracking import Registry, Run, Tracker, protocol_tags
from upvla.types import Checkpoint


class Logbook:
    """The runs of one configuration on one site. `note` is told what goes on without MLflow."""

    def __init__(self, site: SiteConfig, config: LineConfig, model_name: str, note: Callable[[str], None]) -> None:
        self._site, self._config, self._model_name, self._note = site, config, model_name, note

    @property
    def tracker(self) -> Tracker:
        if not self._site.tracking_url:
            raise ConfigError("no MLflow: run `upvla up`, or set `tracking_url` in the site file")
        return Tracker(self._site.tracking_url, self._site.experiment, self._site.pages_url)

    @contextmanager
    def run(self, key: str, name: str, **about: Any) -> Iterator[Run]:
        """The run `key`, open for the length of the block."""
        run = self.tracker.start(key, name, **about)
        try:
            yield run
        finally:
            run.close()

    @contextmanager
    def pipeline(self, **about: Any) -> Iterator[Run]:
        """The run that this configuration's stages nest under, open for the length of the block."""
        with self.run(self._pipeline_key, self._config.name, **about) as run:
            yield run

    def pipeline_id(self) -> str:
        return self.tracker.run_id(self._pipeline_key, self._config.name)

    def parent_id(self) -> str | None:
        """Id of the pipeline's run; None while MLflow is away: a run that is there already stays where it hangs."""
        try:
            return self.pipeline_id()
        except StackError as error:
            self._note(f"going on without MLflow: {error}")
            return None

    @property
    def _pipeline_key(self) -> str:
        return f"pipeline/{fingerprint(self._config)}"

    def tags(self, meta: Mapping[str, Any]) -> dict[str, str]:
        """Of a run, a model or a version: what it was learnt from, and by what.

        A checkpoint's `meta` says which configuration and code trained it; who registers it may have others.
        """
        return {
            "mixture": str(meta.get("train_plan", "")),
            "datasets": ", ".join(f"{n}@{d['version']}" for n, d in meta.get("datasets", {}).items()),
            "config": meta.get("config") or fingerprint(self._config),
            "git_commit": meta.get("git_commit") or git_commit(),
        }

    # ------------------------------------------------------------------------------------------------- training

    def of_training(self, meta: Mapping[str, Any]) -> TrackingSpec | None:
        """Where a training run on what `meta` says is logged."""
        if not self._site.tracking_url:
            return None
        return TrackingSpec(uri=self._site.tracking_url, experiment=self._site.experiment, tags=self.tags(meta))

    def nested(self, spec: TrainSpec) -> TrainSpec:
        """The stage below the pipeline's run. Asked only where there is something to train."""
        if spec.tracking is None:
            return spec
        return spec.model_copy(update={"tracking": spec.tracking.model_copy(update={"parent": self.parent_id()})})

    def training_id(self, checkpoint: Checkpoint) -> str:
        """Id of the run of the stage that exported this checkpoint."""
        return self.tracker.run_id(*_training_run(checkpoint), self.pipeline_id())

    def log_checkpoint(self, url: str, store: Store) -> None:
        """An exported checkpoint as a model of its training run, with the data that went in and the losses it came to.

        Training does not wait for MLflow, nor fail with it: registering the model logs what is missing.
        """
        if not self._site.tracking_url:
            return
        checkpoint, meta = read_marker(open_store(url)), read_meta(url)
        self.send_late(store.sub(f"runs/{_training_run(checkpoint)[0]}"))
        tags = self.tags(meta) | {"stats_id": content_hash(read_facts(url).stats)}
        last = {f"held_out/{name}": row["last"] for name, row in meta.get("losses", {}).items()}
        losses = {name: float(value) for name, value in last.items() if value is not None}  # of one that diverged
        try:
            run_id = self.training_id(checkpoint)
            used = [load_manifest(store, n, d["version"]) for n, d in meta.get("datasets", {}).items()]
            self.tracker.log_datasets(run_id, used, store.url)
            name = f"{self._model_name}-{_training_run(checkpoint)[1]}"
            Registry(self.tracker).log_model(name, checkpoint, run_id, metrics=losses, tags=tags)
        except StackError as error:
            self._note(f"the checkpoint is safe at {url}, MLflow does not know of it yet: {error}")

    def send_late(self, place: Store) -> None:
        """What a stage with the prefix `place` measured at its end while MLflow was away."""
        if not self._site.tracking_url or (late := record_of(place, UNSENT)) is None:
            return
        with self.run(**late["run"]) as run:
            run.replay(late["points"])
        if run.unsent():
            self._note(f"MLflow has not had all of {late['run']['name']}'s curves yet; they are kept at {place.url}")
        else:
            place.delete(UNSENT)

    # --------------------------------------------------------------------------------------------------- scores

    @contextmanager
    def scored(self, checkpoint: Checkpoint, protocols: Mapping[str, str]) -> Iterator[Run]:
        """The run with a model's scores under `protocols`, {suite: fingerprint}: the one that trained it, or one below
        that where it has scores under others, which would stand under the same names."""
        key, name = _training_run(checkpoint)
        parent = self.pipeline_id()
        trained = self.tracker.run_id(key, name, parent)
        known = self.tracker.protocols(trained)
        if any(known.get(suite, mark) != mark for suite, mark in protocols.items()):
            key, name, parent = run_key(checkpoint.model_id, protocols), f"{name}, other protocol", trained
        with self.run(key, name, parent=parent, tags=protocol_tags(protocols)) as run:
            yield run

    def log_scores(
        self, checkpoint: Checkpoint, scores: Mapping[str, Mapping[str, float]], protocols: Mapping[str, str]
    ) -> None:
        """`scores` by policy: the model's go to a run of its own, a reference policy's to one of each protocol's:
        comparable. All at one step: MLflow then draws bars beside each other, not points on a curve.
        """
        for policy, metrics in scores.items():
            if policy == self._model_name:
                opened = self.scored(checkpoint, protocols)
            else:
                about = {"parent": self.pipeline_id(), "tags": protocol_tags(protocols)}
                opened = self.run(run_key(policy, protocols), f"reference {policy}", **about)
            with opened as run:
                run.log(metrics, 0)

    def log_films(self, checkpoint: Checkpoint, films: Mapping[str, bytes], protocols: Mapping[str, str]) -> None:
        """Videos and pictures, by file name, beside the scores."""
        with self.scored(checkpoint, protocols) as run, tempfile.TemporaryDirectory() as folder:
            for name, data in films.items():
                path = Path(folder, name)
                path.write_bytes(data)
                run.artifact(path, "rollouts")


def _training_run(checkpoint: Checkpoint) -> tuple[str, str]:
    """Key and name of the MLflow run of the stage that exported this checkpoint (`models/<run>/<stage>`)."""
    stage = checkpoint.url.rpartition("/")[2]
    return f"{checkpoint.run}/{stage}", stage


def git_commit() -> str:
    """Of the code that runs: what its image was built from (`UPVLA_GIT_COMMIT`), or the checkout; else `unknown`."""
    if given := os.environ.get("UPVLA_GIT_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
