"""Stages on a real dataset: by workers alone, and as a Ray job whose worker is killed."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.faults import rows
from tests.launch.conftest import RayHead
from tests.launch.stages import model, only_shard, plans_of, prepared, run_stage, spec_of
from tests.train.toy import Workers
from upvla.checkpoint import export, load_bundle
from upvla.config import RunConfig, load
from upvla.data.mixture import make_plan, plan_from_json
from upvla.data.samples import Collator
from upvla.data.versions import load_manifest
from upvla.errors import ConfigError, JobFailed, Mismatch, NotFound, StoreError
from upvla.launch import worker
from upvla.launch.cluster import _workers_on
from upvla.launch.describe import describe_shard
from upvla.launch.driver import _go_on_after, _require_unasked, main, threads_of_worker
from upvla.launch.encode import encode_shard
from upvla.launch.inputs import open_inputs
from upvla.launch.jobs import JOB_ID, Jobs
from upvla.launch.line import require_explained
from upvla.launch.notices import REQUEST, request_stop
from upvla.launch.results import bad_steps_before, predicted_frames
from upvla.launch.tokenizers import load_vq, save_text, save_tower
from upvla.launch.train import (
    BAD_STEPS,
    FAILURE,
    LEFT,
    RESULT,
    SPEC,
    TrainSpec,
    run_training,
    share_done,
)
from upvla.launch.weights import import_weights
from upvla.launch.worker import name_samples, work
from upvla.model.config import ModelConfig
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.weights import TOWER
from upvla.rollout.golden import record
from upvla.store import Store, content_hash, open_store
from upvla.train import resume
from upvla.train.loop import fit
from upvla.train.resume import latest
from upvla.types import Batch, Sample

__all__ = ["model", "prepared"]  # fixtures

pytestmark = pytest.mark.seam


def test_data_that_does_not_fit_is_refused_before_workers_are_asked_for(
    prepared: tuple[Store, dict[str, Any]], model: ModelConfig, tmp_path: Path
) -> None:
    """Another data set's figures, and a parent that was trained for another gripper."""
    store, references = prepared
    shutil.copytree(store.url, tmp_path / "store")
    copy = open_store(str(tmp_path / "store"))
    spec = spec_of(copy, references, name="stage1", weights={"act": 1.0})
    inputs = open_inputs(spec)
    inputs.check(spec)
    bundle = inputs.bundle(UPVLA(model), {})
    turned = replace(
        bundle.action_space,
        dims=(*bundle.action_space.dims[:6], replace(bundle.action_space.dims[6], convention="-1=open,+1=close")),
    )
    parent = replace(bundle, action_space=turned)
    with pytest.raises(Mismatch, match=r"dimension 6 \(gripper\) differs in 'convention'"):
        replace(inputs, parent=parent).check(spec)
    far = replace(
        bundle.action_space, dims=(replace(bundle.action_space.dims[0], high=4.0), *bundle.action_space.dims[1:])
    )
    (dataset,) = inputs.train.datasets.values()
    dataset.manifest = replace(dataset.manifest, action_space=far)
    with pytest.raises(ConfigError, match=r"action dimension 0 \(.*\) goes from -1 to 4"):
        inputs.check(spec)
    (key,) = copy.list("datasets/toy/stats/")
    figures = copy.read_json(key)
    figures["action"]["std"][4] *= 2
    copy.write_json(key, figures)
    with pytest.raises(Mismatch, match="action dimension 4 differs in std"):
        open_inputs(spec).check(spec)


def test_the_tokenizer_learns_by_the_same_loop(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], model: ModelConfig
) -> None:
    store, references = prepared
    result = run_stage(two_workers, spec_of(store, references, name="vq", weights={"vq": 1.0}))
    assert result["losses"]["vq"]["last"] < result["losses"]["vq"]["first"]
    assert load_vq(store, result["vq_id"]).config == model.vq
    assert result["vq_id"] != references["vq_id"]


def test_a_stage_starts_from_its_parents_weights_and_its_own_step_0(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    about = {"stage": {"freeze": ["token_learner.*", "to_logits.*"]}, "bad_steps_before": [{"stage": "vq", "step": 3}]}
    first = run_stage(two_workers, spec_of(store, references, name="stage1", weights={"pre": 1.0, "mmu": 0.1}, **about))
    plans = {name: references[name] for name in ("train_plan", "validation_plan")}
    parent = {"parent_url": first["url"], "parent_id": first["model_id"]}
    second = run_stage(
        two_workers, spec_of(store, plans | parent, name="stage2", weights={"pre": 1.0, "act": 1.0, "mmu": 0.1})
    )
    for objective in ("pre", "mmu", "act"):
        assert second["losses"][objective]["first"] == pytest.approx(first["losses"][objective]["last"], rel=1e-5)
        assert second["losses"][objective]["last"] < second["losses"][objective]["first"]
    bundle = load_bundle(second["url"])
    assert bundle.meta["parent"] == first["model_id"]
    assert bundle.meta["datasets"]["toy"]["version"] == 1
    assert bundle.meta["bad_steps_before"] == about["bad_steps_before"]
    assert bundle.stats == load_bundle(first["url"]).stats
    assert bundle.vq.id == references["vq_id"]
    assert (second["step"], second["resumed_from"]) == (8, 0)
    assert bundle.golden is not None and len(bundle.golden.instructions) == 4
    again = record(bundle, bundle.golden.images, bundle.golden.instructions)
    assert np.abs(again.actions - bundle.golden.actions).max() <= 1e-6, "as in the worker that trained it"


def test_a_resume_point_says_what_it_was_learnt_from(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    """One from before it said so is gone on from, too."""
    store, references = prepared
    spec = spec_of(store, references, name="told", weights={"act": 1.0}, stage={"steps": 4})
    run_stage(two_workers, spec)
    place = store.sub(spec.prefix)
    point = latest(place.sub("resume"))
    assert point is not None
    stats = load_manifest(store, "toy", 1).stats_id
    told = {"position": 4 * 8, "datasets": ["toy@1"], "stats_id": stats, "config": spec.config}
    assert {name: point.meta[name] for name in told} == told
    assert load_bundle(place.read_json(RESULT)["url"]).stats == store.sub("datasets/toy").read_json(
        f"stats/{stats}.json"
    )
    elsewhere = {"store_url": "s3://a", "parent_url": "s3://b", "weights_urls": ("https://c",)}
    tracked = {"tracking": {"uri": "http://me:secret@d", "experiment": "e"}, "scratch": "/secret"}
    assert TrainSpec.model_validate(spec.model_dump() | elsewhere | tracked).config == point.meta["config"]

    older = asdict(point) | {"meta": {name: value for name, value in point.meta.items() if name not in told}}
    place.sub("resume").write_json(f"{point.name}.json", older)
    place.delete(RESULT)
    assert run_stage(two_workers, spec)["resumed_from"] == 4


def test_a_stage_starts_from_imported_weights_and_reads_features_and_descriptions(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], model: ModelConfig, tmp_path: Path
) -> None:
    """The whole MMU-conditioned prompt on a frozen tower: import, features, stage 1, what it says, stage 2."""
    store, references = prepared
    values = model.model_dump() | {"description": {"question": "is the drawer open?", "budget": 8, "every_steps": 4}}
    values["vision"] = {"kind": "clip", "image_size": 32, "patch": 16, "width": 32, "blocks": 2, "heads": 2,
                        "mlp": 32, "pool": (1, 1), "frozen": True, "keypoints": 0, "stem": ()}  # fmt: skip
    conditioned = ModelConfig.model_validate(values)
    source = UPVLA(conditioned)
    published = {n.removeprefix(TOWER): v for n, v in source.state_dict().items() if n.startswith(TOWER)}
    torch.save(published, tmp_path / "pytorch_model.bin")
    imported = import_weights("clip", str(tmp_path), str(tmp_path / "weights"), conditioned)
    tower_id = save_tower(store, source.vision)
    assert encode_shard(store, "toy", 1, references["vq_id"], conditioned, only_shard(store), tower_id) == 1
    started = {"weights_urls": [imported["url"]], "weights_ids": [imported["id"]], "tower_id": tower_id}
    inputs = references | started | {"model": conditioned}
    first = run_stage(two_workers, spec_of(store, inputs, name="described1", weights={"pre": 1.0, "mmu": 1.0}))
    described = describe_shard(store, "toy", 1, first["url"], only_shard(store))
    plans = {name: references[name] for name in ("train_plan", "validation_plan")}
    parent = {"parent_url": first["url"], "parent_id": first["model_id"], "tower_id": tower_id}
    spec = spec_of(store, plans | parent | {"description_id": described}, name="described2", weights={"act": 1.0})
    second = run_stage(two_workers, spec)
    assert second["losses"]["act"]["last"] < second["losses"]["act"]["first"]
    bundle = load_bundle(second["url"])
    assert bundle.model.vision.id == tower_id, "a frozen tower stays what it was"
    reader = open_inputs(spec).reader(open_inputs(spec).train)
    assert reader.shape.features == (4, 32) and set(reader.descriptions) == {"toy"}


@pytest.mark.timeout(900)
def test_killing_a_worker_of_the_ray_job_changes_nothing_in_the_result(
    two_workers: Workers, ray_head: RayHead, prepared: tuple[Store, dict[str, Any]], tmp_path: Path
) -> None:
    """ZeRO 2; the seed says who dies and when, tests/faults/test_training.py has ZeRO 3.

    The uninterrupted reference runs in plain processes, so this also shows that Ray changes no number.
    """
    store, references = prepared
    dice = random.Random("ray 2")
    rank, step = dice.randrange(2), dice.randrange(2, 8)
    weights = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
    spec = spec_of(store, references, name="killed", weights=weights, stage={"steps": 16})
    reference = run_stage(two_workers, spec)
    shutil.copytree(store.url, tmp_path / "store", ignore=shutil.ignore_patterns("runs", "models"))
    other = open_store(str(tmp_path / "store"))
    spec = spec_of(other, references, name="killed", weights=weights, stage={"steps": 16})
    points = other.sub(f"{spec.prefix}/resume")
    killed: list[int] = []

    def kill_after_a_save() -> None:
        deadline = time.monotonic() + 600
        while not ((point := latest(points)) and point.step >= step) and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = ray_head.training_workers()[rank]
        killed.append(victim.pid)
        victim.kill()

    killer = threading.Thread(target=kill_after_a_save)
    killer.start()
    result = run_training(other, spec, Jobs(ray_head.jobs_url), on_line=print, python=sys.executable)
    killer.join()
    assert killed
    assert 2 <= result["resumed_from"] < 16
    assert result["losses"] == reference["losses"]
    assert result["model_id"] == reference["model_id"], "weights are equal, bit for bit"
    assert run_training(other, spec, Jobs(ray_head.jobs_url), on_line=pytest.fail) == result


def test_numbers_that_are_not_finite_end_the_stage_without_retries(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    stage = {"optimizer": {"lr": 1e30, "warmup_steps": 0}}
    spec = spec_of(store, references, name="diverges", weights={"act": 1.0}, stage=stage)
    two_workers.run(work, {"spec": spec.model_dump_json(), "threads": 1})
    place = store.sub(spec.prefix)
    assert not place.exists(RESULT)
    failure = place.read_json(FAILURE)
    assert failure["code"] == "bad_step"
    assert "is not finite, the optimiser was not moved" in failure["message"]


ON_DISK = {"num_workers": 2, "zero_stage": 3, "offload": "nvme", "nvme_folder": "/scratch"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"engine": {"num_workers": 3}},
            ConfigError,
            "num_workers=3: global_batch=8 over 8 lanes can be dealt to [",
        ),
        ({"stage": {"weights": {"acts": 1.0}}}, ConfigError, "weights.acts is no objective of this stage; those are ("),
        ({"stage": {"best": {"metric": "val_loss/acts"}}}, ConfigError, "is nothing that is validated: one of ['val_l"),
        ({"stage": {"best": {"metric": "loss/act"}}}, ConfigError, "best.metric='loss/act' is nothing that is valida"),
        ({"stage": {"freeze": ["head.*"]}}, ConfigError, "freeze pattern 'head.*' names no parameter"),
        ({"vq_id": "0123456789abcdef"}, NotFound, "vq/0123456789abcdef"),
        ({"text_id": "feed"}, NotFound, "text/feed"),
        ({"train_plan": "beef"}, NotFound, "mixtures/beef"),
        ({"parent_url": "/nowhere/models/x"}, NotFound, "holds no finished checkpoint"),
        ({"model": None}, ConfigError, "neither a model configuration nor a checkpoint"),
        ({"engine": ON_DISK, "stage": {"ema_decay": 0.9}}, ConfigError, "with offload=nvme none are"),
        ({"kind": "vq", "stage": {"weights": {"vq": 1.0}, "picture_every": 1}}, ConfigError, "picture_every is a poli"),
    ],
)
def test_wrong_inputs_are_named_before_workers_are_asked_for(
    prepared: tuple[Store, dict[str, Any]], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    store, references = prepared
    spec = spec_of(store, references, name="wrong", weights={"act": 1.0}, **change)
    with pytest.raises(error, match=re.escape(message)):
        open_inputs(spec).check(spec)


def test_actions_cannot_be_learnt_from_sources_for_prediction_alone(prepared: tuple[Store, dict[str, Any]]) -> None:
    store, references = prepared
    plans = references | plans_of(store, sources=[{"dataset": "toy", "kind": "prediction", "weight": 1.0}])
    wrong = spec_of(store, plans, name="wrong", weights={"act": 1.0})
    with pytest.raises(ConfigError, match=r"weights.act is 1.0 and no source of mixture \w+ has actions that count"):
        open_inputs(wrong).check(wrong)
    spec = spec_of(store, plans, name="watches", weights={"pre": 1.0})
    open_inputs(spec).check(spec)


def test_another_models_tokenizer_is_refused(prepared: tuple[Store, dict[str, Any]], model: ModelConfig) -> None:
    store, references = prepared
    text_id = save_text(store, TextTokenizer.train(["open"], 280))
    spec = spec_of(store, references | {"text_id": text_id}, name="wrong", weights={"act": 1.0})
    with pytest.raises(Mismatch, match="text vocabulary 300, its part brings 280"):
        open_inputs(spec).check(spec)


def test_codes_made_with_another_resize_are_refused(prepared: tuple[Store, dict[str, Any]], model: ModelConfig) -> None:
    store, references = prepared
    changed = model.model_copy(update={"vq_filter": "cubic"})
    spec = spec_of(store, references | {"model": changed}, name="wrong", weights={"act": 1.0})
    with pytest.raises(Mismatch, match=r"with resize \(.*'area'\), the model asks for .*'cubic'\): set the"):
        open_inputs(spec).check(spec)
    with pytest.raises(Mismatch, match="'cubic'"):
        encode_shard(store, "toy", 1, references["vq_id"], changed, only_shard(store))


def test_a_key_names_what_is_learnt_not_where(prepared: tuple[Store, dict[str, Any]]) -> None:
    store, references = prepared
    spec = spec_of(store, references, name="stage1", weights={"act": 1.0})
    stage = {"log_every": 7, "micro_batch": 4, "guard": {"on_bad_step": "skip", "max_bad_steps": 3}}
    same = {"store_url": "s3://elsewhere", "stage": stage, "engine": {"num_workers": 4, "zero_stage": 3}}
    assert spec_of(store, references, name="stage1", weights={"act": 1.0}, **same).key == spec.key
    assert spec_of(store, references, name="stage1", weights={"act": 1.0}, seed=1).key != spec.key
    assert spec_of(store, references, name="stage1", weights={"act": 2.0}).key != spec.key
    judged = {"stage": {"guard": {"spike_factor": 5.0}}}
    assert spec_of(store, references, name="stage1", weights={"act": 1.0}, **judged).key != spec.key


def test_a_checkpoint_of_another_model_than_the_runs_is_named(
    prepared: tuple[Store, dict[str, Any]], model: ModelConfig
) -> None:
    store, references = prepared
    bundle = open_inputs(spec_of(store, references, name="stage1", weights={"act": 1.0})).bundle(UPVLA(model), {})
    parent = {"parent_url": export(store, "models/theirs/stage1", bundle).url}
    open_inputs(spec_of(store, references | parent, name="stage2", weights={"act": 1.0}))
    ours = {"model": model.model_copy(update={"chunk": model.chunk + 1})}
    with pytest.raises(Mismatch, match=r"stage2: .*theirs/stage1 is another model than the run's; leave `model`"):
        open_inputs(spec_of(store, references | parent | ours, name="stage2", weights={"act": 1.0}))


def test_a_driver_does_without_a_parents_weights_and_workers_say_what_is_wrong_with_them(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], model: ModelConfig
) -> None:
    store, references = prepared
    bundle = open_inputs(spec_of(store, references, name="stage1", weights={"act": 1.0})).bundle(UPVLA(model), {})
    parent = export(store, "models/damaged/stage1", bundle)
    (weights,) = (key for key in store.list("models/damaged/stage1/") if "/model-" in key)
    store.write(weights, bytes(len(store.read(weights))))
    references = references | {"parent_url": parent.url, "parent_id": parent.model_id, "model": None}
    spec = spec_of(store, references, name="stage2", weights={"act": 1.0})
    inputs = open_inputs(spec, weights=False)
    inputs.check(spec)
    assert inputs.parent is not None and all(each.is_meta for each in inputs.parent.model.parameters())
    two_workers.run(work, {"spec": spec.model_dump_json(), "threads": 1})
    failure = store.sub(spec.prefix).read_json(FAILURE)
    assert failure["code"] == "corrupt" and "its sha256 is not the marker's" in failure["message"]


def test_what_describes_no_stage_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = open_store(str(tmp_path))
    for value, said in (({"kind": "vlm"}, "(kind: Input should be 'vq' or 'policy'; store_url: "), ([], "(it: Input ")):
        place.write_json(SPEC, value)
        assert main([f"{place.url}/{SPEC}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"upvla: config: {place.url}/{SPEC} describes no stage {said}")
        assert line.endswith("start the line again, from the version of upvla that the cluster runs")
        assert place.read_json(FAILURE)["code"] == "config"


def test_progress_is_read_from_the_lines() -> None:
    assert share_done("stage1    240/1500   pre 3.21  lr 9.8e-05") == 240 / 1500
    assert share_done("Requesting resources: {'CPU': 1} * 2") is None


@pytest.mark.parametrize(
    ("cpus", "num_workers", "threads"),
    [([2], 2, 1), ([16], 2, 8), ([4, 4, 4], 2, 4), ([2, 8], 2, 4), ([0, 16, 16], 8, 4), ([1, 1], 3, 1), ([0], 2, 1)],
)
def test_a_workers_threads_lie_on_one_node(cpus: list[float], num_workers: int, threads: int) -> None:
    """Twelve CPUs on three nodes are no six for each of two workers."""
    assert threads_of_worker(cpus, num_workers) == threads


def test_an_error_in_the_driver_is_one_sentence(
    ray_head: RayHead, prepared: tuple[Store, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, references = prepared
    spec = spec_of(store, references | {"vq_id": "0123456789abcdef"}, name="stage1", weights={"act": 1.0})
    place = store.sub(spec.prefix)
    place.write_json(SPEC, spec.model_dump(mode="json"))
    assert main([f"{place.url}/{SPEC}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upvla: ")]
    assert line.startswith("upvla: not_found: ")
    assert "vq/0123456789abcdef" in line
    assert place.read_json(FAILURE)["code"] == "not_found"


def test_bad_steps_are_in_the_result_and_keep_the_model_out_of_the_registry(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first step of such a learning rate nothing is finite any more, and every step is passed over."""
    store, references = prepared
    guard = {"on_bad_step": "skip", "max_bad_steps": 100}
    stage = {"optimizer": {"lr": 1e30, "warmup_steps": 0}, "guard": guard}
    spec = spec_of(store, references, name="stage2", weights={"act": 1.0}, stage=stage)
    result = run_stage(two_workers, spec)
    steps = [bad["step"] for bad in result["bad_steps"]]
    assert steps and all(bad["positions"] for bad in result["bad_steps"])
    first, mixture = result["bad_steps"][0], open_inputs(spec).train
    assert first["samples"] == name_samples("stage2", mixture, 0, first["positions"])
    named = mixture.origin(first["positions"][0])
    said = capsys.readouterr().out
    assert said.startswith(f"stage2: a bad step, of samples toy@1 {named['recording']} step {named['step']}, ")
    meta = load_bundle(result["url"]).meta
    assert meta["bad_steps"] == result["bad_steps"]
    config = load("pretrain/ci", RunConfig)
    with pytest.raises(
        Mismatch, match=rf"passed over the bad steps \[{steps[0]}.*list the steps in stage2.guard.explained"
    ):
        require_explained(config, meta)
    explained = [f"stage2.guard.explained={steps}"]
    require_explained(load("pretrain/ci", RunConfig, explained), meta)

    parent = {"parent_url": result["url"], "parent_id": result["model_id"]}
    child = spec_of(store, {**references, **parent, "model": None}, name="finetune", weights={"act": 1.0})
    assert bad_steps_before(child, open_inputs(child)) == [{"stage": "stage2", **bad} for bad in meta["bad_steps"]]


_POISONED = 44  # a mixture position: one of step 6's


class _Poisoned(Collator):
    def __call__(self, samples: Sequence[Sample]) -> Batch:
        batch = super().__call__(samples)
        spoilt = _POISONED in batch.positions
        return batch._replace(actions=np.full_like(batch.actions, np.nan)) if spoilt else batch


def work_on_a_poisoned_batch(settings: dict[str, Any]) -> None:
    """The worker's own body, on data of which one sample's actions are not finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "Collator", _Poisoned)
        work(settings)


def train_on(settings: dict[str, Any], saved: int, after: int) -> tuple[dict[int, float], dict[str, np.ndarray]]:
    """From the set of one step with the batches after another: learning rates by step, and the weights at the end."""
    spec = TrainSpec.model_validate_json(settings["spec"])
    inputs, points = open_inputs(spec), open_store(spec.store_url).sub(f"{spec.prefix}/resume")
    engine, _ = resume.open_engine(
        partial(worker._build, spec, inputs),
        points,
        identity=spec.identity,
        scratch=spec.scratch_folder,
        zero_stage=spec.engine.zero_stage,
        step=saved,
    )
    engine.skip_schedule(after - saved)
    rates: dict[int, float] = {}

    def log(metrics: Mapping[str, float], step: int) -> None:
        rates.update({step: metrics["train/lr"]} if "train/lr" in metrics else {})

    with worker._loader(spec, inputs, inputs.train, engine, after, 1) as found:
        fit(engine, found, spec.stage, start_step=after, validation=[], log=log, save=lambda step: None)
    return rates, {name: weight.numpy() for name, weight in engine.full_weights().items()}


def test_a_rollback_goes_on_from_the_last_resume_point_after_the_bad_batch(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    """Its weights are those of a run that takes the set before the bad batch and starts after it."""
    store, references = prepared
    stage = {"guard": {"on_bad_step": "rollback"}, "steps": 10, "keep_last": 10}
    spec = spec_of(store, references, name="rolled", weights={"act": 1.0}, stage=stage)
    settings, place = {"spec": spec.model_dump_json(), "threads": 1}, store.sub(spec.prefix)
    two_workers.run(work_on_a_poisoned_batch, settings)
    assert place.read_json(LEFT) == {"reason": "rollback", "step": 6, "nodes": []} and not place.exists(RESULT)
    told = place.read_json(BAD_STEPS)
    (bad,) = told["bad_steps"]
    assert (bad["step"], bad["action"], told["go_on_after"]) == (6, "rollback", 6) and _POISONED in bad["positions"]
    two_workers.run(work_on_a_poisoned_batch, settings)
    result = place.read_json(RESULT)
    assert (result["step"], result["resumed_from"], result["bad_steps"]) == (10, 6, [bad])
    rates, weights = two_workers.run(train_on, settings, 4, 6)[0]
    assert rates[7] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * 6 / 10))), "as if no step were missing"
    exported = load_bundle(result["url"]).model.state_dict()
    equal = {name: np.array_equal(exported[name].numpy(), weight) for name, weight in weights.items()}
    fault = "step 6 is not finite: rolled back to the resume point of step 4, and on after the bad batch"
    rows.told(fault, lost_steps=bad["step"] - 1 - 4, bit_identical=all(equal.values()))
    assert all(equal.values()), equal


def test_a_rollback_from_the_last_step_ends_with_the_weights_before_it(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    stage = {"guard": {"on_bad_step": "rollback"}, "steps": 6, "keep_last": 10}
    spec = spec_of(store, references, name="rolled-last", weights={"act": 1.0}, stage=stage)
    settings, place = {"spec": spec.model_dump_json(), "threads": 1}, store.sub(spec.prefix)
    for _ in range(2):
        two_workers.run(work_on_a_poisoned_batch, settings)
    result = place.read_json(RESULT)
    assert (result["step"], result["ended"], [bad["step"] for bad in result["bad_steps"]]) == (6, "finished", [6])
    _, weights = two_workers.run(train_on, settings, 4, 6)[0]
    exported = load_bundle(result["url"]).model.state_dict()
    assert all(np.array_equal(exported[name].numpy(), weight) for name, weight in weights.items())


def work_cut_before_its_result(settings: dict[str, Any]) -> None:
    """As if killed after the last resume point was committed."""

    def cut(*_: Any) -> None:
        raise StoreError("cut")

    with pytest.MonkeyPatch.context() as patch, suppress(StoreError):
        patch.setattr(worker, "finish", cut)
        work(settings)


@pytest.mark.parametrize("ended", ["finished", "early"])
def test_a_life_cut_between_its_last_point_and_the_result_is_finished_by_the_next(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], ended: str
) -> None:
    """With the same weights, however much training the configuration would still allow, and the speed that was told."""
    store, references = prepared
    early = {"best": {"metric": "val_loss/act", "patience": 1}, "optimizer": {"lr": 0.3, "schedule": "constant"}}
    stage = {"steps": 12, "eval_every": 1, **(early if ended == "early" else {})}
    spec = spec_of(store, references, name=f"cut-{ended}", weights={"act": 1.0}, stage=stage)
    settings, place = {"spec": spec.model_dump_json(), "threads": 1}, store.sub(spec.prefix)
    two_workers.run(work_cut_before_its_result, settings)
    point = latest(place.sub("resume"))
    assert point is not None and not place.exists(RESULT)
    result = run_stage(two_workers, spec)
    assert (result["ended"], result["resumed_from"]) == (ended, point.step)
    assert result["speed"]["samples_per_s"] == point.meta["speed"]["speed/samples_per_s"] > 0
    whole = spec.model_copy(update={"store_url": copy_of_inputs(store, f"whole-{ended}").url})
    uncut = run_stage(two_workers, whole)
    assert (uncut["step"], uncut["model_id"], uncut["losses"]) == (
        result["step"],
        result["model_id"],
        result["losses"],
    )


def copy_of_inputs(store: Store, name: str) -> Store:
    """A store beside it with all but what was trained."""
    copy = open_store(f"{store.url}-{name}")
    for key in store.list():
        if not key.startswith(("runs/", "models/")):
            copy.upload(Path(store.url, key), key)
    return copy


def test_a_request_to_stop_holds_for_a_job_that_has_not_begun_and_for_no_later_one(
    prepared: tuple[Store, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, references = prepared
    spec = spec_of(store, references, name="asked", weights={"act": 1.0})
    place = store.sub(spec.prefix)
    request_stop(place, "asked-0123456789abcdef-1")
    monkeypatch.setenv(JOB_ID, "asked-0123456789abcdef-1")
    with pytest.raises(JobFailed, match="stopped before it began, as asked; start it again to go on"):
        _require_unasked(spec, place)
    _require_unasked(spec, place)  # a Ray that was started anew numbers its jobs from the beginning
    request_stop(place, "asked-0123456789abcdef-1")
    monkeypatch.setenv(JOB_ID, "asked-0123456789abcdef-2")
    _require_unasked(spec, place)
    assert not place.exists(REQUEST)
    place.write_json(REQUEST, {"reason": "stop"})  # as before jobs were named, and outside a job
    monkeypatch.delenv(JOB_ID)
    _require_unasked(spec, place)
    assert not place.exists(REQUEST)


def test_a_run_that_a_bad_step_has_stopped_goes_on_when_it_is_started_to_skip(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    specs = [
        spec_of(store, references, name="stopped", weights={"act": 1.0}, stage={"guard": {"on_bad_step": policy}})
        for policy in ("stop", "skip")
    ]
    assert specs[0].key == specs[1].key
    place = store.sub(specs[0].prefix)
    two_workers.run(work_on_a_poisoned_batch, {"spec": specs[0].model_dump_json(), "threads": 1})
    failure = place.read_json(FAILURE)
    assert failure["code"] == "bad_step" and "start again with guard.on_bad_step=skip" in failure["message"]
    two_workers.run(work_on_a_poisoned_batch, {"spec": specs[1].model_dump_json(), "threads": 1})
    result = place.read_json(RESULT)
    assert (result["resumed_from"], [bad["step"] for bad in result["bad_steps"]]) == (4, [6])


def test_gradient_checkpointing_under_zero_3_changes_no_weight(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], model: ModelConfig
) -> None:
    store, references = prepared
    results = []
    for recomputed in (False, True):
        config = model.model_copy(
            update={"backbone": model.backbone.model_copy(update={"gradient_checkpointing": recomputed})}
        )
        spec = spec_of(store, references | {"model": config}, name="recomputed", weights={"pre": 1.0, "act": 1.0})
        spec = spec.model_copy(update={"engine": spec.engine.model_copy(update={"zero_stage": 3})})
        results.append(run_stage(two_workers, spec))
    kept, recomputed = (load_bundle(result["url"]).model.state_dict() for result in results)
    assert results[0]["losses"] == results[1]["losses"]
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def predicted_without_robots(settings: dict[str, Any]) -> tuple[Any, Any]:
    """What is drawn where the second worker holds questions only, and where each holds a robot's row somewhere."""
    spec = TrainSpec.model_validate_json(settings["spec"])
    inputs = open_inputs(spec)
    engine = worker._build(spec, inputs, universal=False)
    with worker._loader(spec, inputs, inputs.train, engine, 0, 1) as found:
        batches = next(found)
    nothing = Batch(*(array[:0] for array in batches[0]))
    held_out = [nothing, *batches]
    none = predicted_frames(inputs, engine, held_out if engine.rank == 0 else [nothing])
    return none, predicted_frames(inputs, engine, held_out)


def test_a_worker_with_questions_only_draws_no_picture_and_lives(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    spec = spec_of(store, references, name="drawn", weights={"act": 1.0})
    none, drawn = two_workers.run(predicted_without_robots, {"spec": spec.model_dump_json(), "threads": 1})[0]
    assert none is None and drawn.ndim == 3


def test_pictures_under_zero_3_are_those_of_whole_weights_and_change_no_weight(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    """They are taken between steps, which must find weights and their order of fetching as they left them."""
    store, references = prepared
    spec = spec_of(store, references, name="drawn", weights={"pre": 1.0, "act": 1.0})
    drawn, learnt = [], []
    for zero_stage in (0, 3):
        engine = spec.engine.model_copy(update={"zero_stage": zero_stage})
        settings = {"spec": spec.model_copy(update={"engine": engine}).model_dump_json(), "threads": 1}
        drawn += [frames for _, frames in two_workers.run(predicted_without_robots, settings)]
    assert all(np.array_equal(frames, drawn[worker % 2]) for worker, frames in enumerate(drawn))
    for every in (None, 1, 3):
        stage = {"picture_every": every, "ema_decay": 0.5}
        watched = spec_of(store, references, name=f"drawn-{every}", weights={"pre": 1.0, "act": 1.0}, stage=stage)
        watched = watched.model_copy(update={"engine": engine})
        learnt.append(load_bundle(run_stage(two_workers, watched)["url"]).model.state_dict())
    assert all(torch.equal(tensor, other[name]) for other in learnt[1:] for name, tensor in learnt[0].items())


def test_a_trainer_that_was_taken_over_says_nothing(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], tmp_path: Path
) -> None:
    from upvla.tracking import Tracker

    store, references = prepared
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "overtaken"}
    spec = spec_of(store, references, name="overtaken", weights={"act": 1.0}, tracking=tracking)
    place = store.sub(spec.prefix)
    place.create_json("owner-000002.json", {})
    two_workers.run(work_on_a_poisoned_batch, {"spec": spec.model_dump_json(), "threads": 1, "owner": 1})
    assert not any(place.exists(name) for name in (FAILURE, LEFT, RESULT))
    tracker = Tracker(**tracking)
    (run,) = tracker.client.search_runs([tracker.experiment_id()])
    assert run.info.status == "RUNNING", "its successor's"


def test_a_life_waits_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STORE_PAUSE_S", 0.01)
    answers = iter([StoreError("refused"), StoreError("refused"), False])

    def ask() -> bool:
        answer = next(answers)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    assert worker._once_it_answers(ask, 60.0) is False
    answers = iter([StoreError("refused")] * 3)
    with pytest.raises(StoreError, match="refused"):
        worker._once_it_answers(ask, 0.0)


def test_the_best_validation_is_exported_and_ends_the_run_early(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    """At a learning rate that ruins everything after a while: what is exported is what was best before."""
    store, references = prepared
    best = {"best": {"metric": "val_loss/act", "patience": 2}, "eval_every": 1, "save_every": 100, "ema_decay": 0.5}
    stage = {"steps": 30, "optimizer": {"lr": 0.3, "schedule": "constant"}} | best
    spec = spec_of(store, references, name="best", weights={"act": 1.0}, stage=stage)
    result = run_stage(two_workers, spec)
    meta = load_bundle(result["url"]).meta
    assert result["ended"] == "early"
    assert meta["step"] == result["step"] < 30
    assert meta["losses"]["act"]["last"] == result["losses"]["act"]["last"]
    plans = {name: references[name] for name in ("train_plan", "validation_plan")}
    parent = {"parent_url": result["url"], "parent_id": result["model_id"]}
    again = run_stage(
        two_workers, spec_of(store, plans | parent, name="again", weights={"act": 1.0}, stage={"steps": 1})
    )
    assert again["losses"]["act"]["first"] == pytest.approx(result["losses"]["act"]["last"], rel=1e-5)


WATCHED = {
    *(f"{prefix}loss/{name}" for prefix in ("", "val_") for name in ("pre", "act", "mmu")),
    *(f"{prefix}watch/act_{name}" for prefix in ("", "val_") for name in ("pose", "gripper", "gripper_accuracy")),
    *(f"{prefix}watch/{name}" for prefix in ("", "val_") for name in ("mmu_accuracy", "pre_accuracy")),
    *(f"speed/{name}" for name in ("samples_per_s", "tokens_per_s", "step_s", "mfu_pct", "goodput_pct")),
    "loss/total", "watch/pre_changed_accuracy", "val_watch/pre_changed_accuracy", "speed/data_wait_pct",
    "speed/checkpoint_stall_pct", "train/grad_norm", "train/lr", "train/bad_steps", "memory/peak_gb",
    "mixture/toy/robot", "mixture/toy/qa", "system/cpu_pct", "system/memory_pct",
}  # fmt: skip


def test_curves_have_names_that_stay_and_pictures_of_what_was_predicted_lie_beside_them(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]], tmp_path: Path
) -> None:
    """Also with averaged weights, of which every worker holds a part."""
    from upvla.tracking import Tracker

    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "pictures"}
    tracker = Tracker(**tracking)
    tracker.client.create_experiment("pictures", artifact_location=str(tmp_path / "artifacts"))
    store, references = prepared
    stage = {"picture_every": 4, "ema_decay": 0.5}
    told = {"config": "0123456789abcdef", "git_commit": "0123abcd"}
    tags = {"tags": {"datasets": "toy@1", **told}}
    spec = spec_of(store, references, name="pictured", weights={"pre": 1.0}, stage=stage, tracking=tracking | tags)
    result = run_stage(two_workers, spec)
    assert result["speed"]["checkpoint_stall_pct"] > 0 and 0 < result["speed"]["goodput_pct"] < 100
    (run,) = tracker.client.search_runs([tracker.experiment_id()])
    assert set(run.data.metrics) == WATCHED
    bundle = load_bundle(result["url"])
    assert told.items() <= bundle.meta.items(), "whoever registers it later knows by what it was trained"
    stats_id = content_hash(bundle.stats)
    assert (run.data.tags["datasets"], run.data.tags["stats_id"]) == ("toy@1", stats_id)
    found = tracker.artifacts(run.info.run_id, "predicted")
    assert [path for path in found if path.endswith(".png")] == [f"predicted/step-{step:08d}.png" for step in (4, 8)]


def test_wrong_numbers_of_workers_leave_and_say_how_many_would_do(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    store, references = prepared
    spec = spec_of(store, references | plans_of(store, lanes=1), name="elastic", weights={"act": 1.0})
    spec = spec.model_copy(update={"engine": spec.engine.model_copy(update={"num_workers": (1, 8)})})
    two_workers.run(work, {"spec": spec.model_dump_json(), "threads": 1})
    left = store.sub(spec.prefix).read_json(LEFT)
    assert left == {"reason": "resize", "num_workers": [1, 1]}
    assert open_inputs(spec).world_sizes(spec) == [1]
    assert _go_on_after(spec, left) == (1, 1)
    assert _go_on_after(spec, {"reason": "preempted", "step": 4, "nodes": []}) == (1, 8), "there may be room again"


def test_a_place_for_a_worker_lies_on_one_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "memory": 9.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert _workers_on(nodes, {"CPU": 2.0}) == 1 + 1 + 4
    assert _workers_on(nodes, {"CPU": 2.0, "GPU": 1.0}) == 1 + 0 + 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine": {"use_gpu": True, "num_workers": 2}}, "config: engine.use_gpu is set for 2 workers and this Ray"),
        ({"tracking": {"uri": "http://127.0.0.1:9", "experiment": "x"}}, "stack: MLflow at http://127.0.0.1:9: "),
        (
            {"engine": {"num_workers": 3}},
            "config: num_workers=3: global_batch=8 over 8 lanes can be dealt to [1, 2, 4, 8] workers; choose one",
        ),
    ],
)
def test_what_a_cluster_cannot_give_is_one_sentence_before_workers_are_asked_for(
    ray_head: RayHead,
    prepared: tuple[Store, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    sentence: str,
) -> None:
    store, references = prepared
    spec = spec_of(store, references, name=f"wrong{len(sentence)}", weights={"act": 1.0})
    values = spec.model_dump() | change | {"engine": spec.engine.model_dump() | change.get("engine", {})}
    spec = TrainSpec.model_validate(values)
    place = store.sub(spec.prefix)
    place.write_json(SPEC, spec.model_dump(mode="json"))
    assert main([f"{place.url}/{SPEC}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upvla: ")]
    assert line.startswith(f"upvla: {sentence}")


def test_resume_points_of_another_zero_stage_are_refused_before_workers_are_asked_for(
    ray_head: RayHead,
    prepared: tuple[Store, dict[str, Any]],
    two_workers: Workers,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, references = prepared
    spec = spec_of(store, references, name="staged", weights={"act": 1.0})
    two_workers.run(work_cut_before_its_result, {"spec": spec.model_dump_json(), "threads": 1})
    other = spec.model_copy(update={"engine": spec.engine.model_copy(update={"zero_stage": 3})})
    place = store.sub(spec.prefix)
    place.write_json(SPEC, other.model_dump(mode="json"))
    assert main([f"{place.url}/{SPEC}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upvla: ")]
    assert line.startswith(f"upvla: mismatch: resume point {place.url}/resume/step-00000008-")
    assert line.endswith("was written under ZeRO 2, this run has 3; set engine.zero_stage=2, or start a new run")


def test_a_disk_without_room_is_one_sentence_before_workers_are_asked_for(
    ray_head: RayHead,
    prepared: tuple[Store, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, references = prepared
    place = store.sub("full")
    place.write_json(SPEC, spec_of(store, references, name="full", weights={"act": 1.0}).model_dump(mode="json"))
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert main([f"{place.url}/{SPEC}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upvla: ")]
    assert line.startswith("upvla: no_space: no space left under ") and "a TMPDIR on a larger disk" in line
    assert place.read_json(FAILURE)["code"] == "no_space"


def test_a_dataset_version_that_does_not_exist_is_named(prepared: tuple[Store, dict[str, Any]]) -> None:
    store, references = prepared
    plan = plan_from_json(store.read_json(f"mixtures/{references['train_plan']}.json"))
    sources = tuple(replace(source, version=99) for source in plan.sources)
    options = {"lanes": plan.lanes, "spread": plan.spread, "action_space": plan.action_space}
    later = make_plan(sources, plan.seed, plan.global_batch, **options)
    store.write_json(f"mixtures/{later.plan_id}.json", asdict(later))
    spec = spec_of(store, references | {"train_plan": later.plan_id}, name="wrong", weights={"act": 1.0})
    with pytest.raises(NotFound, match="99"):
        open_inputs(spec).check(spec)


def test_a_store_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert main(["s3://bucket/runs/key/stage1/spec.json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("upvla: store: s3://bucket/runs/key/stage1/spec.json: ")
    assert "is the object store up, and AWS_ENDPOINT_URL right?" in line


def test_processes_of_a_driver_outside_a_job_have_a_jobs_environment(ray_head: RayHead) -> None:
    """What is set here comes from a job's own, and stays."""
    code = (
        "import os, ray\n"
        "from upvla.launch.cluster import connected\n"
        "with connected({'SET_BY_A_JOB': 'later', 'NOT_SET': 'now'}):\n"
        "    seen = ray.remote(lambda: [os.environ.get(n) for n in ('SET_BY_A_JOB', 'NOT_SET')]).remote()\n"
        "    print(ray.get(seen))"
    )
    env = os.environ | {"RAY_ADDRESS": ray_head.address, "SET_BY_A_JOB": "first"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert said.stdout.splitlines()[-1] == "[None, 'now']", said.stderr


def test_a_cluster_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: this one may be connected already."""
    code = "from upvla.launch.cluster import connected\nwith connected(): pass"
    env = os.environ | {"RAY_ADDRESS": "127.0.0.1:9", "RAY_AUTH_MODE": "disabled"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280).stderr
    assert "StackError: no Ray cluster at 127.0.0.1:9: `upvla up` starts one" in said
