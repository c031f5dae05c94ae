"""Faults between us and the object store (T9-T13): nothing committed is lost, nothing is committed twice."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import S3Server
from tests.data.test_table import OPTIONS, make_episode, put, staged_of
from tests.factories import write_calvin
from tests.faults.proxy import FaultProxy
from upvla.data.commit import _require_conditional_create, commit
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset
from upvla.data.upkeep import verify
from upvla.data.versions import list_versions, load_manifest
from upvla.errors import StoreError
from upvla.store import open_store

CONFIG = IngestConfig(format="calvin", dataset="d", recordings_per_task=2, qa_per_episode=4)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    return write_calvin(tmp_path / "raw", (6, 7, 8, 5), static=(24, 24, 3), gripper=(16, 16, 3))


@pytest.mark.seam
@pytest.mark.parametrize("seed", [0, 1])
def test_an_ingest_through_a_failing_network_gives_the_same_dataset(
    s3_server: S3Server, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    expected = ingest(open_store(str(tmp_path / "calm")), CONFIG, str(recordings))
    url = s3_server.url()
    with FaultProxy(s3_server.endpoint_url, rate=0.2, seed=seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for _ in range(6):  # an ingest that gave up is run again, as an orchestrator would
            try:
                found = ingest(open_store(url), CONFIG, str(recordings))
                break
            except StoreError:
                continue
    assert sum(count for name, count in proxy.seen.items() if name != "well") > 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    store = open_store(url)
    assert found["content_id"] == expected["content_id"] == load_manifest(store, "d").content_id
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
def test_a_store_that_ignores_conditions_is_found_out(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3_server.endpoint_url, strip=("if-none-match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _require_conditional_create.cache_clear()
        with pytest.raises(StoreError, match=r"If-None-Match.*versions could be lost"):
            put(open_store(s3_server.url()), [0])


def _commit_some(url: str, writer: int, commits: int) -> None:
    store = open_store(url)
    for i in range(commits):
        staged = staged_of(store, [make_episode(100 * writer + i)])
        commit(store, "d", [staged], validation_fraction=0.2, options=OPTIONS)


@pytest.mark.seam
@pytest.mark.parametrize(("writers", "commits"), [(3, 4), pytest.param(8, 25, marks=pytest.mark.slow)])
def test_racing_processes_lose_nothing(s3_server: S3Server, writers: int, commits: int) -> None:
    url, context = s3_server.url(), multiprocessing.get_context("spawn")
    processes = [context.Process(target=_commit_some, args=(url, writer, commits)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store, total = open_store(url), writers * commits
    assert [process.exitcode for process in processes] == [0] * writers
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
