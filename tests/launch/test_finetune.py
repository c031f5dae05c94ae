"""What is new since the champion was trained, and how far it lies from what it knows; on a real MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.rollout.test_policy import make_bundle
from tests.toy_line import land
from upvla.checkpoint import export
from upvla.config import FinetuneConfig, SiteConfig, load
from upvla.data.table import Dataset, load_manifest
from upvla.errors import NotFound
from upvla.launch.finetune import Finetuning
from upvla.store import open_store
from upvla.tracking import CHAMPION, Registry

pytestmark = pytest.mark.seam
SOURCES = "mixture.sources=[{dataset: mine, kind: robot, weight: 0.5}, {dataset: yours, kind: robot, weight: 0.5}]"


def test_a_nightly_counts_what_is_new_in_every_dataset_of_its_mixture(tmp_path: Path) -> None:
    site = SiteConfig(
        home=tmp_path, store_url=str(tmp_path / "store"), tracking_url=f"sqlite:///{tmp_path}/mlflow.db", experiment="t"
    )
    line = Finetuning(site, load("finetune/ci", FinetuneConfig, [SOURCES, "model_name=upvla-test"]))
    line.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    with pytest.raises(NotFound, match=r"upvla-test has no champion to fine-tune: run `pretrain/full` first"):
        line.champion()

    land(line.store, tmp_path, "mine", (18, 20, 22, 24, 19))
    known = Dataset(line.store, load_manifest(line.store, "mine"))
    meta = {"run": "first", "step": 7, "stage": "stage2", "datasets": {"mine": {"version": 1, "content_id": "c"}}}
    bundle = replace(make_bundle(), stats=known.stats.to_json(), meta=meta)
    checkpoint, registry = export(open_store(site.store_url), "models/first/stage2", bundle), Registry(line.tracker)
    run_id = line.tracker.run_id("first/stage2", "stage2")
    registry.register("upvla-test", checkpoint, run_id, cameras=("static",), metrics={}, tags={})
    registry.set_alias("upvla-test", CHAMPION, "1")
    with pytest.raises(NotFound, match="yours"):
        line.champion()

    land(line.store, tmp_path, "yours", (18, 20, 22, 24))
    first = line.champion()
    assert (first["version"], first["new_recordings"]) == ("1", 4) and line.is_due(first)
    one = line.drift(line.mix(), first)
    assert one["metrics"]["drift/worst_shift"] > 0 and one["worst"][0]["feature"] in ("state", "actions")
    land(line.store, tmp_path, "mine", (18, 20, 22, 24, 19, 30))
    second = line.champion()
    assert second["new_recordings"] == 5
    line.drift(line.mix(), second)
    nights = line.tracker.client.get_metric_history(line.pipeline_run(), "drift/worst_shift")
    assert [point.step for point in nights] == [2, 3]  # the champion stayed, and both nights are on the curve

    skipped = line.skip(first | {"new_recordings": 0})
    assert skipped == {"skipped": True, "new_recordings": 0, "champion": "1"}
    (run,) = line.tracker.client.search_runs(
        [line.tracker.experiment_id()], "metrics.`nightly/skipped` = 1", max_results=5
    )
    assert run.data.metrics["nightly/new_recordings"] == 0
