"""Exact resume on real engines: what a resumed run computes is bit for bit what the uninterrupted one computes."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import S3Server
from tests.faults.rows import told
from tests.train.toy import GLOBAL_BATCH, Workers, batches, toy
from upvla.errors import AlreadyOwned, Mismatch, NoSpace, StoreError
from upvla.store import LocalStore, Store, open_store
from upvla.store.s3 import S3Store
from upvla.train import resume, scratch
from upvla.train.config import StageConfig
from upvla.train.engine import Engine, EngineConfig, OptimizerConfig, build_engine
from upvla.train.loop import fit
from upvla.types import Batch

pytestmark = pytest.mark.seam
STEPS = 8
IDENTITY = {"run": "toy", "plan": "p1"}
RETENTION = resume.Retention()
_SLOW_S = 2.0  # an upload


def build(
    zero_stage: int,
    universal: bool = False,
    *,
    dropout: float = 0.2,
    width: int = 12,
    ema: float | None = None,
    **config: Any,
) -> Engine:
    """With dropout, so that a lost random state shows."""
    world_size = torch.distributed.get_world_size()
    return build_engine(
        toy(dropout=dropout, width=width),
        EngineConfig(num_workers=world_size, zero_stage=zero_stage, **config),
        OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1),
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // world_size,
        ema_decay=ema,
        universal=universal,
    )


class Killed(Exception):
    pass


def run(
    url: str,
    scratch: str,
    zero_stage: int = 2,
    stop_at: int | None = None,
    identity: dict[str, str] = IDENTITY,
    retention: resume.Retention = RETENTION,
    **engine_options: Any,
) -> dict[str, Any]:
    """One trainer's life: restore what is there, train (until `stop_at`), saving every 2 steps."""
    began = time.monotonic()
    torch.manual_seed(torch.distributed.get_rank())
    store, options = open_store(url), {"identity": identity, "scratch": Path(scratch)}
    engine, point = resume.open_engine(
        lambda universal: build(zero_stage, universal, **engine_options), store, zero_stage=zero_stage, **options
    )
    saver = resume.Saver(engine, store, retention=retention, **options)
    start = point.step if point else 0
    losses: dict[int, float] = {}
    positions: list[int] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if "loss/total" in metrics:
            losses[step] = metrics["loss/total"]
            found.setdefault("first_step_s", time.monotonic() - began)
        if step == stop_at:
            raise Killed

    def data() -> Iterator[list[Batch]]:
        for micro_batches in batches(engine.rank, engine.world_size, start_step=start):
            positions.extend(int(p) for batch in micro_batches for p in batch.positions)
            yield micro_batches

    config = StageConfig(
        name="t", steps=STEPS, weights={"act": 1, "mmu": 0.1}, micro_batch=1, log_every=1, eval_every=99, save_every=2
    )
    found: dict[str, Any] = {"start": start, "losses": losses, "positions": positions}
    try:
        fit(
            engine,
            data(),
            config,
            start_step=start,
            validation=[],
            log=log,
            save=lambda step: saver.save(step, {"losses": {str(k): v for k, v in losses.items()}}),
        )
    except Killed:
        saver.wait()
        return found
    saver.wait()
    weights = {name: tensor.numpy() for name, tensor in engine.full_weights().items()}
    return found | {"weights": weights, "meta": dict(point.meta) if point else None, "stalled_s": saver.stalled_s}


@pytest.mark.parametrize(
    ("zero_stage", "engine"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"offload": "cpu"}),
        (3, {"offload": "cpu"}),
        (2, {"precision": "bf16"}),
        (3, {"precision": "bf16"}),
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    two_workers: Workers, zero_stage: int, engine: dict[str, str], tmp_path: Path
) -> None:
    resumes_bit_for_bit(two_workers, zero_stage, tmp_path, engine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("async_io")
def test_resumed_from_a_local_disk_equals_uninterrupted_bit_for_bit(
    one_worker: Workers, two_workers: Workers, tmp_path: Path
) -> None:
    place = {"offload": "nvme", "nvme_folder": str(tmp_path / "disk"), "width": 1024}
    resumes_bit_for_bit(two_workers, 3, tmp_path, place)
    assert list((tmp_path / "disk").rglob("*.swp"))
    elsewhere = (two_workers, place | {"offload": "none", "nvme_folder": ""}), (one_worker, place)
    for workers, there in elsewhere:
        with pytest.raises(Mismatch, match=r"was written with engine\.offload=nvme"):
            workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), 3, **there)


def resumes_bit_for_bit(two_workers: Workers, zero_stage: int, tmp_path: Path, place: dict[str, Any]) -> None:
    whole = two_workers.run(run, str(tmp_path / "whole"), str(tmp_path / "s"), zero_stage, **place)[0]
    first = two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage, 5, **place)[0]
    second = two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage, **place)[0]
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
    with scratch.locked_folder(tmp_path) as mine:
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


def test_a_manifest_that_was_changed_is_no_set(saved: Store, caplog: pytest.LogCaptureFixture) -> None:
    newest, before = resume.points(saved)
    key = f"{newest.name}.json"
    text = saved.read(key).decode()
    saved.write(key, text.replace('"step": 8', '"step": 9').encode())
    assert resume.points(saved) == [before]
    assert f"{key} is skipped" in caplog.text
    saved.write(key, text.encode())
    assert resume.points(saved) == [newest, before]


def commit_beside_a_successor(url: str, env: dict[str, str], scratch_folder: str) -> list[str]:
    """Sets whose shards lie there after two saves, between which a later trainer has begun one."""
    os.environ |= env
    engine, store = build(2, False), open_store(url)
    store.write("step-00000001-dead/shard", b"of a trainer that is gone")
    cut_upload(store, "step-00000001-late/shard")
    saver = resume.Saver(engine, store, identity=IDENTITY, scratch=Path(scratch_folder), retention=resume.Retention(1))
    store.write("step-00000002-next/shard", b"of the one that took the key over")
    begun = cut_upload(store, "step-00000002-next/large")
    for step in (3, 4):
        saver.save(step, {})
    saver.wait()
    assert list(store.unfinished()) == [begun]
    return sorted({key.partition("/")[0][:18] for key in store.list("step-") if "/" in key})


def cut_upload(store: Store, key: str) -> str:
    """Name of an upload that a kill has cut short: it takes up room and is not listed."""
    assert isinstance(store, S3Store)
    store._client().create_multipart_upload(**store._at(key))
    (name,) = (name for name in store.unfinished() if name.startswith(key))
    return name


def test_a_trainer_removes_what_the_dead_left_and_not_what_a_successor_is_writing(
    one_worker: Workers, s3_server: S3Server, tmp_path: Path
) -> None:
    left = one_worker.run(commit_beside_a_successor, s3_server.url(), s3_server.env, str(tmp_path))[0]
    assert [name[:13] for name in left] == ["step-00000002", "step-00000004"]


def test_another_runs_set_is_refused(one_worker: Workers, saved: Store) -> None:
    with pytest.raises(Mismatch, match="plan is 'p1' there, 'p2' here"):
        resumed_from(one_worker, saved, identity={"run": "toy", "plan": "p2"})
    with pytest.raises(Mismatch, match=r"written under ZeRO 2, this run has 0; set engine\.zero_stage=2"):
        resumed_from(one_worker, saved, zero_stage=0)
    with pytest.raises(Mismatch, match=r"written under ZeRO 2, this run has 3"):
        resumed_from(one_worker, saved, zero_stage=3)


@pytest.fixture(scope="module")
def four_workers() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.close()


def resized(before: Workers, after: Workers, folder: Path, zero_stages: tuple[int, int], **options: Any) -> None:
    """Steps 1 to 4 by one group and 5 to 8 by another give what one group gives alone."""
    whole = before.run(run, str(folder / "whole"), str(folder / "s"), zero_stages[0], dropout=0.0, **options)
    first = before.run(run, str(folder / "cut"), str(folder / "s"), zero_stages[0], 5, dropout=0.0, **options)
    second = after.run(run, str(folder / "cut"), str(folder / "s"), zero_stages[1], dropout=0.0, **options)
    assert second[0]["start"] == 4
    consumed = [sorted(p for worker in group for p in worker["positions"]) for group in (whole, second)]
    assert consumed == [list(range(STEPS * GLOBAL_BATCH)), list(range(4 * GLOBAL_BATCH, STEPS * GLOBAL_BATCH))]
    losses = {step: loss for step, loss in first[0]["losses"].items() if step <= 4} | second[0]["losses"]
    difference = max(abs(losses[step] / loss - 1) for step, loss in whole[0]["losses"].items())
    fault = f"ZeRO {zero_stages[0]}, {len(whole)} workers ended in step 5; ZeRO {zero_stages[1]}, {len(second)} go on"
    cost = {"lost_steps": max(first[0]["losses"]) - second[0]["start"], "first_new_step_s": second[0]["first_step_s"]}
    told(fault, **cost, loss_difference=difference)
    assert losses == pytest.approx(whole[0]["losses"], rel=1e-5)
    for name, weight in whole[0]["weights"].items():
        np.testing.assert_allclose(second[0]["weights"][name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_fewer_workers_go_on_with_the_same_batches_and_losses(
    one_worker: Workers, two_workers: Workers, zero_stage: int, tmp_path: Path
) -> None:
    resized(two_workers, one_worker, tmp_path, (zero_stage, zero_stage))


@pytest.mark.parametrize(("zero_stages", "ema"), [((1, 1), None), ((2, 2), 0.9), ((3, 3), 0.9), ((1, 2), None)])
def test_more_workers_go_on_with_the_same_batches_and_losses(
    one_worker: Workers, two_workers: Workers, zero_stages: tuple[int, int], ema: float | None, tmp_path: Path
) -> None:
    """Also under another ZeRO stage, and with averaged weights."""
    resized(one_worker, two_workers, tmp_path, zero_stages, ema=ema)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_become_four(two_workers: Workers, four_workers: Workers, zero_stage: int, tmp_path: Path) -> None:
    resized(two_workers, four_workers, tmp_path, (zero_stage, zero_stage))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_averaged_weights_resume_bit_for_bit(two_workers: Workers, zero_stage: int, tmp_path: Path) -> None:
    whole = two_workers.run(run, str(tmp_path / "whole"), str(tmp_path / "s"), zero_stage, ema=0.5)[0]
    two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage, 5, ema=0.5)
    second = two_workers.run(run, str(tmp_path / "cut"), str(tmp_path / "s"), zero_stage, ema=0.5)[0]
    plain = two_workers.run(run, str(tmp_path / "plain"), str(tmp_path / "s"), zero_stage)[0]
    assert whole["losses"] == plain["losses"], "averaging changes nothing in training"
    for name, weight in whole["weights"].items():
        assert np.array_equal(second["weights"][name], weight), name
        assert not np.array_equal(plain["weights"][name], weight), name


def test_retention_keeps_the_last_and_those_of_every_so_many_steps(one_worker: Workers, tmp_path: Path) -> None:
    kept = resume.Retention(last=1, every=4)
    one_worker.run(run, str(tmp_path / "run"), str(tmp_path / "s"), retention=kept)
    assert [point.step for point in resume.points(open_store(str(tmp_path / "run")))] == [8, 4]


def save_twice(url: str, scratch_folder: str, owned: bool) -> tuple[str, list[int]]:
    engine, store = build(2), open_store(url)

    def owns() -> None:
        if not owned:
            raise AlreadyOwned("somebody else trains this")

    saver = resume.Saver(engine, store, identity={}, scratch=Path(scratch_folder), owns=owns)
    saver.save(1, {})
    message = ""
    try:
        saver.save(2, {})
        saver.wait()
    except AlreadyOwned as error:
        message = str(error)
    return message, [point.step for point in resume.points(store)]


def test_a_trainer_that_lost_the_run_commits_nothing(two_workers: Workers, tmp_path: Path) -> None:
    owner = two_workers.run(save_twice, str(tmp_path / "run"), str(tmp_path / "s"), True)
    assert owner[0] == ("", [2, 1])
    for answer in two_workers.run(save_twice, str(tmp_path / "other"), str(tmp_path / "s"), False):
        assert answer == ("somebody else trains this", [])


def save_to_a_slow_store(url: str, scratch_folder: str) -> dict[str, Any]:
    class Slow(LocalStore):
        def upload(self, path: str | Path, key: str) -> None:
            if not key.endswith(".json"):  # of the two files of a worker one
                time.sleep(_SLOW_S)
            super().upload(path, key)

    engine, store = build(0), Slow(url)
    saver = resume.Saver(engine, store, identity={}, scratch=Path(scratch_folder))
    began = time.monotonic()
    saver.save(1, {})
    told = {"save_s": time.monotonic() - began, "stalled_s": saver.stalled_s, "before": resume.points(store)}
    saver.wait()
    return told | {"committed_s": time.monotonic() - began, "after": [point.step for point in resume.points(store)]}


def test_training_does_not_wait_for_a_slow_store(one_worker: Workers, tmp_path: Path) -> None:
    told = one_worker.run(save_to_a_slow_store, str(tmp_path / "run"), str(tmp_path / "s"))[0]
    assert told["stalled_s"] <= told["save_s"] < _SLOW_S, "training goes on when the shards lie on the local disk"
    assert told["before"] == [] and told["after"] == [1]
    assert told["committed_s"] >= _SLOW_S


def save_while_its_record_goes_on(url: str, scratch_folder: str) -> dict[str, Any]:
    engine, store, validated = build(0), open_store(url), threading.Event()
    told = {"validation": {"1": {"val_loss/act": 0.5}}}
    saver = resume.Saver(
        engine, store, identity={}, scratch=Path(scratch_folder), owns=lambda: require(validated.wait(60))
    )
    saver.save(1, told)
    told["validation"]["2"] = {"val_loss/act": 0.4}
    validated.set()
    saver.wait()
    (point,) = resume.points(store)
    return dict(point.meta)


def require(well: bool) -> None:
    assert well


def test_a_point_tells_of_its_step_and_of_none_after_it(one_worker: Workers, tmp_path: Path) -> None:
    """Who goes on from it would else take a validation for seen that is still to come, and not save what is best."""
    told = one_worker.run(save_while_its_record_goes_on, str(tmp_path / "run"), str(tmp_path / "s"))[0]
    assert told == {"validation": {"1": {"val_loss/act": 0.5}}}


def save_where_rank_1_cannot_write(url: str, scratch: str) -> str:
    engine = build(2)
    store = open_store(url if engine.rank == 0 else "/dev/null/nowhere")
    return failure_of_a_save(engine, store, Path(scratch))


def failure_of_a_save(engine: Engine, store: Store, scratch: Path) -> str:
    saver = resume.Saver(engine, store, identity={}, scratch=scratch)
    saver.save(2, {})
    try:
        saver.wait()
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


def save_where_rank_1_has_no_thread_left(url: str, scratch: str) -> str:
    class Broken(LocalStore):
        def upload(self, path: str | Path, key: str) -> None:
            raise RuntimeError("can't start new thread")

    engine = build(2)
    return failure_of_a_save(engine, (LocalStore, Broken)[engine.rank](url), Path(scratch))


def test_nor_do_the_others_wait_for_one_whose_upload_ends_in_an_unknown_error(
    two_workers: Workers, tmp_path: Path
) -> None:
    messages = two_workers.run(save_where_rank_1_has_no_thread_left, str(tmp_path / "run"), str(tmp_path / "s"))
    assert messages == ["a resume point was not sent (RuntimeError: can't start new thread): it is saved anew"] * 2
    assert resume.points(open_store(str(tmp_path / "run"))) == []


def test_a_disk_that_is_too_full_is_named_with_what_is_needed(tmp_path: Path) -> None:
    resume.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(NoSpace, match=rf"no space left under {tmp_path}: .* takes 1099511627776 MB .*a TMPDIR on"):
        resume.require_space(tmp_path / "not" / "yet", 2**60)
