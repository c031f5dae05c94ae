"""A run that starts from what others trained: image tokenizer, text tokenizer, frozen tower; and what it then lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.toy_line import MIXTURE, land
from upvla.config import RunConfig, SiteConfig, load
from upvla.data.samples import SampleReader
from upvla.errors import ConfigError
from upvla.images import Resize
from upvla.launch.encode import encoding_key
from upvla.launch.inputs import open_plan
from upvla.launch.pretrain import Pretraining
from upvla.launch.steps import once, step_key
from upvla.launch.tokenizers import load_text, load_tower, load_vq
from upvla.launch.weights import import_weights
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.model.weights import TOWER
from upvla.sim.playtable.tasks import task

PLAN = {"train": "0123456789abcdef", "validation": "fedcba9876543210", "versions": {}}
CLIP = "model.vision={kind: clip, image_size: 32, patch: 16, width: 32, blocks: 2, heads: 2, mlp: 32, pool: [1, 1], frozen: true, keypoints: 0, stem: []}"  # noqa: E501 - one override


def line(folder: Path, overrides: Sequence[str], config: str = "pretrain/ci", tracking_url: str = "") -> Pretraining:
    site = SiteConfig(store_url=str(folder / "store"), tracking_url=tracking_url)
    return Pretraining(site, load(config, RunConfig, overrides))


def test_given_tokenizers_are_taken_and_none_is_trained(tmp_path: Path) -> None:
    config = load("pretrain/ci", RunConfig).model
    torch.manual_seed(0)
    vq, text = VQTokenizer(config.vq), TextTokenizer.train(["open the drawer"], config.text_vocab_size)
    torch.save(vq.state_dict(), tmp_path / "pytorch_model.bin")
    import_weights("magvit", str(tmp_path), str(tmp_path / "magvit"), config)
    (tmp_path / "tokenizer.json").write_text(text._tokenizer.to_str())
    run = line(tmp_path, [f"init.vq={tmp_path / 'magvit'}", f"init.text={tmp_path / 'tokenizer.json'}"])
    found = run.train_vq(PLAN)
    assert found["vq_id"] == vq.id == load_vq(run.store, found["vq_id"]).id
    assert load_text(run.store, run.train_text(PLAN)["text_id"]).encode("open") == text.encode("open")


def test_recordings_keep_their_own_words_unless_the_mixture_says_otherwise(tmp_path: Path) -> None:
    """A person's words for a task that has the name of one of the playtable's."""
    recorded = {"pull the handle to open the drawer", "press the button to turn on the led", "pick up the red block"}

    def instructions(overrides: Sequence[str]) -> tuple[set[str], str]:
        run = line(tmp_path, overrides)
        land(run.store, tmp_path, "mine", (18, 20, 22, 24, 19))
        plan = run.mix()
        mixture = open_plan(run.store, plan["train"])
        reader = SampleReader(mixture, chunk=4, cameras=["static"], resize=Resize(size=16))
        told = {reader.read(mixture.sample_at(position), position).text for position in range(2000)}
        return told, run.train_text(plan)["text_id"]

    own, plain = instructions([MIXTURE])
    assert own == recorded
    told, taught = instructions([MIXTURE.replace("weight", "paraphrases: playtable, weight")])
    led = "press the button to turn on the led"  # the playtable says it in other words
    assert told == {led, *task("open_drawer").train, *task("lift_red_block_table").train}
    assert taught != plain  # the text tokenizer is trained on what will be read


def test_a_frozen_tower_comes_with_the_weights_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision is frozen and init\.weights name no weights of kind clip"):
        line(tmp_path, [CLIP]).tower_id({})
    config = load("pretrain/ci", RunConfig, [CLIP]).model
    source = UPVLA(config)
    state = {n.removeprefix(TOWER): v for n, v in source.state_dict().items() if n.startswith(TOWER)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    import_weights("clip", str(tmp_path), str(tmp_path / "clip"), config)
    run = line(tmp_path, [CLIP, f"init.weights=[{tmp_path / 'clip'}]"])
    tower_id = run.tower_id({})
    assert tower_id == source.vision.id == load_tower(run.store, tower_id).id
    assert line(tmp_path, []).tower_id({}) == "", "a tower that learns has no features that could be kept"


def test_encoding_is_keyed_by_all_that_its_sidecars_are_made_of() -> None:
    def key(*overrides: str, tower: str = "") -> str:
        model = load("pretrain/ci", RunConfig, overrides).model
        return step_key("encode", encoding_key({"mine": 1}, "vq", model, tower))

    assert key("model.chunk=5") == key("model.vision_filter=linear") == key()
    changed = [("model.vq_filter=linear",), ("model.code_cameras=[gripper]",)]
    assert len({key(), *(key(*overrides) for overrides in changed)}) == 3
    assert len({key(), key(tower="t"), key("model.vision_filter=linear", tower="t")}) == 3


def test_the_action_stage_alone_cannot_read_descriptions(tmp_path: Path) -> None:
    run = line(tmp_path, ["model.description={budget: 8}"], "ablation/no_stage1")
    text, vq = {"text_id": "a"}, {"vq_id": "b"}
    assert run.train_stage("stage1", PLAN, text, vq) == {}
    with pytest.raises(ConfigError, match=r"model\.description needs a stage1"):
        run.train_stage("stage2", PLAN, text, vq, {})


def test_without_mlflow_a_finished_stage_is_read_back_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start is still refused, by the driver (`test_what_a_cluster_cannot_give_...`)."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = line(tmp_path, [], tracking_url="http://127.0.0.1:9")
    spec = away._spec("vq", away.config.vq, PLAN, model=away.config.model)
    assert spec.tracking is not None and away.logbook.nested(spec) == spec
    done = once(away.store, "vq", {"spec": spec.key}, lambda: {"vq_id": "0123456789abcdef"})
    assert away.train_vq(PLAN) == done
