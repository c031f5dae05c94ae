"""Registering what a line made, on a real MLflow: the first is champion, the next a challenger, and back again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.test_policy import make_bundle
from upvla.checkpoint import Bundle, export, read_marker
from upvla.config import FinetuneConfig, RunConfig, SiteConfig, fingerprint, load
from upvla.errors import Mismatch
from upvla.launch.finetune import Finetuning
from upvla.launch.line import Line, require_explained
from upvla.launch.logbook import git_commit
from upvla.launch.pretrain import Pretraining
from upvla.launch.promote import history
from upvla.model.upvla import UPVLA
from upvla.store import content_hash, open_store
from upvla.tracking import Registry

pytestmark = pytest.mark.seam
SUITE = "eval.suites=[{name: mine_d, kind: tasks, scenes: [D], tasks: [open_drawer], num: 1}]"


def open_site(folder: Path, **changes: Any) -> SiteConfig:
    mlflow = {"tracking_url": f"sqlite:///{folder}/mlflow.db", "experiment": "t"}
    return SiteConfig.model_validate({"home": folder, "store_url": str(folder / "store"), **mlflow, **changes})


def exported(line: Line, run: str, bundle: Bundle, **meta: Any) -> str:
    """URL of a checkpoint of stage 2 of a run."""
    about = {"run": run, "step": 7, "stage": "stage2", "datasets": {}, **meta}
    return export(line.store, f"models/{run}/stage2", replace(bundle, meta=about)).url


def test_first_champion_then_challenger_then_back(tmp_path: Path) -> None:
    site = open_site(tmp_path)
    line = Pretraining(site, load("pretrain/ci", RunConfig))
    line.logbook.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    plan = {"train": "0123456789abcdef", "validation": "fedcba9876543210", "versions": {"mine": 3, "yours": 1}}
    spec = line.logbook.nested(line._spec("vq", line.config.vq, plan, model=line.config.model))
    assert spec.tracking is not None and spec.tracking.parent == line.logbook.pipeline_id()
    tags = {"mixture": plan["train"], "datasets": "mine@3, yours@1", "config": fingerprint(line.config)}
    assert spec.tracking.tags == tags | {"git_commit": git_commit()}
    score = {"chains_d/avg_len": {"value": 1.5, "low": 1.2, "high": 1.8}}
    scored: dict[str, Any] = {"scores": {line.model_name: score}, "protocols": {"chains_d": "abc"}}
    made = []
    for seed, run in enumerate(("one", "two"), 1):
        bundle = make_bundle()
        torch.manual_seed(seed)
        again = UPVLA(bundle.config)  # other random weights: another model
        losses = {"act": {"first": 2.0, "last": 0.5}}
        url = exported(line, run, replace(bundle, model=again, stats={}), losses=losses)
        line.logbook.log_checkpoint(url, line.store)
        made.append(line.register({"url": url}, scored))
    assert [(row["version"], row["alias"]) for row in made] == [("1", "champion"), ("2", "challenger")]
    assert line.register({"url": f"{site.store_url}/models/one/stage2"}, scored)["version"] == "1"

    url = exported(line, "three", bundle, bad_steps_before=[{"stage": "stage1", "step": 5}])
    with pytest.raises(Mismatch, match=r"the bad steps \[5\] of stage1, .* steps in stage1\.guard\.explained"):
        line.register({"url": url}, scored)

    registry = Registry(line.logbook.tracker)
    found = line.logbook.tracker.client.get_model_version(line.model_name, "2")
    assert "1.50 [1.20, 1.80]" in found.description and found.tags["protocol.chains_d"] == "abc"
    wanted = f"params.model_id = '{made[1]['model_id']}'"
    (model,) = line.logbook.tracker.client.search_logged_models([line.logbook.tracker.experiment_id()], wanted)
    assert model.tags["stats_id"] == content_hash({})
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


def test_a_version_is_tagged_with_the_configuration_that_trained_it_whoever_registers_it(tmp_path: Path) -> None:
    """`upvla finetune --set stage.steps=5`, later `upvla promote` with neither that nor that code."""
    site = open_site(tmp_path)
    trained_by, registered_by = (
        Finetuning(site, load("finetune/ci", FinetuneConfig, ["model_name=m", *more]))
        for more in (["stage.steps=5"], [])
    )
    trained_by.logbook.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    spec = trained_by.logbook.of_training({})
    assert spec is not None
    told = {"config": spec.tags["config"], "git_commit": "0123abcd"}
    scored: dict[str, Any] = {"scores": {"m": {}}, "protocols": {"mine_d": "abc"}}
    url = exported(trained_by, "one", make_bundle(), **told)
    trained_by.logbook.log_checkpoint(url, trained_by.store)
    made = registered_by.register({"url": url}, scored)
    client = registered_by.logbook.tracker.client
    version = client.get_model_version("m", made["version"])
    (model,) = client.search_logged_models([registered_by.logbook.tracker.experiment_id()])
    for tags in (version.tags, model.tags):
        assert told.items() <= tags.items() and tags["config"] != fingerprint(registered_by.config)
    assert f"Configuration `{told['config']}`, commit `0123abcd`" in version.description


def test_scores_under_another_protocol_stand_beside_the_first_ones(tmp_path: Path) -> None:
    """Judged, logged and registered by one protocol, then by another that gives a subtask fewer steps."""
    site, found, versions = open_site(tmp_path, num_workers=1), [], []
    few = ["eval.references=[random]", "eval.videos=0", SUITE]
    for max_steps in (2, 3):
        line = Pretraining(site, load("pretrain/ci", RunConfig, [*few, f"eval.max_steps={max_steps}"]))
        if not found:
            line.logbook.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
            checkpoint = read_marker(open_store(exported(line, "one", make_bundle(chunk=10, text_budget=60))))
        found.append(line._scores(checkpoint))
        versions.append(line.register({"url": checkpoint.url}, found[-1])["version"])
        assert line._scores(checkpoint) == found[-1]  # and nothing is logged twice
    first, second = (scored["protocols"]["mine_d"] for scored in found)
    assert first != second and versions == ["1", "1"]

    client, experiment = line.logbook.tracker.client, line.logbook.tracker.experiment_id()
    runs = {(run.info.run_name, run.data.tags.get("protocol.mine_d")): run for run in client.search_runs([experiment])}
    ours, again = runs["stage2", first], runs["stage2, other protocol", second]
    assert again.data.tags["mlflow.parentRunId"] == ours.info.run_id
    references = [runs["reference random", mark] for mark in (first, second)]
    for run in (ours, again, *references):
        assert {"mine_d/avg_len", "mine_d/avg_len_low", "mine_d/sr_1_high"} <= run.data.metrics.keys()
    assert len(client.search_runs([experiment])) == 6, "the four with scores, and a pipeline's of each configuration"
    for run in references:
        assert len(client.get_metric_history(run.info.run_id, "mine_d/avg_len")) == 1

    version = client.get_model_version(line.model_name, "1")
    assert version.tags["protocol.mine_d"] == second and second in version.description
    (model,) = client.search_logged_models([experiment], f"params.model_id = '{checkpoint.model_id}'")
    scored_in = [metric.run_id for metric in model.metrics if metric.key == "mine_d/avg_len"]
    assert sorted(scored_in) == sorted([ours.info.run_id, again.info.run_id])


def test_the_commit_is_said_by_the_image_or_the_checkout_or_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UPVLA_GIT_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == "unknown"
    monkeypatch.setenv("UPVLA_GIT_COMMIT", "0123abcd")
    assert git_commit() == "0123abcd"


def test_bad_steps_need_somebody_to_explain_them_whoever_passed_over_them() -> None:
    nightly = load("finetune/ci", FinetuneConfig)
    with pytest.raises(Mismatch, match=r"\[7\] of stage2, .* in guard\.explained of stage2, in a config that has it"):
        require_explained(nightly, {"run": "one", "stage": "stage2", "bad_steps": [{"step": 7}]})
    before = [{"stage": "vq", "step": 3}, {"stage": "stage1", "step": 5}]
    meta = {"run": "two", "stage": "finetune", "parent": "0123", "bad_steps_before": before}
    with pytest.raises(Mismatch, match=r"\[3\] of vq, "):
        require_explained(nightly, meta, {"4567"})
    require_explained(nightly, meta, {"0123"})
    require_explained(load("pretrain/ci", RunConfig, ["vq.guard.explained=[3]", "stage1.guard.explained=[5]"]), meta)
