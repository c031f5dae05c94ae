"""A line of toy size: recordings that land, a champion with random weights, and overrides that keep stages short.

python -m tests.toy_line      registers a champion on the stack of the environment, trained on dataset `mine`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.factories import write_calvin
from tests.rollout.test_policy import make_bundle
from upvla.checkpoint import export
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset, load_manifest
from upvla.store import Store

SUITES = "eval.suites=[{name: mine_d, kind: tasks, scenes: [D], tasks: [open_drawer, turn_on_led], num: 2}]"
JUDGED = (SUITES, "eval.max_steps=20", "eval.videos=1")
MIXTURE = "mixture.sources=[{dataset: mine, kind: robot, weight: 1.0}]"
NIGHTLY = (MIXTURE, *JUDGED, "stage.steps=4", "stage.eval_every=4", "stage.save_every=2", "gate.min_chains=4")
"""Over `finetune/ci`; `JUDGED` over `pretrain/ci` asks the same."""


def record(folder: Path, dataset: str, lengths: Sequence[int]) -> Path:
    """Recordings of those lengths; the same first ones again with more lengths."""
    small = {"static": (32, 32, 3), "gripper": (16, 16, 3)}
    return write_calvin(folder / dataset, lengths, seed=sum(map(ord, dataset)), scenes=("calvin_scene_A",), **small)


def land(store: Store, folder: Path, dataset: str, lengths: Sequence[int]) -> None:
    """A dataset's next version, with one recording a length."""
    settings = {"format": "calvin", "dataset": dataset, "options": {"span_end": "exclusive"}}
    raw = record(folder, dataset, lengths)
    ingest(store, IngestConfig.model_validate(settings | {"validation_fraction": 0.3}), str(raw))


def register_champion() -> None:
    from upvla.launch.pretrain import open_pretraining  # imports Ray, which reads the environment only once

    line = open_pretraining("pretrain/ci", "local", JUDGED)
    known = Dataset(line.store, load_manifest(line.store, "mine"))
    trained_on = {"mine": {"version": known.manifest.version, "content_id": known.manifest.content_id}}
    meta = {"run": "first", "step": 7, "stage": "stage2", "datasets": trained_on}
    bundle = replace(make_bundle(chunk=10, text_budget=60), stats=known.stats.to_json(), meta=meta)
    url = export(line.store, "models/first/stage2", bundle).url
    print(json.dumps(line.register({"url": url}, line.evaluate(url))))


if __name__ == "__main__":
    register_champion()
