"""Registering what a line made, on a real MLflow: the first is champion, the next a challenger, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.test_policy import make_bundle
from upvla.checkpoint import Bundle, export
from upvla.config import FinetuneConfig, RunConfig, SiteConfig, load
from upvla.errors import Mismatch
from upvla.launch.finetune import Finetuning
from upvla.launch.pretrain import Pretraining
from upvla.launch.promote import history
from upvla.model.upvla import UPVLA
from upvla.store import open_store
from upvla.tracking import Registry

pytestmark = pytest.mark.seam


def test_first_champion_then_challenger_then_back(tmp_path: Path) -> None:
    site = SiteConfig(
        home=tmp_path, store_url=str(tmp_path / "store"), tracking_url=f"sqlite:///{tmp_path}/mlflow.db", experiment="t"
    )
    line = Pretraining(site, load("pretrain/ci", RunConfig))
    line.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    score = {"chains_d/avg_len": {"value": 1.5, "low": 1.2, "high": 1.8}}
    scored: dict[str, Any] = {"scores": {line.model_name: score}, "protocols": {"chains_d": "abc"}}
    made = []
    for seed, run in enumerate(("one", "two"), 1):
        bundle = make_bundle()
        torch.manual_seed(seed)
        meta = {
            "run": run,
            "step": 7,
            "stage": "stage2",
            "losses": {"act": {"first": 2.0, "last": 0.5}},
            "datasets": {},
        }
        again = UPVLA(bundle.config)  # other random weights: another model
        checkpoint = export(
            open_store(site.store_url),
            f"models/{run}/stage2",
            Bundle(again.config, again, bundle.vq, bundle.text, bundle.action_space, {}, meta),
        )
        line._track(checkpoint.url)
        made.append(line.register({"url": checkpoint.url}, scored))
    assert [(row["version"], row["alias"]) for row in made] == [("1", "champion"), ("2", "challenger")]
    assert line.register({"url": f"{site.store_url}/models/one/stage2"}, scored)["version"] == "1"

    registry = Registry(line.tracker)
    found = line.tracker.client.get_model_version(line.model_name, "2")
    assert "1.50 [1.20, 1.80]" in found.description and found.tags["protocol.chains_d"] == "abc"
    wanted = f"params.model_id = '{made[1]['model_id']}'"
    (model,) = line.tracker.client.search_logged_models([line.tracker.experiment_id()], wanted)
    assert {metric.key for metric in model.metrics} >= {"held_out/act", "chains_d/avg_len", "chains_d/avg_len_low"}

    nightly = Finetuning(site, load("finetune/ci", FinetuneConfig, [f"model_name={line.model_name}"]))
    assert nightly.roll_to("2", "tried by hand")["to"] == "2"
    assert nightly.roll_to("1", "drops the drawer")["from"] == "2"
    champion = registry.by_alias(line.model_name)
    assert champion is not None and champion.version == "1"
    assert [entry["to"] for entry in history(line.store, line.model_name)] == ["1", "2", "1"]
    with pytest.raises(Mismatch, match="compared with 2"):
        from upvla.launch.promote import promote

        promote(line.store, registry, line.model_name, "2", expected="2", because="late")
