"""Exported models: whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.conftest import mini_batch, mini_config, mini_model
from upvla.checkpoint import MARKER, Bundle, export, load_bundle, read_marker
from upvla.errors import AlreadyExists, Corrupt, Mismatch, NotFound
from upvla.model.text import TextTokenizer
from upvla.model.vq import VQTokenizer
from upvla.rollout.golden import proven
from upvla.store import open_store
from upvla.types import CALVIN_RELATIVE, Checkpoint


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    config = mini_config()
    text = TextTokenizer.train(["open the drawer", "push the block"], config.text_vocab_size)
    stats = {"id": "s1", "mean": [0.1] * 7}
    meta = {"step": 40, "run": "r1", "data": {"version": 3}}
    torch.manual_seed(1)
    return Bundle(config, mini_model(), VQTokenizer(config.vq), text, CALVIN_RELATIVE, stats, meta)


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Checkpoint:
    return export(open_store(str(tmp_path)), "a", bundle)


def files(checkpoint: Checkpoint) -> list[Path]:
    return sorted(p for p in Path(checkpoint.url).iterdir() if p.is_file())


def test_a_loaded_model_predicts_the_same(bundle: Bundle, saved: Checkpoint) -> None:
    loaded = load_bundle(saved.url)
    assert (saved.step, saved.run) == (40, "r1")
    assert loaded.config == bundle.config and loaded.text.id == bundle.text.id and loaded.vq.id == bundle.vq.id
    assert loaded.action_space == bundle.action_space
    assert (loaded.stats, loaded.meta) == (bundle.stats, bundle.meta)
    b = mini_batch(bundle.config)
    for ours, theirs in zip(
        loaded.model.predict(b.images, b.codes, b.text_ids, b.text_len),
        bundle.model.predict(b.images, b.codes, b.text_ids, b.text_len),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_exporting_again_is_a_no_op_and_other_content_is_refused(bundle: Bundle, saved: Checkpoint) -> None:
    store, before = open_store(str(Path(saved.url).parent)), files(saved)
    assert export(store, "a", bundle) == saved == read_marker(open_store(saved.url))
    assert files(saved) == before
    with pytest.raises(AlreadyExists, match="export to another prefix"):
        export(store, "a", replace(bundle, stats={"id": "s2"}))


def test_identity_is_content_without_provenance(bundle: Bundle, saved: Checkpoint, tmp_path: Path) -> None:
    elsewhere = export(open_store(str(tmp_path)), "models/b", replace(bundle, meta={"step": 41, "run": "r2"}))
    assert elsewhere.model_id == saved.model_id and elsewhere.step == 41


def test_a_flipped_bit_in_any_file_is_named(saved: Checkpoint) -> None:
    for path in files(saved):
        if path.name == MARKER:
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        with pytest.raises(Corrupt, match=path.name):
            load_bundle(saved.url)
        path.write_bytes(good[:-1])
        with pytest.raises(Corrupt, match=f"{path.name}: {len(good) - 1} bytes"):
            load_bundle(saved.url)
        path.write_bytes(good)
    load_bundle(saved.url)


def test_a_missing_file_and_a_missing_marker(saved: Checkpoint) -> None:
    vq = next(p for p in files(saved) if p.name.startswith("vq-"))
    good = vq.read_bytes()
    vq.unlink()
    with pytest.raises(Corrupt, match=f"{vq.name} is missing"):
        load_bundle(saved.url)
    vq.write_bytes(good)
    (Path(saved.url) / MARKER).unlink()
    with pytest.raises(NotFound, match="no finished checkpoint"):
        load_bundle(saved.url)


def test_a_checkpoint_of_an_earlier_version_answers_as_it_did() -> None:
    """tests/data/checkpoint_f366410 was exported by the code of that commit."""
    stored = Path(__file__).parent / "data" / "checkpoint_f366410"
    bundle = load_bundle(str(stored))
    assert read_marker(open_store(str(stored))) == Checkpoint(str(stored), "d4de73d835d5db1e", 40, "f366410")
    assert bundle.golden is not None and bundle.golden.actions.shape == (3, 4, 7)
    assert bundle.action_space == CALVIN_RELATIVE and bundle.text.vocab_size == bundle.config.text_vocab_size
    proven(bundle, "stored")
    linear = bundle.config.model_copy(update={"vision_filter": "linear"})
    with pytest.raises(Mismatch, match="answers its golden observation"):  # the answers tell whether anything changed
        proven(replace(bundle, config=linear), "stored")


def test_a_marker_of_another_format_says_what_to_do(saved: Checkpoint) -> None:
    marker = Path(saved.url) / MARKER
    value = json.loads(marker.read_text())
    for harm, message in (
        (
            value | {"format": 2},
            r"is of format 2, this upvla reads up to 1; upgrade upvla, or take a checkpoint from before",
        ),
        ({key: part for key, part in value.items() if key != "format"}, "marks no checkpoint; export the model again"),
        ([], "marks no checkpoint"),
    ):
        marker.write_text(json.dumps(harm))
        with pytest.raises(Mismatch, match=message):
            load_bundle(saved.url)


def test_weights_that_do_not_fit_the_config_are_named(bundle: Bundle, tmp_path: Path) -> None:
    other = replace(bundle, model=mini_model(chunk=3))
    checkpoint = export(open_store(str(tmp_path)), "models/c", other)
    with pytest.raises(Mismatch, match=r"'to_logits.0.bias' has shape \[21\], expected \[28\]"):
        load_bundle(checkpoint.url)


def test_parts_that_contradict_each_other_are_refused(bundle: Bundle) -> None:
    with pytest.raises(Mismatch, match="action dimensions 7, its part brings 6"):
        replace(bundle, action_space=replace(CALVIN_RELATIVE, dims=CALVIN_RELATIVE.dims[:6]))
    with pytest.raises(Mismatch, match="text vocabulary 320, its part brings 300"):
        replace(bundle, text=TextTokenizer.train(["a"], 300))
