from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.conftest import S3Server
from upvla.errors import AlreadyExists, ConfigError, Corrupt, NotFound, OutcomeUnknown, StoreError
from upvla.store import Store, content_hash, open_store, s3, supports_conditional_create


def test_objects_come_back_as_they_were_put(store: Store, tmp_path: Path) -> None:
    store.write("a/one", b"first")
    store.write("a/one", b"0123456789")
    store.write("ab", b"")
    assert store.read("a/one") == b"0123456789"
    assert store.read_ranges("a/one", [(7, 10), (0, 2)]) == [b"789", b"01"]
    assert (store.list(), store.list("a/"), store.list("none")) == (["a/one", "ab"], ["a/one"], [])
    assert store.sub("a").list() == ["one"]
    assert store.exists("ab") and not store.exists("a")
    (tmp_path / "file").write_bytes(b"x" * 100)
    store.upload(tmp_path / "file", "up/file")
    store.download("up/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes() == b"x" * 100
    store.adopt(tmp_path / "back", "up/moved")
    assert store.read("up/moved") == b"x" * 100
    store.delete("ab")
    store.delete("ab")
    assert not store.exists("ab")
    store.write_json("j", {"b": 1, "a": [1.5, None]})
    assert store.read_json("j") == {"a": [1.5, None], "b": 1}


def test_tokens_change_with_the_object(store: Store) -> None:
    store.write("k", b"one")
    before = store.tokens("k")
    store.write("k", b"three")
    assert before.keys() == store.tokens().keys() and before != store.tokens()


def test_what_is_absent_or_short_is_said(store: Store) -> None:
    for read in (store.read, store.read_json, store.parquet, lambda key: store.read_ranges(key, [(0, 1)])):
        with pytest.raises(NotFound, match="gone"):
            read("gone")
    store.write("short", b"ab")
    with pytest.raises(Corrupt, match="short"):
        store.read_ranges("short", [(0, 5)])
    with pytest.raises(Corrupt, match="not JSON"):
        store.read_json("short")
    for key in ("", "/abs", "a/../../b"):
        with pytest.raises(ConfigError):
            store.write(key, b"")


def test_parquet_row_groups_are_read_alone(store: Store, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": list(range(10))}), tmp_path / "t.parquet", row_group_size=4)
    store.upload(tmp_path / "t.parquet", "t.parquet")
    footer = store.parquet("t.parquet").metadata
    assert store.parquet("t.parquet", footer).read_row_group(1)["x"].to_pylist() == [4, 5, 6, 7]


def test_create_refuses_a_second_time_and_keeps_the_first(store: Store) -> None:
    store.create("k", b"first")
    with pytest.raises(AlreadyExists):
        store.create("k", b"first")  # equal bytes too: only a lost reply makes an object that is there ours
    with pytest.raises(AlreadyExists):
        store.create_json("k", "second")
    assert store.read("k") == b"first"
    assert supports_conditional_create(store)
    assert store.list() == ["k"]


def test_of_many_creators_one_wins(store: Store) -> None:
    def attempt(worker: int) -> int | None:
        barrier.wait()
        try:
            store.create(f"race-{i}", str(worker).encode())
            return worker
        except AlreadyExists:
            return None

    for i in range(3):
        barrier = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            winners = [worker for worker in pool.map(attempt, range(8)) if worker is not None]
        assert len(winners) == 1 and store.read(f"race-{i}") == str(winners[0]).encode()


def _read_in_child(store: Store) -> bytes:
    return store.read("k")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_stores_travel_to_other_processes(store: Store, method: str) -> None:
    store.write("k", b"data")
    assert pickle.loads(pickle.dumps(store)).read("k") == b"data"
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read_in_child, (store,)) == b"data"


def test_half_written_files_are_invisible(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / ".tmp-dead").write_bytes(b"left by a killed process")
    assert store.list() == []


def test_other_urls_can_be_read_but_hold_no_dataset() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/readable/a/x", b"data")
    store = open_store("memory://readable")
    assert (store.read("a/x"), store.list("a/"), store.exists("a/y")) == (b"data", ["a/x"], False)
    with pytest.raises(NotFound):
        store.read("a/y")
    with pytest.raises(StoreError, match=r"cannot be written: keep datasets"):
        supports_conditional_create(store)


@pytest.mark.parametrize(
    ("said", "repaired"),
    [
        ({"ETag": "a", "LastModified": 1}, {"ETag": "b"}),
        ({"etag": "a", "last_modified": 1}, {"etag": "b"}),
        ({"last_modified": 1}, {"last_modified": 2}),
        ({"updated": "mon", "md5Hash": "x", "generation": "1"}, {"generation": "2"}),
        ({"md5Hash": "x"}, {"md5Hash": "y"}),
        ({"content_md5": "x"}, {"content_md5": "y"}),
    ],
)
def test_a_repaired_object_of_equal_size_is_another_by_any_clouds_names(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, object], repaired: dict[str, object]
) -> None:
    store, told = open_store("memory://clouds"), said
    monkeypatch.setattr(MemoryFileSystem, "find", lambda self, path, **how: {"/clouds/x": {"size": 5, **told}})
    before = store.tokens()
    assert store.tokens() == before
    told = said | repaired
    assert store.tokens().keys() == before.keys() and store.tokens() != before
    told = {"size": 5, "ETag": "a", "LastModified": "t", "StorageClass": "cold"}
    assert store.tokens() == {"x": "5-a-t"}  # as it was written down before


def test_content_hash_ignores_key_order_only() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert len({content_hash(value) for value in ({"a": 1}, {"a": 2}, {"a": [1]}, {}, [], None)}) == 6


@pytest.mark.seam
def test_wrong_s3_key_and_missing_bucket_say_what_to_do(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no bucket 'nowhere'"):
        open_store("s3://nowhere/x").read("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for action in (lambda s: s.read("k"), lambda s: s.create("k", b""), lambda s: s.list(), lambda s: s.exists("k")):
        with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY"):
            action(open_store(s3_server.url()))


@pytest.mark.seam
def test_what_is_too_large_for_one_put_comes_in_parts(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_SINGLE_PUT", 2**20)
    store, data = open_store(s3_server.url()), os.urandom(9 * 2**20)
    store.write("weights", data)
    assert store.read("weights") == data
    assert store.tokens()["weights"].endswith("-2"), "S3 marks what came in parts with their number"
    assert not store.unfinished()


def test_unreachable_server_is_a_failure_not_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        _point_at(monkeypatch, taken.getsockname()[1])
        with pytest.raises(StoreError, match="is the object store up"):
            open_store("s3://b/p").create("k", b"data")


def test_lost_replies_are_settled_by_reading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the PUT and hangs up before it answers."""
    with _hanging_up(lambda stored, body: stored or body) as port:
        _point_at(monkeypatch, port)
        open_store("s3://b/p").create("k", b"ours")
    with _hanging_up(lambda stored, body: b"theirs") as port:
        _point_at(monkeypatch, port)
        with pytest.raises(AlreadyExists):
            open_store("s3://b/p").create("k", b"ours")
    with _hanging_up(lambda stored, body: None) as port:
        _point_at(monkeypatch, port)
        with pytest.raises(OutcomeUnknown, match="read it back"):
            open_store("s3://b/p").create("k", b"ours")
    with _hanging_up(lambda stored, body: stored or body, readable=False) as port:  # its 412 may be about our own put
        _point_at(monkeypatch, port)
        with pytest.raises(OutcomeUnknown, match="read it back"):
            open_store("s3://b/p").create("k", b"ours")


def test_a_folder_that_is_not_synced_leaves_a_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, broken = os.fsync, list[bool]()  # is it a folder?

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) in broken:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    store = open_store(str(tmp_path))
    monkeypatch.setattr(os, "fsync", fsync)
    broken[:] = [True]
    with pytest.raises(OutcomeUnknown, match=r"creating .*/k: Input/output error.*read it back"):
        store.create("k", b"ours")
    assert store.read("k") == b"ours"
    broken[:] = [False]  # files, so that nothing is there yet
    with pytest.raises(StoreError, match="Input/output error"):
        store.create("other", b"ours")
    assert store.list() == ["k"]


def _point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


class _hanging_up:
    """`keep(stored, body)` says what the object is after a PUT whose reply is lost; later PUTs get their 412, and reads
    that are not allowed a 403."""

    def __init__(self, keep: Callable[[bytes | None, bytes], bytes | None], *, readable: bool = True):
        outer = self
        self.stored: bytes | None = None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if outer.stored is not None:
                    self.send_error(412)
                    return
                outer.stored = keep(outer.stored, body)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def do_GET(self) -> None:
                if outer.stored is None or not readable:
                    self.send_error(404 if readable else 403)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.stored)))
                self.end_headers()
                self.wfile.write(outer.stored)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return int(self.server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
