"""Resume points: every worker's shards of an engine on a Store, and one manifest, created last, that makes them a set.

    <store>/step-00000120-5f3a9c01.json      the manifest: creating it is the commit
    <store>/step-00000120-5f3a9c01/...       shards of all workers, and each worker's random states

A set without a manifest does not exist; "the latest" is computed from manifests, never pointed to. The random suffix
keeps two attempts at one step apart, so a trainer that died half-way leaves nothing that a later one could mistake for
its own. Shards are unpickled by DeepSpeed: they are only ever loaded after their sha256 has been checked against the
manifest, and only from this run's own prefix.

Training waits while the engine writes to the local disk, not while the files travel: `Saver` uploads and commits on a
thread. `open_engine` reads: the set is fetched and verified before an engine exists, because how an engine is built
depends on whether the set was written by as many workers as there are now.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from upvla.errors import Corrupt, Mismatch, NoSpace, NotFound, StoreError
from upvla.store import Store, content_hash
from upvla.train import group
from upvla.train.engine import Engine
from upvla.train.randomness import random_states, set_random_states
from upvla.train.scratch import locked_folder, shared_folder
from upvla.train.zero import to_universal

T = TypeVar("T")
log = logging.getLogger(__name__)

_LAYOUT = {0: "whole", 1: "slices", 2: "slices", 3: "partitions"}  # of ZeRO's states; sets convert within one
_UPLOAD_TIMEOUT_S = 3600.0  # how long a worker's thread waits for its neighbours' uploads


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
    zero_stage: int
    shards: tuple[Shard, ...]
    identity: Mapping[str, Any]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which sets stay: the newest `last`, those of every `every` steps, and what the caller asks to keep."""

    last: int = 2
    every: int | None = None


def points(store: Store) -> list[ResumePoint]:
    """Committed sets, newest first. Manifests that cannot be read are skipped, and named in the log."""
    found = []
    for key in store.list("step-"):
        if "/" in key or not key.endswith(".json"):
            continue
        try:
            value = store.read_json(key)
            if value.pop("sha256", "") not in ("", content_hash(value)):  # none in those of before
                raise Corrupt("it does not match the hash in it")
            found.append(ResumePoint(**value | {"shards": tuple(Shard(**shard) for shard in value["shards"])}))
        except (Corrupt, NotFound, TypeError, KeyError, AttributeError) as error:
            log.warning("resume point %s/%s is skipped: its manifest is unreadable (%s)", store.url, key, error)
    return sorted(found, key=lambda point: (point.step, point.name), reverse=True)


def latest(store: Store) -> ResumePoint | None:
    """The newest committed set whose shards are all there in full size (their hashes are checked on loading)."""
    return next((point for point in points(store) if not _missing(store, point)), None)


# ---------------------------------------------------------------------------------------------------- writing


class Saver:
    """Saves an engine while it trains on. At most one set is on its way: a save waits for the one before.

    Every method is collective. `owns` is asked on the first worker before a commit; it raises when this trainer has
    lost its right to the run. `stalled_s` is how long training has stood still for saves on this worker.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        identity: Mapping[str, Any],
        scratch: Path,
        retention: Retention = Retention(),
        owns: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._store, self._identity = engine, store, dict(identity)
        self._scratch, self._retention, self._owns = scratch, retention, owns
        self._side = group.side_group(_UPLOAD_TIMEOUT_S)
        self._unfinished: set[str] = _unfinished(store) if engine.rank == 0 else set()
        self._upload: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.stalled_s = 0.0

    def save(self, step: int, meta: Mapping[str, Any], *, keep: tuple[int, ...] = ()) -> None:
        """Snapshot the engine at `step` to the local disk and start its way to the store.

        `keep`: further steps whose sets must stay. Raises, on every worker, what the previous upload or this snapshot
        has failed with on any worker; then nothing of that set is visible.
        """
        began, now = time.perf_counter(), json.loads(json.dumps(dict(meta)))  # the caller's goes on changing
        self.wait()
        name = group.gather(f"step-{step:08d}-{secrets.token_hex(4)}")[0]
        opened = contextlib.ExitStack()
        self._unfinished.add(name)
        folder = group.agree(lambda: opened.enter_context(locked_folder(self._scratch)))[self._engine.rank]
        try:
            self._snapshot(folder)
        except BaseException:
            opened.close()
            raise
        point = ResumePoint(name, step, self._engine.world_size, self._engine.zero_stage, (), self._identity, now)
        work = functools.partial(self._send, folder, opened, point, keep)
        self._upload = threading.Thread(target=work, name="upvla-upload", daemon=True)
        self._upload.start()
        self.stalled_s += time.perf_counter() - began

    def wait(self) -> None:
        """Until the last set is committed, or raise what it failed with, on every worker."""
        if self._upload is not None:
            group.together(self._upload.join)
            self._upload = None
        failure, self._failure = self._failure, None
        group.agree(lambda: _raise(failure))

    def _snapshot(self, folder: Path) -> None:
        def write() -> None:
            (folder / f"random_{self._engine.rank:05d}.json").write_text(json.dumps(random_states()))

        machine = socket.gethostname()
        others = group.gather((machine, self._engine.shard_bytes))
        group.agree(lambda: require_space(folder, sum(num_bytes for name, num_bytes in others if name == machine)))
        with self._engine.patient():
            self._engine.save(folder)
        group.agree(write)

    def _send(self, folder: Path, opened: contextlib.ExitStack, point: ResumePoint, keep: tuple[int, ...]) -> None:
        """On a thread of every worker: upload, agree over the side group, and let the first worker commit."""
        try:
            with opened:
                sent = group.agree(lambda: _told(lambda: _upload(folder, self._store, point.name)), self._side)
            shards = tuple(shard for worker in sent for shard in worker)
            _require_distinct(shards)
            complete = ResumePoint(**{**_fields(point), "shards": shards})
            commit = functools.partial(self._commit, complete, keep) if self._engine.rank == 0 else _nothing
            group.agree(lambda: _told(commit), self._side)
        except BaseException as error:
            self._failure = error

    def _commit(self, point: ResumePoint, keep: tuple[int, ...]) -> None:
        self._owns()
        value = json.loads(json.dumps(asdict(point)))  # as it will be read
        self._store.create_json(f"{point.name}.json", value | {"sha256": content_hash(value)})
        newest = points(self._store)
        every = self._retention.every
        kept = {p.name for p in newest[: self._retention.last]} | {point.name}
        kept |= {p.name for p in newest if p.step in keep or (every and p.step % every == 0)}
        # a trainer that was taken over and does not know it leaves alone what its successor is about to finish
        gone = ({p.name for p in newest} | self._unfinished) - kept
        old = [key for key in self._store.list("step-") if _set_of(key) in gone]
        for key in sorted(old, key=lambda key: "/" in key):  # manifests first: without one a set does not exist
            self._store.delete(key)
        for upload in _cut_short(self._store):  # a large shard's, of one that was killed: it is not listed
            if _set_of(upload) in gone:
                self._store.abandon(upload)


def _told(work: Callable[[], T]) -> T:
    """On a thread: whatever it fails with is told to the others, who would wait for it long, for no process ends."""
    try:
        return work()
    except group.Failure:
        raise
    except Exception as error:
        raise StoreError(f"a resume point was not sent ({type(error).__name__}: {error}): it is saved anew") from error


def _upload(folder: Path, store: Store, name: str) -> list[Shard]:
    shards = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        store.upload(path, f"{name}/{relative}")
        shards.append(Shard(relative, path.stat().st_size, _sha256(path)))
    return shards


# ---------------------------------------------------------------------------------------------------- reading


def open_engine(
    build: Callable[[bool], Engine],
    store: Store,
    *,
    identity: Mapping[str, Any],
    scratch: Path,
    zero_stage: int,
    step: int | None = None,
) -> tuple[Engine, ResumePoint | None]:
    """An engine with the newest good set in it and the random generators as they were, and that set. Collective.

    `build(universal)` makes the engine. A set that is incomplete or does not match its hashes is skipped by name; one
    of another number of workers, or of ZeRO 1 under 2, is converted, and then the random states start anew. `step`
    asks for the set of that step. A set of another run (`identity`) is a `Mismatch`, before anything is loaded.
    Without a set the engine is as built, and None.
    """
    world_size, leader = torch.distributed.get_world_size(), torch.distributed.get_rank() == 0
    for point in group.agree(lambda: points(store) if leader else [])[0]:
        if step is not None and point.step != step:
            continue
        require_same(point, identity, zero_stage, store.url)
        same = (point.world_size, point.zero_stage) == (world_size, zero_stage)
        universal = not same and zero_stage > 0
        with shared_folder(scratch) as (folder, leads):
            work = functools.partial(_fetch, store, point, folder, universal)
            try:
                group.together(work if leads else _nothing)
            except Corrupt as error:
                log.warning("resume point %s is skipped: %s", point.name, error)
                continue
            engine = build(universal)
            engine.load(folder / _CONVERTED if universal else folder)
            if same:
                set_random_states(json.loads((folder / f"random_{engine.rank:05d}.json").read_text()))
            else:
                log.warning(
                    "resume point %s of %d workers goes on with %d: same batches, random states anew",
                    point.name,
                    point.world_size,
                    world_size,
                )
            group.gather(None)  # nobody removes the folder while a neighbour still reads it
            return engine, point
    if step is not None:
        raise NotFound(f"{store.url} has no good resume point of step {step}")
    return build(False), None


_CONVERTED = "universal"


def _fetch(store: Store, point: ResumePoint, folder: Path, universal: bool) -> None:
    copies = 3 if universal else 1  # converting takes it into pieces, and joins those
    require_space(folder, copies * sum(shard.num_bytes for shard in point.shards))
    _download(store, point, folder)
    if universal:
        to_universal(folder, folder / _CONVERTED)


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


def _nothing() -> None:
    """What the workers do that leave a collective task to one of them."""


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _fields(point: ResumePoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in point.__dataclass_fields__}


def _set_of(key: str) -> str:
    return key.partition("/")[0].removesuffix(".json")


def _unfinished(store: Store) -> set[str]:
    """Names of sets that have no readable manifest: those who wrote them are gone."""
    there = [*store.list("step-"), *_cut_short(store)]
    return {_set_of(key) for key in there} - {point.name for point in points(store)}


def _cut_short(store: Store) -> list[str]:
    """Uploads that have not ended. Where our keys may not list them, they are left to the bucket's own rules."""
    try:
        return list(store.unfinished())
    except StoreError as error:
        log.warning("unfinished uploads are not looked for (%s)", error)
        return []


def _missing(store: Store, point: ResumePoint) -> list[str]:
    there = set(store.list(f"{point.name}/"))
    return [shard.name for shard in point.shards if f"{point.name}/{shard.name}" not in there]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_distinct(shards: tuple[Shard, ...]) -> None:
    names = [shard.name for shard in shards]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise Mismatch(f"two workers wrote {doubled[0]!r}: they disagree about their ranks")


def require_same(point: ResumePoint, identity: Mapping[str, Any], zero_stage: int, url: str) -> None:
    """Raise `Mismatch` where a run of this identity cannot go on from `point`, of the store at `url`."""
    for key in sorted({*identity, *point.identity}):
        if identity.get(key) != point.identity.get(key):
            raise Mismatch(
                f"resume point {url}/{point.name} belongs to another run: {key} is {point.identity.get(key)!r} there, "
                f"{identity.get(key)!r} here; give this run its own key"
            )
    if _LAYOUT[point.zero_stage] != _LAYOUT[zero_stage]:
        raise Mismatch(
            f"resume point {url}/{point.name} was written under ZeRO {point.zero_stage}, this run has {zero_stage}; "
            f"set engine.zero_stage={point.zero_stage}, or start a new run"
        )


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise `NoSpace` unless `folder`, or the nearest parent that exists, has room for so much."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise NoSpace(
            f"no space left under {place}: a resume point takes {num_bytes / 2**20:.0f} MB there in transit, "
            f"{free / 2**20:.0f} MB are free; free some, or give Ray's workers a TMPDIR on a larger disk, and start it "
            "again"
        )
