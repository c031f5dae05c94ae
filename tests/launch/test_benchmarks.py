"""Replaying a dataset in real CALVIN: refusals everywhere, the real thing where UPVLA_CALVIN names a checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.launch.conftest import RayHead
from upvla.data.ingest import IngestConfig, ingest
from upvla.errors import ConfigError
from upvla.launch.benchmarks import evaluate_suite, replay_dataset
from upvla.rollout.benchmarks import Places
from upvla.store import open_store
from upvla.tracking import Tracker

MINI = Path(os.environ.get("UPVLA_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "calvin_mini" / "training"


@pytest.mark.seam
def test_a_suite_that_cannot_be_set_to_a_recorded_state_is_refused(tmp_path: Path) -> None:
    if not MINI.is_dir():
        pytest.skip("the small real CALVIN recording is not on this machine (UPVLA_SHARED)")
    store = open_store(str(tmp_path))
    ingest(store, IngestConfig(format="calvin", dataset="mini"), str(MINI))
    with pytest.raises(ConfigError, match="replay needs worlds that can be set to a recorded state"):
        replay_dataset(store, "mini@1", "metaworld-push", Places())


@pytest.mark.slow
def test_most_recorded_segments_of_real_calvin_succeed_again(tmp_path: Path) -> None:
    if "UPVLA_CALVIN" not in os.environ or importlib.util.find_spec("pybullet") is None or not MINI.is_dir():
        pytest.skip("real CALVIN: set UPVLA_CALVIN and UPVLA_SHARED, and `pip install upvla[calvin]`")
    store = open_store(str(tmp_path / "store"))
    ingest(store, IngestConfig(format="calvin", dataset="mini", options={"span_end": "inclusive"}), str(MINI))
    places = Places(calvin=os.environ["UPVLA_CALVIN"], cache=str(tmp_path))
    found = replay_dataset(store, "mini@1", "calvin-d", places)
    assert found["chains"] == 9 and found["errors"] == {}
    assert found["success"][0] >= 7 / 9, found["per_task"]
    again = replay_dataset(store, "mini@1", "calvin-d", places)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.seam
def test_scores_report_and_videos_go_to_mlflow(ray_head: RayHead, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "tests")
    experiment = tracker.client.create_experiment("tests", artifact_location=f"{tmp_path}/artifacts")
    places, out = Places(cache=str(tmp_path / "cache")), str(tmp_path / "films")
    about = {"num": 1, "references": False, "videos": 1, "out": out, "tracker": tracker}
    found = evaluate_suite("expert", "playtable-a", places, **about)  # type: ignore[arg-type]
    again = evaluate_suite("expert", "playtable-a", places, **about)  # type: ignore[arg-type]
    assert again == found
    (run,) = tracker.client.search_runs([experiment])
    assert run.data.tags["protocol"] == found["fingerprint"]
    assert run.data.metrics["playtable-a/avg_len"] == found["average_length"] >= 1
    assert run.data.params["protocol.env.renderer"] == found["protocol"]["env.renderer"]
    assert {item.path for item in tracker.client.list_artifacts(run.info.run_id)} == {"report.json", "rollouts"}
    assert Path(out, "chain-000.mp4").stat().st_size > 10_000
