"""Lives of a small trainer: real processes in one gloo group, real signals, the product's loop, engine and resume.

A life is W processes that restore what is there, train, and save every few steps. One of them may be told to send
itself SIGKILL at an exact place; the others find out the way they would, by their group breaking. Processes are forked
from one that has imported everything, so that a life begins in a second. They save to a folder, or to a bucket.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing as mp
import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.train.toy import GLOBAL_BATCH, batches, toy
from upvla.store import LocalStore, S3Store, Store
from upvla.train import resume
from upvla.train.config import EngineConfig, OptimizerConfig, StageConfig
from upvla.train.engine import Engine, build_engine
from upvla.train.loop import fit

STEPS, SAVE_EVERY = 12, 3
PHASES = ("step", "snapshot", "upload", "commit", "committed", "collect", "restore", "export")
"""Where a worker dies: in a step; while its shards go to the local disk; between two uploads; before and after the
manifest is created; while older sets are deleted; after a death that left one set, while that is downloaded; and at the
end, before or after the whole weights are gathered."""

CONVERT = "convert"
"""And where one worker is to go on instead of two: while it converts their set."""

STALL, STALL_TIMEOUT_S = "stall", 5
_LIFE_TIMEOUT_S = 200


@dataclass(frozen=True)
class Kill:
    """`rank` dies at the `nth` occasion of `phase` (a step: after that many). A `STALL` is a stop amid that step."""

    phase: str
    rank: int
    nth: int


class Life(NamedTuple):
    """How it went: exit codes by rank, the step it began after, losses by step as far as it came, final weights."""

    exit_codes: list[int]
    start: int
    losses: dict[int, float]
    positions: dict[int, list[int]]
    weights: dict[str, torch.Tensor]
    began_s: float
    first_step_s: float
    last_step_s: float
    ended_s: float


class Deadly(Store):
    """Before a kind of store: this process dies on it at the nth occasion of one kind of operation."""

    kill: Kill | None = None

    def _occasion(self, phase: str) -> None:
        if self.kill is not None and self.kill.phase == phase:
            Deadly.kill = Kill(phase, self.kill.rank, self.kill.nth - 1) if self.kill.nth > 1 else die()

    def upload(self, path: str | Path, key: str) -> None:
        self._occasion("upload")
        super().upload(path, key)

    def create(self, key: str, data: bytes) -> str:
        self._occasion("commit")
        token = super().create(key, data)
        self._occasion("committed")
        return token

    def delete(self, key: str) -> None:
        self._occasion("collect")
        super().delete(key)

    def download(self, key: str, path: str | Path) -> None:
        self._occasion("restore")
        super().download(key, path)


class DeadlyFolder(Deadly, LocalStore): ...


class DeadlyBucket(Deadly, S3Store): ...


def die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Lives:
    """`bucket_url` is where their stores lie, by default each in its own folder, and `env` is what leads there."""

    def __init__(self, bucket_url: str = "", env: Mapping[str, str] | None = None) -> None:
        self._bucket_url, self._env = bucket_url, dict(env or {})
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.preloaded"])

    def store_url(self, folder: Path) -> str:
        return f"{self._bucket_url}/{folder.name}" if self._bucket_url else str(folder / "store")

    def live(self, folder: Path, zero_stage: int, kill: Kill | None = None, world_size: int = 2) -> Life:
        """One life on the store of `folder`, until all of it has ended."""
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / "told.jsonl"
        out.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.monotonic()
        where = (folder, self.store_url(folder), self._env)
        processes = [
            self._context.Process(target=_live, args=(*where, out, zero_stage, kill, rank, world_size, port))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _LIFE_TIMEOUT_S
        stalled = processes[kill.rank] if kill is not None and kill.phase == STALL else None
        for process in sorted(processes, key=lambda each: each is stalled):
            if process is stalled:  # the others have given it up
                process.kill()
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
                raise TimeoutError(f"a worker did not notice within {_LIFE_TIMEOUT_S} s that the group was broken")
        return _read(out, [int(process.exitcode or 0) for process in processes], began)


def _read(out: Path, exit_codes: list[int], began: float) -> Life:
    start, losses, positions, first, last = 0, {}, {}, 0.0, 0.0
    for line in out.read_text().splitlines():
        told = json.loads(line)
        start = told.get("start", start)
        if "step" in told:
            first, last = first or told["at"], told["at"]
            losses[told["step"]], positions[told["step"]] = told["loss"], told["positions"]
    weights = out.with_name("weights.pt")
    state = torch.load(weights, weights_only=True) if weights.exists() else {}
    return Life(exit_codes, start, losses, positions, state, began, first, last, time.monotonic())


def _live(
    folder: Path,
    store_url: str,
    env: dict[str, str],
    out: Path,
    zero_stage: int,
    kill: Kill | None,
    rank: int,
    world_size: int,
    port: int,
) -> None:
    os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    torch.manual_seed(rank)
    random.seed(rank)
    mine = kill if kill is not None and kill.rank == rank else None
    store: Store = (DeadlyBucket if store_url.startswith("s3://") else DeadlyFolder)(store_url)
    Deadly.kill = mine
    if mine is not None and mine.phase == CONVERT:
        _die_amid_conversion()
    where: dict[str, Any] = {"identity": {"run": "toy"}, "scratch": folder / "scratch"}
    engine, point = resume.open_engine(
        lambda universal: _engine(zero_stage, universal, kill), store, zero_stage=zero_stage, **where
    )
    if mine is not None and mine.phase == STALL:
        _stop_amid_step(engine, mine.nth)
    start = point.step if point else 0
    _tell(out, rank, {"start": start})
    saver = resume.Saver(engine, store, **where)
    seen: list[int] = []

    def watched() -> Iterator[Any]:
        for micro_batches in batches(rank, world_size, 2, start):
            seen[:] = [int(p) for batch in micro_batches for p in batch.positions]
            yield micro_batches

    def log(metrics: Any, step: int) -> None:
        if "loss/total" not in metrics:
            return
        everybody = sorted(p for worker in engine.gather(seen) for p in worker)
        _tell(out, rank, {"step": step, "loss": metrics["loss/total"], "positions": everybody, "at": time.monotonic()})
        if mine is not None and mine.phase == "step" and step == mine.nth:
            die()

    def save(step: int) -> None:
        if mine is not None and mine.phase == "snapshot" and step == mine.nth:
            _die_amid_a_shard(engine)
        saver.save(step, {})

    stage = StageConfig(name="t", steps=STEPS, weights={"act": 1, "mmu": 0.1}, micro_batch=1, log_every=1,
                        eval_every=99, save_every=SAVE_EVERY)  # fmt: skip
    fit(engine, watched(), stage, start_step=start, validation=[], log=log, save=save)
    saver.wait()
    if mine == Kill("export", rank, 1):
        die()
    weights = engine.full_weights()
    if mine == Kill("export", rank, 2):
        die()
    if rank == 0:
        torch.save(weights, out.with_name("weights.pt"))
    engine.gather(None)
    os._exit(0)  # the group's own shut-down is not what is looked at


def _engine(zero_stage: int, universal: bool, kill: Kill | None) -> Engine:
    world_size = torch.distributed.get_world_size()
    limit = {"stall_timeout_s": STALL_TIMEOUT_S} if kill is not None and kill.phase == STALL else {}
    return build_engine(
        toy(dropout=0.2),
        EngineConfig(num_workers=world_size, zero_stage=zero_stage, **limit),  # type: ignore[arg-type]
        OptimizerConfig(lr=1e-2, warmup_steps=2),
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // world_size // 2,
        accumulation=2,
        universal=universal,
    )


def _stop_amid_step(engine: Engine, step: int) -> None:
    """Before the last backward pass of a step: the others will wait in the engine's own traffic, not in the loop's."""
    backward, calls = engine.backward, itertools.count(1)

    def stops(loss: torch.Tensor) -> None:
        if next(calls) == engine.accumulation * step:
            os.kill(os.getpid(), signal.SIGSTOP)
        backward(loss)

    engine.backward = stops  # type: ignore[method-assign]


def _die_amid_a_shard(engine: Engine) -> None:
    """At the next one, of which half lies on the disk then; a worker that has none to write dies among the others."""
    save, whole = engine.save, torch.save

    def half(value: Any, path: str | Path, *_: Any, **__: Any) -> None:
        written = io.BytesIO()
        whole(value, written)
        Path(path).write_bytes(written.getvalue()[: written.tell() // 2])
        die()

    def without_shards(folder: Path) -> None:
        save(folder)
        die()

    torch.save, engine.save = half, without_shards  # type: ignore[method-assign]


def _die_amid_conversion() -> None:
    """When half of what was converted lies there."""
    convert = resume.to_universal

    def half(folder: Path, converted: Path) -> None:
        convert(folder, converted)
        written = sorted(path for path in converted.rglob("*") if path.is_file())
        for path in written[len(written) // 2 :]:
            path.unlink()
        die()

    resume.to_universal = half


def _tell(out: Path, rank: int, value: dict[str, Any]) -> None:
    if rank == 0:
        with out.open("a") as file:
            file.write(json.dumps(value) + "\n")
