"""Replaying a dataset in real CALVIN: refusals everywhere, the real thing where UPVLA_CALVIN names a checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from upvla.data.ingest import IngestConfig, ingest
from upvla.errors import ConfigError
from upvla.launch.benchmarks import replay_dataset
from upvla.rollout.benchmarks import Places
from upvla.store import open_store

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
