"""Resume points: every worker's shards of an engine on a Store, and one manifest, created last, that makes them a set.

    <store>/step-00000120-5f3a9c01.json      the manifest: creating it is the commit
    <store>/step-00000120-5f3a9c01/...       shards of all workers, and each worker's random states

A set without a manifest does not exist; "the latest" is computed from manifests, never pointed to. The random suffix
keeps two attempts at one step apart, so a trainer that died half-way leaves nothing that a later one could mistake for
its own. Shards are unpickled by DeepSpeed: they are only ever loaded after their sha256 has been checked against the
manifest, and only from this run's own prefix.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import random
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upvla.errors import Corrupt, Mismatch, NotFound, UpvlaError
from upvla.store import Store
from upvla.train.engine import Engine

log = logging.getLogger(__name__)

_STALE_S = 60.0  # a younger folder may be one that its owner has made and not locked yet


@dataclass(frozen=True)
class Shard:
    """One file of a set, relative to the set's prefix."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ResumePoint:
    """A complete set: `identity` is what must be equal to carry on from it, `meta` is the caller's own record."""

    name: str
    step: int
    world_size: int
    shards: tuple[Shard, ...]
    identity: Mapping[str, Any]
    meta: Mapping[str, Any]


def points(store: Store) -> list[ResumePoint]:
    """Committed sets, newest first. Manifests that cannot be read are skipped, and named in the log."""
    found = []
    for key in store.list("step-"):
        if "/" in key or not key.endswith(".json"):
            continue
        try:
            value = store.read_json(key)
            found.append(ResumePoint(**value | {"shards": tuple(Shard(**shard) for shard in value["shards"])}))
        except (Corrupt, NotFound, TypeError, KeyError) as error:
            log.warning("resume point %s/%s is skipped: its manifest is unreadable (%s)", store.url, key, error)
    return sorted(found, key=lambda point: (point.step, point.name), reverse=True)


def latest(store: Store) -> ResumePoint | None:
    """The newest committed set whose shards are all there in full size (their hashes are checked on loading)."""
    return next((point for point in points(store) if not _missing(store, point)), None)


def save(
    engine: Engine,
    store: Store,
    step: int,
    *,
    identity: Mapping[str, Any],
    meta: Mapping[str, Any],
    scratch: Path,
    keep: int = 2,
) -> None:
    """Save `engine` at `step`; collective. When it returns the set is committed, and older ones than `keep` are gone.

    If any worker cannot write, every worker raises the first such error and nothing becomes visible.
    """
    name = engine.gather(f"step-{step:08d}-{secrets.token_hex(4)}")[0]
    with _folder(scratch) as folder:
        engine.save(folder)
        (folder / f"random_{engine.rank:05d}.json").write_text(json.dumps(_random_states()))
        mine = _agree(engine, lambda: _upload(folder, store, name))
    shards = tuple(shard for worker in mine for shard in worker)
    _require_distinct(shards)
    point = ResumePoint(name, step, engine.world_size, shards, dict(identity), dict(meta))
    _agree(engine, functools.partial(_commit, store, point, keep) if engine.rank == 0 else _nothing)


def restore(engine: Engine, store: Store, *, identity: Mapping[str, Any], scratch: Path) -> ResumePoint | None:
    """Load the newest good set into `engine` and the random generators; None when there is none. Collective.

    A set that is incomplete or does not match its hashes is skipped by name. A set of another run (`identity`) or of
    another number of workers is a `Mismatch`, before anything is loaded.
    """
    for point in engine.gather(points(store) if engine.rank == 0 else None)[0]:
        _require_same(point, identity, engine.world_size, store.url)
        with _folder(scratch) as folder:
            leader = _leader_folder(engine, folder)
            try:
                _agree(engine, functools.partial(_download, store, point, folder) if leader == folder else _nothing)
            except Corrupt as error:
                log.warning("resume point %s is skipped: %s", point.name, error)
                continue
            engine.load(leader)
            _set_random_states(json.loads((leader / f"random_{engine.rank:05d}.json").read_text()))
            engine.gather(None)  # nobody removes the folder while a neighbour still reads it
            return point
    return None


# ------------------------------------------------------------------------------------------------------ files


def _upload(folder: Path, store: Store, name: str) -> list[Shard]:
    shards = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        store.upload(path, f"{name}/{relative}")
        shards.append(Shard(relative, path.stat().st_size, _sha256(path)))
    return shards


def _nothing() -> None:
    """What the workers do that leave a collective task to one of them."""


def _download(store: Store, point: ResumePoint, folder: Path) -> None:
    for shard in point.shards:
        path = folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        where = f"{store.url}/{point.name}/{shard.name}"
        try:
            store.download(f"{point.name}/{shard.name}", path)
        except NotFound as error:
            raise Corrupt(f"{where} is missing") from error
        if path.stat().st_size != shard.num_bytes:
            raise Corrupt(f"{where} has {path.stat().st_size} bytes, its manifest says {shard.num_bytes}")
        if _sha256(path) != shard.sha256:
            raise Corrupt(f"{where} does not match the sha256 in its manifest")


def _commit(store: Store, point: ResumePoint, keep: int) -> None:
    store.create_json(f"{point.name}.json", asdict(point))
    kept = {p.name for p in points(store)[:keep]} | {point.name}
    old = [key for key in store.list("step-") if (name := _set_of(key)) not in kept and name < point.name]
    for key in sorted(old, key=lambda key: "/" in key):  # manifests first: without one a set does not exist
        store.delete(key)


def _set_of(key: str) -> str:
    return key.partition("/")[0].removesuffix(".json")


def _missing(store: Store, point: ResumePoint) -> list[str]:
    there = set(store.list(f"{point.name}/"))
    return [shard.name for shard in point.shards if f"{point.name}/{shard.name}" not in there]


def _leader_folder(engine: Engine, folder: Path) -> Path:
    """The folder that the first worker on this machine downloads to, for all workers that share its disk."""
    disk = (socket.gethostname(), folder.parent.stat().st_dev, folder.parent.stat().st_ino)
    return next(path for other, path in engine.gather((disk, folder)) if other == disk)


@contextlib.contextmanager
def _folder(scratch: Path) -> Iterator[Path]:
    """A folder of our own below `scratch`, locked while we live; what killed workers left there is removed first."""
    scratch.mkdir(parents=True, exist_ok=True)
    for old in scratch.glob("resume-*"):
        with contextlib.suppress(OSError):  # BlockingIOError: its owner lives
            if time.time() - old.stat().st_mtime > _STALE_S:
                with _locked(old):
                    shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=scratch))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- agreement


def _agree(engine: Engine, work: Callable[[], Any]) -> list[Any]:
    """Run `work` on every worker; results in rank order. If it failed anywhere, all raise the first failure."""
    try:
        mine: tuple[Any, Exception | None] = (work(), None)
    except (UpvlaError, OSError) as error:
        mine = (None, error)
    answers = engine.gather(mine)
    for _, failure in answers:
        if failure is not None:
            raise failure
    return [value for value, _ in answers]


def _require_distinct(shards: tuple[Shard, ...]) -> None:
    names = [shard.name for shard in shards]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise Mismatch(f"two workers wrote {doubled[0]!r}: they disagree about their ranks")


def _require_same(point: ResumePoint, identity: Mapping[str, Any], world_size: int, url: str) -> None:
    for key in sorted({*identity, *point.identity}):
        if identity.get(key) != point.identity.get(key):
            raise Mismatch(
                f"resume point {url}/{point.name} belongs to another run: {key} is {point.identity.get(key)!r} there, "
                f"{identity.get(key)!r} here; give this run its own key"
            )
    if point.world_size != world_size:
        raise Mismatch(
            f"resume point {url}/{point.name} was written by {point.world_size} workers, this run has {world_size}; "
            f"set engine.num_workers={point.world_size}, or start a new run"
        )


# ----------------------------------------------------------------------------------------------- random states


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
