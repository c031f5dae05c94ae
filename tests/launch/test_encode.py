"""What frozen networks say of a dataset, as Ray tasks: only what is missing, and the same as here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch.conftest import RayHead
from tests.launch.stages import model, only_shard, prepared
from upvla.launch.encode import encode_dataset, encode_shard
from upvla.launch.tokenizers import save_vq
from upvla.model.vq import VQTokenizer
from upvla.store import Store

__all__ = ["model", "prepared"]  # fixtures


@pytest.mark.slow
@pytest.mark.seam
@pytest.mark.timeout(900)
def test_sidecars_that_are_missing_are_written_once(ray_head: RayHead, prepared: tuple[Store, dict[str, Any]]) -> None:
    store, references = prepared
    settings, seen = references["model"], list[tuple[int, int]]()
    assert encode_dataset(store, "toy", 1, references["vq_id"], settings) == {"shards": 1, "encoded": 0}
    vq_id = save_vq(store, VQTokenizer(settings.vq))  # another one's codes
    assert encode_dataset(store, "toy", 1, vq_id, settings, lambda *step: seen.append(step)) == {
        "shards": 1,
        "encoded": 1,
    }
    assert seen == [(1, 1)]
    (sidecar,) = store.list(f"datasets/toy/derived/codes-{vq_id}/")
    there = store.read(sidecar)
    store.delete(sidecar)
    assert encode_shard(store, "toy", 1, vq_id, settings, only_shard(store)) == 1
    assert store.read(sidecar) == there
