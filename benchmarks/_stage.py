"""A training stage on synthetic recordings, for the figures of the training engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from _recordings import make_recording

from upvla.data.commit import commit
from upvla.data.mixture import MixtureConfig
from upvla.data.shards import stage
from upvla.data.table import dataset_root
from upvla.launch.encode import encode_shard
from upvla.launch.tokenizers import save_text, save_vq
from upvla.launch.train import SPEC, TrainSpec
from upvla.model.config import preset
from upvla.model.text import TextTokenizer
from upvla.model.vq import VQTokenizer
from upvla.store import Store, open_store


def prepare(url: str, *, recordings: int, global_batch: int) -> tuple[Store, dict[str, Any]]:
    """A store with a dataset, plans, an untrained image tokenizer and its codes; and what a spec says of them."""
    store = open_store(url)
    root = dataset_root(store, "bench")
    staged = stage(root, ((make_recording(n), "token") for n in range(recordings)))
    commit(store, "bench", [staged], validation_fraction=0.25, options={"format": "synthetic"})
    text = TextTokenizer.train([f"move block {n}" for n in range(7)], 300)
    model = preset("tiny", text_vocab_size=300, eot_id=text.eot_id)
    source = {"dataset": "bench", "kind": "robot", "weight": 1}
    mixture = MixtureConfig.model_validate({"sources": [source], "global_batch": global_batch})
    plans = {split: mixture.plan(store, split) for split in ("train", "validation")}
    for plan in plans.values():
        store.write_json(f"mixtures/{plan.plan_id}.json", asdict(plan))
    vq_id = save_vq(store, VQTokenizer(model.vq))
    for shard in root.list("data/"):
        encode_shard(store, "bench", 1, vq_id, model, shard)
    references = {"train_plan": plans["train"].plan_id, "validation_plan": plans["validation"].plan_id}
    return store, references | {"model": model, "text_id": save_text(store, text), "vq_id": vq_id}


def make_spec(
    store: Store, references: dict[str, Any], stage_config: dict[str, Any], engine: dict[str, Any]
) -> TrainSpec:
    values = {"kind": "policy", "store_url": store.url, "stage": stage_config, "engine": engine}
    return TrainSpec.model_validate(values | references)


def write_spec(store: Store, references: dict[str, Any], stage_config: dict[str, Any], engine: dict[str, Any]) -> str:
    """URL of the spec that `python -m upvla.launch.driver` takes."""
    spec = make_spec(store, references, stage_config, engine)
    place = store.sub(spec.prefix)
    place.write_json(SPEC, spec.model_dump(mode="json"))
    return f"{place.url}/{SPEC}"
