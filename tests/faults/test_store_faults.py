"""Faults between us and the object store: nothing committed is lost, nothing is committed twice."""

from __future__ import annotations

import datetime
import errno
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import S3Server, free_ports
from tests.data.test_table import OPTIONS, make_episode, put, staged_of
from tests.factories import write_calvin
from tests.faults.proxy import FaultProxy
from upvla.data.commit import commit
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.loader import Loader
from upvla.data.mixture import Mixture, MixtureConfig
from upvla.data.samples import SampleReader
from upvla.data.table import Dataset
from upvla.data.upkeep import verify
from upvla.data.versions import list_versions, load_manifest
from upvla.errors import AlreadyExists, OutcomeUnknown, StoreError
from upvla.images import Resize
from upvla.store import S3Store, Store, open_store
from upvla.types import Sample

CONFIG = IngestConfig(format="calvin", dataset="d", recordings_per_task=2, qa_per_episode=4)
_ATTEMPTS = 3  # a task's first and its two retries, flows/steps.py
_PAUSE_S = 2.0  # the client's, jittered: up to 1, 2 and 4 s before a request's first, second and third retry


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    return write_calvin(tmp_path / "raw", (6, 7, 8, 5), static=(24, 24, 3), gripper=(16, 16, 3))


@pytest.mark.seam
@pytest.mark.parametrize("seed", [0, 1])
def test_an_ingest_through_a_failing_network_gives_the_same_dataset(
    s3_server: S3Server, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """In as many attempts as a flow has, mostly one, and in three times the time, besides the pauses before retries:
    this ingest is nearly all round trips, while a full shard is seconds of work to five of them."""
    expected = ingest(open_store(str(tmp_path / "calm")), CONFIG, str(recordings))["content_id"]
    url, took = s3_server.url(), list[float]()
    with FaultProxy(s3_server.endpoint_url, seed=seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for rate, where in ((0.0, s3_server.url()), (0.2, url)):
            proxy.rate, began = rate, time.monotonic()
            for attempt in range(_ATTEMPTS):
                try:
                    assert ingest(open_store(where), CONFIG, str(recordings))["content_id"] == expected
                    break
                except (StoreError, OutcomeUnknown):
                    assert rate and attempt + 1 < _ATTEMPTS
            took.append(time.monotonic() - began)
    calm_s, stormy_s = took
    faults = sum(count for name, count in proxy.seen.items() if name != "well")
    assert faults > 2
    assert stormy_s <= 3 * calm_s + _PAUSE_S * faults, f"{attempt + 1} attempts, {faults} faults"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    store = open_store(url)
    assert load_manifest(store, "d").content_id == expected
    assert list_versions(store, "d") == [1] and verify(store, load_manifest(store, "d")) == []


@pytest.mark.seam
def test_a_commit_whose_reply_was_lost_is_there_once(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3_server.url()
    store = open_store(url)
    put(store, [0])
    with FaultProxy(
        s3_server.endpoint_url, rate=1.0, faults=("reset after",), methods=("PUT",), only="_manifest/"
    ) as proxy:
        staged = [staged_of(store, [make_episode(n)]) for n in (1, 2)]
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for part in staged:
            commit(open_store(url), "d", [part], validation_fraction=0.2, options=OPTIONS)
        assert proxy.seen["reset after"] >= 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    assert [load_manifest(store, "d", version).num_episodes for version in list_versions(store, "d")] == [1, 2, 3]


@pytest.mark.seam
def test_a_store_that_ignores_conditions_is_found_out(
    s3_server: S3Server, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_server.url())
    with FaultProxy(s3_server.endpoint_url, strip=("if-none-match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StoreError, match=r"If-None-Match.*versions could be lost"):
            commit(store, "d", [], validation_fraction=0.2, options=OPTIONS)
        with pytest.raises(StoreError, match=r"If-None-Match.*versions could be lost"):
            ingest(store, CONFIG, str(recordings))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    assert store.list() == []  # found out before anything was staged
    assert ingest(store, CONFIG, str(recordings))["version"] == 1  # a refusal is not remembered


def test_a_store_that_is_away_is_no_store_without_conditions(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a source read before its recordings have a place to go."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with pytest.raises(StoreError, match="is the object store up") as caught:
        ingest(open_store("s3://b/p"), CONFIG, str(recordings / "nowhere"))
    assert "If-None-Match" not in str(caught.value)


def _commit_some(url: str, writer: int, commits: int, overtaken: SimpleQueue[int]) -> None:
    store, create, lost = open_store(url), S3Store.create, 0

    def counted(self: S3Store, key: str, data: bytes) -> str:
        nonlocal lost
        try:
            return create(self, key, data)
        except AlreadyExists:
            lost += key.startswith("_manifest/")
            raise

    S3Store.create = counted  # type: ignore[method-assign]
    for i in range(commits):
        staged = staged_of(store, [make_episode(100 * writer + i)])
        commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS)
    overtaken.put(lost)


@pytest.mark.seam
@pytest.mark.parametrize(("writers", "commits"), [(3, 4), pytest.param(8, 25, marks=pytest.mark.slow)])
def test_racing_processes_lose_nothing(
    s3_server: S3Server, capsys: pytest.CaptureFixture[str], writers: int, commits: int
) -> None:
    url, context = s3_server.url(), multiprocessing.get_context("spawn")
    overtaken = context.SimpleQueue()
    args = [(url, writer, commits, overtaken) for writer in range(writers)]
    processes = [context.Process(target=_commit_some, args=each) for each in args]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store, total = open_store(url), writers * commits
    assert [process.exitcode for process in processes] == [0] * writers
    lost = sum(overtaken.get() for _ in processes)
    with capsys.disabled():
        share = lost / (total + lost)
        print(f"\n{writers} writers: {lost} of {total + lost} creates of a manifest came second ({share:.0%})")
    manifests = [load_manifest(store, "d", version) for version in list_versions(store, "d")]
    assert [manifest.num_episodes for manifest in manifests] == list(range(1, total + 1))
    assert [manifest.parent for manifest in manifests] == [None, *range(1, total)]
    assert len({row.source_key for row in Dataset(store, manifests[-1]).episodes}) == total


def test_a_full_disk_is_said_and_space_lets_it_go_on(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ingest(open_store(str(tmp_path / "calm")), CONFIG, str(recordings))
    store = open_store(str(tmp_path / "full"))
    room = [3]
    real = os.fsync

    def fsync(handle: int) -> None:  # where a full disk is noticed at the latest
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match=r"full.*No space left on device; check disk"):
        ingest(store, CONFIG, str(recordings))
    assert list_versions(store, "d") == [] and not list((tmp_path / "full").rglob(".tmp-*"))
    room[0] = 10**6
    assert ingest(store, CONFIG, str(recordings))["content_id"] == expected["content_id"]
    assert np.isfinite(Dataset(store, load_manifest(store, "d")).stats.features["action"].mean).all()


def _pixels(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    return [(sample.position, sum(int(frame.sum()) for frame in sample.images.values())) for sample in samples]


def _batches(store: Store, steps: int) -> list[list[list[tuple[int, int]]]]:
    settings = {"sources": [{"dataset": "d", "kind": "robot", "weight": 1}], "global_batch": 8}
    plan = MixtureConfig.model_validate(settings).plan(store)
    mixture = Mixture(plan, {"d": Dataset(store, load_manifest(store, "d"), pool_mb=0)})  # nothing is kept
    reader = SampleReader(mixture, chunk=3, cameras=["static"], resize=Resize(size=16))
    with Loader(mixture, reader, _pixels, rank=0, world_size=1, micro_batch=4) as loader:
        return [next(loader) for _ in range(steps)]


@pytest.mark.seam
def test_training_reads_the_same_through_a_failing_network(
    s3_server: S3Server, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_server.url())
    ingest(store, CONFIG, str(recordings))
    expected = _batches(store, 6)
    with FaultProxy(s3_server.endpoint_url, rate=0.2, methods=("GET", "HEAD"), seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert _batches(open_store(store.url), 6) == expected
    assert sum(count for name, count in proxy.seen.items() if name != "well") > 5


@pytest.mark.seam
@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_wrong_is_said(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """S3 signs requests with this machine's time and tolerates a quarter of an hour."""
    import botocore.auth

    real = botocore.auth.get_current_datetime
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: real(*a, **k) + datetime.timedelta(hours=hours)
    )
    with pytest.raises(StoreError, match="this machine's clock is off"):
        open_store(s3_server.url()).read("k")


def _ingest_with_little_room(url: str, source: str, said: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))  # no file may grow beyond
    try:
        ingest(open_store(url), CONFIG, source)
    except StoreError as error:
        said.send(str(error))


def test_too_little_scratch_space_names_the_place_and_the_need(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ingest(open_store(str(tmp_path / "calm")), CONFIG, str(recordings))
    url, context = str(tmp_path / "tight"), multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_ingest_with_little_room, args=(url, str(recordings), theirs))
    child.start()
    theirs.close()
    said = ours.recv()
    child.join()
    assert tempfile.gettempdir() in said and "File too large" in said and "128 MB" in said and "TMPDIR" in said
    assert list_versions(open_store(url), "d") == []
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(StoreError, match=r"gone.*point TMPDIR elsewhere"):
            ingest(open_store(url), CONFIG, str(recordings))
    assert ingest(open_store(url), CONFIG, str(recordings))["content_id"] == expected["content_id"]
