"""The registry: versions of a model that point at exported checkpoints, and the aliases that say which one is used."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

import upvla.rollout
from upvla.errors import require_no_login
from upvla.tracking.runs import BATCH, PROTOCOL, Tracker, translated
from upvla.types import Checkpoint, ModelVersion

CHAMPION = "champion"


class Registry:
    """Registered models on a tracker's server. Methods raise `StackError` if it is down."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._uri, self._client = tracker, tracker.uri, tracker.client

    def register(
        self,
        name: str,
        checkpoint: Checkpoint,
        run_id: str,
        *,
        cameras: Sequence[str],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        scored_in: str = "",
    ) -> ModelVersion:
        """A version of `name` that points at `checkpoint`; registering the same checkpoint again, or by two at once,
        gives one version, which then has the later scores and their protocols, and is otherwise as it was.

        What is registered is code (`rollout/pyfunc.py`) and a JSON reference: weights stay where they were exported,
        and are hash-checked when the model is loaded. `metrics` are attached to the logged model; they are of the run
        `scored_in`, by default `run_id`.
        """
        for known in self.versions(name):
            if known.checkpoint.model_id == checkpoint.model_id:
                protocols = {tag: mark for tag, mark in tags.items() if tag.startswith(PROTOCOL)}
                self.log_model(name, checkpoint, run_id, metrics=metrics, tags=protocols, scored_in=scored_in)
                self.tag(name, known.version, protocols)
                return replace(known, tags={**known.tags, **protocols})
        reference = _reference(checkpoint)
        model = self.log_model(name, checkpoint, run_id, metrics=metrics, tags=tags, scored_in=scored_in)
        with translated(self._uri), tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "checkpoint.json")
            path.write_text(json.dumps(reference, indent=1))
            with warnings.catch_warnings():  # MLflow would rather infer the signature than be given one
                warnings.simplefilter("ignore", UserWarning)
                mlflow.pyfunc.save_model(
                    path=Path(folder, "model"),
                    python_model=Path(upvla.rollout.__file__).with_name("pyfunc.py"),
                    artifacts={"checkpoint": str(path)},
                    signature=_signature(cameras),
                    pip_requirements=["upvla"],
                    mlflow_model=Model(run_id=run_id, model_id=model.model_id),
                )
            self._client.log_model_artifacts(model.model_id, str(Path(folder, "model")))
            with contextlib.suppress(MlflowException):  # it exists already, or creating the version says what is wrong
                self._client.create_registered_model(name)
            made = self._client.create_model_version(
                name, model.artifact_location, run_id, tags=dict(tags) | reference, model_id=model.model_id
            )
        twins = [found for found in self.versions(name) if found.checkpoint.model_id == checkpoint.model_id]
        first = min(twins, key=lambda found: int(found.version))
        if first.version != str(
            made.version
        ):  # two at once: numbers are given in order, so the later one sees the earlier
            with translated(self._uri):
                self._client.delete_model_version(name, str(made.version))
        return first

    def log_model(
        self,
        name: str,
        checkpoint: Checkpoint,
        run_id: str,
        *,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        scored_in: str = "",
    ) -> LoggedModel:
        """MLflow's model of `checkpoint`, which has one whether it is ever registered or not: what its pages compare.

        Metrics that it has already of their run (`scored_in`, by default `run_id`) are not logged again.
        """
        scored_in, reference = scored_in or run_id, _reference(checkpoint)
        experiment_id = self._tracker.experiment_id()
        with translated(self._uri):
            wanted, oldest_first = f"params.model_id = '{checkpoint.model_id}'", [{"field_name": "creation_timestamp"}]
            found = self._client.search_logged_models([experiment_id], wanted, order_by=oldest_first)
            if found:
                model = found[0]
                self._client.set_logged_model_tags(model.model_id, dict(tags))
            else:
                about: dict[str, Any] = {"tags": dict(tags), "params": reference, "model_type": "policy"}
                model = self._client.create_logged_model(experiment_id, name, run_id, **about)
                model = self._client.finalize_logged_model(model.model_id, "READY")
            known = {metric.key for metric in model.metrics or () if metric.run_id == scored_in}
            now_ms = int(time.time() * 1000)
            new = [
                Metric(key, metrics[key], now_ms, 0, model_id=model.model_id, run_id=scored_in)
                for key in sorted(metrics.keys() - known)
            ]
            for start in range(0, len(new), BATCH):
                self._client.log_batch(scored_in, metrics=new[start : start + BATCH])
            return model

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model, newest first; none if the name is unknown."""
        with translated(self._uri):
            found = self._client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
            return [_version(each) for each in found]

    def by_alias(self, name: str, alias: str = CHAMPION) -> ModelVersion | None:
        """The version that `alias` points at, or None."""
        with translated(self._uri):
            registered = self._client.search_registered_models(f"name = '{name}'")
            version = registered[0].aliases.get(alias) if registered else None
            return None if version is None else _version(self._client.get_model_version(name, version), alias)

    def set_alias(self, name: str, alias: str, version: str) -> ModelVersion:
        """Point `alias` at `version`, atomically; what it pointed at before is only not called so any more."""
        with translated(self._uri):
            self._client.set_registered_model_alias(name, alias, version)
            return _version(self._client.get_model_version(name, version), alias)

    def tag(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        with translated(self._uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)

    def describe(self, name: str, version: str, markdown: str) -> None:
        """The model card: what the version's page shows."""
        with translated(self._uri):
            self._client.update_model_version(name, version, markdown)


def _signature(cameras: Sequence[str]) -> ModelSignature:
    """B observations to B action chunks: what `rollout/pyfunc.py` takes and gives."""
    frames = [TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3), f"image_{camera}") for camera in cameras]
    state = TensorSpec(np.dtype(np.float32), (-1, -1), "state")
    instruction = TensorSpec(np.dtype(str), (-1,), "instruction")
    actions = TensorSpec(np.dtype(np.float32), (-1, -1, -1), "actions")
    return ModelSignature(inputs=Schema([*frames, state, instruction]), outputs=Schema([actions]))


def _reference(checkpoint: Checkpoint) -> dict[str, str]:
    require_no_login("checkpoint", checkpoint.url)
    return {
        "checkpoint_url": checkpoint.url,
        "model_id": checkpoint.model_id,
        "checkpoint_step": str(checkpoint.step),
        "checkpoint_run": checkpoint.run,
    }


def _version(version: Any, alias: str = "") -> ModelVersion:
    tags = dict(version.tags)
    checkpoint = Checkpoint(
        url=tags.get("checkpoint_url", ""),
        model_id=tags.get("model_id", ""),
        step=int(tags.get("checkpoint_step", 0)),
        run=tags.get("checkpoint_run", ""),
    )
    return ModelVersion(version.name, str(version.version), alias, checkpoint, tags)
