"""Exact resume on real engines: what a resumed run computes is bit for bit what the uninterrupted one computes."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.toy import GLOBAL_BATCH, Workers, batches, toy
from upvla.errors import Mismatch, StoreError
from upvla.store import Store, open_store
from upvla.train import resume
from upvla.train.engine import Engine, EngineConfig, OptimizerConfig, build_engine
from upvla.train.loop import StageConfig, fit

pytestmark = pytest.mark.seam
STEPS = 8
IDENTITY = {"run": "toy", "plan": "p1"}


def build(zero_stage: int, precision: str = "fp32") -> Engine:
    world_size = torch.distributed.get_world_size()
    return build_engine(
        toy(dropout=0.2),  # so that a lost random state shows
        EngineConfig(num_workers=world_size, zero_stage=zero_stage, precision=precision),
        OptimizerConfig(lr=1e-2, warmup_steps=2),
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // world_size,
    )


class Killed(Exception):
    pass


def run(
    url: str, scratch: str, zero_stage: int = 2, stop_at: int | None = None, identity: dict[str, str] = IDENTITY
) -> dict[str, Any]:
    """One trainer's life: restore what is there, train (until `stop_at`), saving every 2 steps."""
    torch.manual_seed(torch.distributed.get_rank())
    store, engine = open_store(url), build(zero_stage)
    point = resume.restore(engine, store, identity=identity, scratch=Path(scratch))
    start = point.step if point else 0
    losses: dict[int, float] = {}

    def save(step: int) -> None:
        meta = {"losses": {str(k): v for k, v in losses.items()}}
        resume.save(engine, store, step, identity=identity, meta=meta, scratch=Path(scratch))

    def log(metrics: dict[str, float], step: int) -> None:
        if "loss/total" in metrics:
            losses[step] = metrics["loss/total"]
        if step == stop_at:
            raise Killed

    config = StageConfig(
        name="t", steps=STEPS, weights={"act": 1, "mmu": 0.1}, micro_batch=1, log_every=1, eval_every=99, save_every=2
    )
    data = batches(engine.rank, engine.world_size, start_step=start)
    try:
        fit(engine, data, config, start_step=start, validation=[], log=log, save=save)
    except Killed:
        return {"start": start, "losses": losses}
    weights = {name: tensor.numpy() for name, tensor in engine.full_weights().items()}
    return {"start": start, "losses": losses, "weights": weights, "meta": dict(point.meta) if point else None}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(two_workers: Workers, zero_stage: int, tmp_path: Path) -> None:
    whole = two_workers.run(run, str(tmp_path / "whole"), str(tmp_path / "s"), zero_stage)[0]
    first = two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage, 5)[0]
    second = two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage)[0]
    assert (whole["start"], first["start"], second["start"]) == (0, 0, 4)
    assert first["losses"] | second["losses"] == whole["losses"]
    assert second["meta"]["losses"] == {str(step): whole["losses"][step] for step in (1, 2, 3, 4)}
    for name, weight in whole["weights"].items():
        assert np.array_equal(second["weights"][name], weight), name
    assert not list((tmp_path / "s").iterdir()), "scratch folders are removed"


def test_what_killed_workers_left_in_scratch_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    abandoned, owned, young = (tmp_path / f"resume-{name}" for name in ("abandoned", "owned", "young"))
    for folder in (abandoned, owned, young):
        folder.mkdir()
        (folder / "shard.pt").write_bytes(b"x")
    hour_ago = time.time() - 3600
    for folder in (abandoned, owned):
        os.utime(folder, (hour_ago, hour_ago))
    lock = os.open(owned, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with resume._folder(tmp_path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([owned, young, mine])
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == [owned, young]


@pytest.fixture
def saved(one_worker: Workers, tmp_path: Path) -> Store:
    """Sets at steps 6 and 8 of a finished run (older ones are collected)."""
    one_worker.run(run, str(tmp_path / "run"), str(tmp_path / "s"))
    return open_store(str(tmp_path / "run"))


def resumed_from(workers: Workers, store: Store, **changes: Any) -> int:
    return workers.run(run, store.url, f"{store.url}-s", **changes)[0]["start"]


def test_only_the_last_sets_are_kept(saved: Store) -> None:
    assert [point.step for point in resume.points(saved)] == [8, 6]
    assert {key.partition("/")[0].removesuffix(".json") for key in saved.list()} == {
        p.name for p in resume.points(saved)
    }
    newest = resume.latest(saved)
    assert newest is not None
    assert newest.step == 8
    assert newest.world_size == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest", "uncommitted"])
def test_a_damaged_set_is_refused_by_name_and_the_previous_one_used(
    one_worker: Workers, saved: Store, damage: str
) -> None:
    point = resume.points(saved)[0]
    key = f"{point.name}/{max(point.shards, key=lambda shard: shard.num_bytes).name}"
    data = bytearray(saved.read(key))
    if damage == "missing":
        saved.delete(key)
    elif damage == "truncated":
        saved.write(key, bytes(data[:-1]))
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        saved.write(key, bytes(data))
    elif damage == "manifest":
        saved.write(f"{point.name}.json", b'{"step": 8')
    else:
        saved.delete(f"{point.name}.json")
    assert resumed_from(one_worker, saved) == 6
    if damage in ("missing", "manifest", "uncommitted"):
        assert resume.latest(saved).step in (6, 8)


def restore_messages(url: str, scratch: str) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("upvla.train.resume").addHandler(handler)
    resume.restore(build(2), open_store(url), identity=IDENTITY, scratch=Path(scratch))
    return messages


def test_the_skipped_set_and_file_are_named(one_worker: Workers, saved: Store, tmp_path: Path) -> None:
    point = resume.points(saved)[0]
    key = f"{point.name}/{point.shards[0].name}"
    saved.write(key, b"x" * point.shards[0].num_bytes)
    (message,) = one_worker.run(restore_messages, saved.url, str(tmp_path / "s"))[0]
    assert point.name in message
    assert f"{saved.url}/{key} does not match the sha256 in its manifest" in message


def test_another_runs_set_and_another_world_size_are_refused(
    one_worker: Workers, two_workers: Workers, saved: Store
) -> None:
    with pytest.raises(Mismatch, match="plan is 'p1' there, 'p2' here"):
        resumed_from(one_worker, saved, identity={"run": "toy", "plan": "p2"})
    with pytest.raises(Mismatch, match=r"written by 1 workers, this run has 2; set engine\.num_workers=1"):
        resumed_from(two_workers, saved)


def save_where_rank_1_cannot_write(url: str, scratch: str) -> str:
    engine = build(2)
    store = open_store(url if engine.rank == 0 else "/dev/null/nowhere")
    try:
        resume.save(engine, store, 2, identity={}, meta={}, scratch=Path(scratch))
    except StoreError as error:
        return str(error)
    return ""


def test_a_worker_that_cannot_write_fails_the_save_for_all_and_nothing_is_committed(
    two_workers: Workers, tmp_path: Path
) -> None:
    messages = two_workers.run(save_where_rank_1_cannot_write, str(tmp_path / "run"), str(tmp_path / "s"))
    assert messages[0] == messages[1]
    assert "/dev/null/nowhere" in messages[0]
    assert resume.points(open_store(str(tmp_path / "run"))) == []
