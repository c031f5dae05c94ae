"""A shard or a manifest of the newest resume point is damaged: it is refused by name, and the set before it is used."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.rows import told
from tests.train.test_resume import STEPS, run
from tests.train.toy import Workers
from upvla.store import Store, open_store
from upvla.train import resume

pytestmark = pytest.mark.seam

SAVED, BEFORE = STEPS, STEPS - 2
SAID = {
    "missing": "{shard} is missing",
    "truncated": "{shard} has {less} bytes, its manifest says {size}",
    "flipped": "{shard} does not match the sha256 in its manifest",
    "manifest": "resume point {manifest} is skipped: its manifest is unreadable",
}


def run_and_listen(env: Mapping[str, str], url: str, scratch: str) -> dict[str, Any]:
    """A trainer's life on what lies at `url`, and what it said of resume points before it began."""
    os.environ.update(env)  # this process may be older than the S3 server
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(resume.__name__)
    logger.addHandler(handler)
    try:
        return run(url, scratch) | {"messages": messages}
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def whole(two_workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """Two workers without a fault: the store of their last two sets, and how it went."""
    folder = tmp_path_factory.mktemp("whole")
    found = two_workers.run(run, str(folder / "store"), str(folder / "scratch"))[0]
    return open_store(str(folder / "store")), found


def damage(store: Store, kind: str) -> dict[str, Any]:
    """Of the newest set; what a refusal names. The kind is the seed of which worker's tensors, and of which bit."""
    point, dice = resume.points(store)[0], random.Random(kind)
    shard, manifest = dice.choice([s for s in point.shards if s.name.endswith(".pt")]), f"{point.name}.json"
    key = f"{point.name}/{shard.name}"
    data = bytearray(store.read(key))
    assert (point.step, len(data)) == (SAVED, shard.num_bytes)
    if kind == "missing":
        store.delete(key)
    elif kind == "truncated":
        store.write(key, bytes(data[:-1]))
    elif kind == "flipped":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        store.write(key, bytes(data))
    elif kind == "manifest":
        store.write(manifest, store.read(manifest)[:99])
    else:
        store.delete(manifest)
    named = {"shard": f"{store.url}/{key}", "manifest": f"{store.url}/{manifest}"}
    return named | {"size": len(data), "less": len(data) - 1}


@pytest.mark.parametrize("kind", [*SAID, "uncommitted"])
def test_a_damaged_set_is_refused_by_name_and_the_previous_one_used(
    two_workers: Workers, whole: tuple[Store, dict[str, Any]], store: Store, kind: str, tmp_path: Path
) -> None:
    """Whose steps are then taken again, to the same bits."""
    undisturbed, reference = whole
    for key in undisturbed.list():
        store.write(key, undisturbed.read(key))
    named = damage(store, kind)
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    found = two_workers.run(run_and_listen, env, store.url, str(tmp_path / "scratch"))[0]
    again = {step: loss for step, loss in reference["losses"].items() if step > BEFORE}
    same_weights = all(np.array_equal(found["weights"][name], weight) for name, weight in reference["weights"].items())
    equal = found["losses"] == again and same_weights
    cost = {"lost_steps": SAVED - found["start"], "first_new_step_s": found["first_step_s"]}
    told(f"resume point of step {SAVED}: {kind}", **cost, bit_identical=equal, said=found["messages"][:1])
    assert found["start"] == BEFORE and equal
    if kind in SAID:
        assert any(SAID[kind].format(**named) in message for message in found["messages"]), found["messages"]
    else:
        assert not found["messages"], "a set without a manifest does not exist"
