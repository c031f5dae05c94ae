"""From an engine whose weights lie on two workers to a registered model: the same weights, and the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from tests.faults.rows import told
from tests.launch.stages import model, prepared, spec_of
from tests.train.toy import Workers
from upvla.checkpoint import Golden, load_bundle, read_marker
from upvla.launch import worker
from upvla.launch.train import RESULT
from upvla.rollout.golden import record
from upvla.store import Store, open_store
from upvla.tracking import Registry, Tracker

__all__ = ["model", "prepared"]  # fixtures

pytestmark = pytest.mark.seam
OBSERVATIONS, TOLERANCE = 4, 1e-6


def work_and_answer(settings: dict[str, Any]) -> tuple[Golden, dict[str, np.ndarray]]:
    """The worker's own body. When nothing is left to learn, the engine still in use answers held-out observations."""
    learn, live = worker._learn, list[Any]()

    def learn_and_answer(life: Any, engine: Any, point: Any) -> Any:
        learnt = learn(life, engine, point)
        with engine.evaluating():
            bundle = life.inputs.bundle(engine._objectives, {})
            live.append(record(bundle, *life.inputs.observations(OBSERVATIONS)))
        live.append({name: weight.numpy() for name, weight in engine.full_weights().items()})
        return learnt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_learn", learn_and_answer)
        worker.work(settings)
    return live[0], live[1]


def registered(url: str, cameras: tuple[str, ...], folder: Path) -> mlflow.pyfunc.PyFuncModel:
    """The checkpoint as whoever serves it gets it: a version of a registered model, loaded by its name."""
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "export")
    tracker.client.create_experiment("export", artifact_location=f"{folder}/artifacts")
    run_id = tracker.run_id("k-export", "stage1")
    checkpoint = read_marker(open_store(url))
    version = Registry(tracker).register("exported", checkpoint, run_id, cameras=cameras, metrics={}, tags={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
        mlflow.set_tracking_uri(tracker.uri)
        return mlflow.pyfunc.load_model(f"models:/exported/{version.version}")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_registered_model_is_the_engine_that_trained_it(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], zero_stage: int, tmp_path: Path
) -> None:
    store, references = prepared
    engine = {"num_workers": 2, "zero_stage": zero_stage}
    weights = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
    spec = spec_of(store, references, name=f"exported{zero_stage}", weights=weights, engine=engine)
    live, trained = two_workers.run(work_and_answer, {"spec": spec.model_dump_json(), "threads": 1})[0]
    result = store.sub(spec.prefix).read_json(RESULT)
    exported = load_bundle(result["url"]).model.state_dict()
    assert exported.keys() == trained.keys()
    apart = max(float(np.abs(exported[name].numpy() - weight).max()) for name, weight in trained.items())
    served = registered(result["url"], tuple(live.images), tmp_path)
    seen = {f"image_{camera}": frames for camera, frames in live.images.items()}
    seen |= {"state": np.zeros((OBSERVATIONS, 15), np.float32), "instruction": np.array(live.instructions)}
    answers = served.predict(seen)["actions"]
    assert answers.shape == live.actions.shape and len(answers) == OBSERVATIONS
    differ = float(np.abs(answers - live.actions).max())
    fault = f"ZeRO {zero_stage} on two workers exported, registered, loaded by MLflow"
    told(fault, lost_steps=0, bit_identical=apart == 0.0, weights_apart=apart, answers_apart=differ)
    assert apart == 0.0
    assert differ <= TOLERANCE
