"""What is new since the champion was trained, and how far it lies from what it knows; on a real MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.test_policy import make_bundle
from tests.toy_line import NIGHTLY, land
from upvla.checkpoint import export
from upvla.config import FinetuneConfig, SiteConfig, load
from upvla.data.table import Dataset, load_manifest
from upvla.errors import NotFound
from upvla.launch.finetune import Finetuning
from upvla.launch.promote import history
from upvla.launch.scores import SLOTS
from upvla.launch.steps import once
from upvla.rollout.evaluate import report_to_json, summarise
from upvla.rollout.protocol import identity, protocol
from upvla.store import content_hash, open_store
from upvla.tracking import CHAMPION, Registry
from upvla.types import ChainRecord

pytestmark = pytest.mark.seam
SOURCES = "mixture.sources=[{dataset: mine, kind: robot, weight: 0.5}, {dataset: yours, kind: robot, weight: 0.5}]"


@pytest.fixture(scope="module")
def tracking_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all: making its tables takes longer than a test. Each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_a_nightly_counts_what_is_new_in_every_dataset_of_its_mixture(tmp_path: Path, tracking_url: str) -> None:
    site = SiteConfig(home=tmp_path, store_url=str(tmp_path / "store"), tracking_url=tracking_url, experiment="t")
    line = Finetuning(site, load("finetune/ci", FinetuneConfig, [SOURCES, "model_name=upvla-test"]))
    line.logbook.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    with pytest.raises(NotFound, match=r"upvla-test has no champion to fine-tune: run `pretrain/full` first"):
        line.champion()

    land(line.store, tmp_path, "mine", (18, 20, 22, 24, 19))
    known = Dataset(line.store, load_manifest(line.store, "mine"))
    meta = {"run": "first", "step": 7, "stage": "stage2", "datasets": {"mine": {"version": 1, "content_id": "c"}}}
    bundle = replace(make_bundle(), stats=known.stats.to_json(), meta=meta)
    checkpoint = export(open_store(site.store_url), "models/first/stage2", bundle)
    registry = Registry(line.logbook.tracker)
    run_id = line.logbook.tracker.run_id("first/stage2", "stage2")
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
    nights = line.logbook.tracker.client.get_metric_history(line.logbook.pipeline_id(), "drift/worst_shift")
    assert [point.step for point in nights] == [2, 3]  # the champion stayed, and both nights are on the curve

    skipped = line.skip(first | {"new_recordings": 0})
    assert skipped == {"skipped": True, "new_recordings": 0, "since": ["1"], "champion": "1"}
    (run,) = line.logbook.tracker.client.search_runs(
        [line.logbook.tracker.experiment_id()], "metrics.`nightly/skipped` = 1", max_results=5
    )
    assert (run.data.metrics["nightly/new_recordings"], run.data.tags["since"]) == (0, "1")


def test_the_gate_moves_the_alias_and_what_it_judged_is_no_news(tmp_path: Path, tracking_url: str) -> None:
    """A night that ends with yes, one that ends with no, and what the nights after them count."""
    site = SiteConfig(home=tmp_path, store_url=str(tmp_path / "store"), tracking_url=tracking_url, experiment="gate")
    line = Finetuning(site, load("finetune/ci", FinetuneConfig, NIGHTLY))
    line.logbook.tracker.client.create_experiment("gate", artifact_location=f"{tmp_path}/artifacts")
    registry, landed, bundle = Registry(line.logbook.tracker), [18, 20, 22], make_bundle(chunk=10, text_budget=60)

    def trained(run: str, version: int) -> str:
        """A checkpoint of its own weights, trained on a version of the recordings."""
        with torch.no_grad():
            next(bundle.model.parameters()).add_(1.0)
        datasets = {"mine": {"version": version, "content_id": "c"}}
        meta = {"run": run, "step": 7, "stage": "finetune", "datasets": datasets}
        return export(line.store, f"models/{run}/finetune", replace(bundle, meta=meta)).url

    land(line.store, tmp_path, "mine", landed)
    first = trained("first", 1)
    judged(line, first, 0)
    line.register({"url": first}, scored(line))

    land(line.store, tmp_path, "mine", [*landed, 24])
    night, better = line.champion(), trained("better", 2)
    assert (night["version"], night["new_recordings"], night["since"]) == ("1", 1, ["1"])
    judged(line, better, 1)
    told = line.promote({"url": better}, night, scored(line))
    assert (told["version"], told["promoted"], told["against"]) == ("2", True, "1")
    champion = registry.by_alias(line.model_name)
    assert champion is not None and champion.version == "2"
    assert champion.tags["gate"] == told["because"] and told["because"].startswith("better on mine_d: +1.00 [")
    # the same night once more, late, by a run that had looked before: the same version, promoted once
    assert line.promote({"url": better}, night, scored(line))["version"] == "2"
    assert [entry["to"] for entry in history(line.store, line.model_name)] == ["1", "2"]
    assert line.champion()["new_recordings"] == 0

    land(line.store, tmp_path, "mine", [*landed, 24, 26])
    night, as_good = line.champion(), trained("as-good", 3)
    assert (night["version"], night["new_recordings"], night["since"]) == ("2", 1, ["2"])
    judged(line, as_good, 1)
    told = line.promote({"url": as_good}, night, scored(line))
    assert (told["version"], told["promoted"], told["against"]) == ("3", False, "2")
    assert line.version(line.model_name).version == "2"
    assert line.version(f"{line.model_name}@3").tags["gate"] == told["because"]
    assert told["because"].startswith("not surely better on mine_d: +0.00 [")

    quiet = line.champion()
    assert (quiet["version"], quiet["new_recordings"], quiet["since"]) == ("2", 0, ["2", "3"]) and not line.is_due(
        quiet
    )
    assert line.skip(quiet) == {"skipped": True, "new_recordings": 0, "since": ["2", "3"], "champion": "2"}
    asks_more = Finetuning(site, load("finetune/ci", FinetuneConfig, [*NIGHTLY, "gate.min_gain=0.5"]))
    assert asks_more.is_due(asks_more.champion())  # another configuration has not judged it yet
    land(line.store, tmp_path, "mine", [*landed, 24, 26, 28])
    assert line.champion()["new_recordings"] == 1 and line.is_due(line.champion())
    line.roll_to("1", "drops the drawer")
    back = line.champion()  # version 2 was judged against 1, and is not promoted again; version 3 never was
    assert (back["new_recordings"], back["since"]) == (2, ["1", "2"])


def judged(line: Finetuning, url: str, succeeded: int) -> None:
    """The ledger's entry of an evaluation of `url`: so many tasks of every chain were done."""
    exam = line.exam(line.config.eval.suites[0])
    asked, cameras = protocol(exam.suite, exam.chains, exam.control)
    who = identity(url, exam.suite, cameras, SLOTS) | {"device": "cpu"}
    records = [ChainRecord(i, c.scene, c.tasks, succeeded, (9,)) for i, c in enumerate(exam.chains)]
    report = report_to_json(summarise("", exam.suite.name, asked, who, records))
    once(line.store, "judge", {"who": who, "protocol": content_hash(asked)}, lambda: {"report": report, "figures": {}})
    test = {"protocol": content_hash(asked), "expert": identity("expert", exam.suite, cameras)}
    once(line.store, "self-test", test, dict)


def scored(line: Finetuning) -> dict[str, Any]:
    score = {"mine_d/avg_len": {"value": 0.5, "low": 0.0, "high": 1.0}}
    return {"scores": {line.model_name: score}, "protocols": {"mine_d": "p"}}
