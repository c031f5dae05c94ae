"""Training stages on a small real dataset, for the tests that run them: what they are made from, and how they start."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from tests.factories import write_calvin
from tests.train.toy import Workers
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.mixture import MixtureConfig
from upvla.launch.encode import encode_shard
from upvla.launch.tokenizers import save_text, save_vq
from upvla.launch.train import RESULT, TrainSpec
from upvla.launch.worker import work
from upvla.model.config import ModelConfig, preset
from upvla.model.text import TextTokenizer
from upvla.model.vq import VQTokenizer
from upvla.store import Store, open_store


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    text = TextTokenizer.train(["pull the handle to open the drawer"], 300)
    return preset(
        "tiny",
        text_vocab_size=300,
        eot_id=text.eot_id,
        backbone={"width": 32, "blocks": 1, "heads": 2, "mlp": 64},
        vision={"width": 32, "blocks": 1, "heads": 2, "mlp": 32, "stem": (8, 16)},
        vq={"channels": 8},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> tuple[Store, dict[str, Any]]:
    """A store with a dataset, its mixtures, tokenizers (an untrained VQ) and codes; and what a spec says of them."""
    folder = tmp_path_factory.mktemp("training")
    store = open_store(str(folder / "store"))
    write_calvin(folder / "raw", (20,) * 8)
    ingest(store, IngestConfig(format="calvin", dataset="toy", validation_fraction=0.25), str(folder / "raw"))
    plans = plans_of(store)
    vq_id = save_vq(store, VQTokenizer(model.vq))
    text_id = save_text(store, TextTokenizer.train(["pull the handle to open the drawer"], 300))
    encode_shard(store, "toy", 1, vq_id, model, only_shard(store))
    return store, plans | {"text_id": text_id, "vq_id": vq_id, "model": model}


def plans_of(store: Store, **changes: Any) -> dict[str, Any]:
    """Three robot rows to one of questions, eight a global batch; what a spec says of the plans."""
    sources = [{"dataset": "toy", "kind": kind, "weight": weight} for kind, weight in (("robot", 0.75), ("qa", 0.25))]
    mixture = MixtureConfig.model_validate({"sources": sources, "global_batch": 8} | changes)
    plans = {split: mixture.plan(store, split) for split in ("train", "validation")}
    for plan in plans.values():
        store.write_json(f"mixtures/{plan.plan_id}.json", asdict(plan))
    return {f"{split}_plan": plan.plan_id for split, plan in plans.items()}


def only_shard(store: Store) -> str:
    (shard,) = store.sub("datasets/toy").list("data/")
    return shard


def spec_of(
    store: Store, references: dict[str, Any], *, name: str, weights: dict[str, float], **changes: Any
) -> TrainSpec:
    stage = {
        "name": name,
        "steps": 8,
        "weights": weights,
        "micro_batch": 2,
        "log_every": 1,
        "eval_every": 4,
        "save_every": 2,
        "eval_batches": 1,
        "optimizer": {"lr": 3e-3},
    }
    kind = "vq" if name == "vq" else "policy"
    engine = {"num_workers": 2, "zero_stage": 2, "max_failures": 1, "stall_timeout_s": 300}
    values = {"kind": kind, "store_url": store.url, "stage": stage | changes.pop("stage", {}), "engine": engine}
    return TrainSpec.model_validate(values | references | changes)


def run_stage(workers: Workers, spec: TrainSpec) -> dict[str, Any]:
    workers.run(work, {"spec": spec.model_dump_json(), "threads": spec.engine.threads or 1})
    return dict(open_store(spec.store_url).sub(spec.prefix).read_json(RESULT))
