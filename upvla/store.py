"""Bytes at a URL: a local folder, an S3 prefix, or (to read from) any fsspec URL.

One operation carries the weight of everything above it: `create` puts an object only if nothing has that name, and of
any number of concurrent creators exactly one wins. Stores travel between processes as their URL; clients are made
lazily, once a process, from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`).
Keys are relative posix paths, and a listing's prefix is a plain string prefix, as in S3.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upvla.errors import AlreadyExists, ConfigError, Corrupt, NotFound, OutcomeUnknown, StoreError, UpvlaError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile

_TEMPORARY = ".tmp-"  # local files being written; never listed
_CREATE_ATTEMPTS = 4
_READ_ATTEMPTS = 4
_ARROW_ATTEMPTS = 6  # a row group that does not come stops a training run


def content_hash(value: Any) -> str:
    """First 16 hex digits of the sha256 of `value` as canonical JSON: the identity of everything that has one."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_store(url: str) -> Store:
    """A local path, `file://`, `s3://bucket/prefix`, or another fsspec URL (which cannot `create`)."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(url)
    if scheme == "file":
        return LocalStore(rest)
    return S3Store(url) if scheme == "s3" else FsspecStore(url)


def supports_conditional_create(store: Store) -> bool:
    """Try it: whether a second `create` of one key is refused and the first one's bytes survive."""
    key = f".probe-{uuid.uuid4().hex}"
    try:
        store.create(key, b"first")
        with contextlib.suppress(AlreadyExists):
            store.create(key, b"second")
        return store.read(key) == b"first"
    except StoreError:
        return False
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)


class Store(ABC):
    """Objects under `url`. Raises `NotFound`, `AlreadyExists`, `StoreError`, `OutcomeUnknown` and nothing else."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.url,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def read(self, key: str) -> bytes: ...

    @abstractmethod
    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        """Sorted keys that start with `prefix` and are greater than `after`, each with a string that changes when its
        object does."""

    def modified(self, prefix: str = "") -> dict[str, float]:
        """Keys with the time of their last write, in seconds of the store's own clock."""
        raise self._read_only(prefix)

    def list(self, prefix: str = "") -> list[str]:
        return list(self.tokens(prefix))

    def exists(self, key: str) -> bool:
        return key in self.tokens(_checked(key))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Bytes `[start, end)` of one object, in the order asked. A range past the end is `Corrupt`."""
        data = self.read(key)
        return _require_whole([data[start:end] for start, end in ranges], ranges, self._url_of(key))

    def download(self, key: str, path: str | Path) -> None:
        Path(path).write_bytes(self.read(key))

    def local_copy(self, key: str, folder: str | Path) -> Path:
        """A file with the object's bytes, for libraries that read files only: downloaded into `folder` unless it lies
        on this machine already."""
        path = Path(folder, hashlib.sha256(key.encode()).hexdigest()[:16])
        self.download(key, path)
        return path

    def size(self, key: str) -> int:
        """Bytes of one object."""
        return len(self.read(key))

    def parquet(self, key: str, metadata: FileMetaData | None = None) -> ParquetFile:
        """An open Parquet object for row-group reads; a cached footer as `metadata` saves reading it again."""
        from pyarrow import BufferReader
        from pyarrow.parquet import ParquetFile

        return ParquetFile(BufferReader(self.read(key)), metadata=metadata)

    def write(self, key: str, data: bytes) -> None:
        """Put, replacing; readers see the old or the new object, never a part of one."""
        raise self._read_only(key)

    def create(self, key: str, data: bytes) -> str:
        """Put if absent, else `AlreadyExists`. `OutcomeUnknown` when replies were lost and reading back cannot tell.
        Returns the object's token where the reply says it, else "".

        After a lost reply an object with equal bytes counts as ours: where that matters, put a unique id into `data`.
        """
        raise self._read_only(key)

    def upload(self, path: str | Path, key: str) -> None:
        raise self._read_only(key)

    def adopt(self, path: str | Path, key: str) -> None:
        """`upload` of a file that nobody needs afterwards: on one file system it is moved, not copied."""
        self.upload(path, key)

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""
        raise self._read_only(key)

    def sub(self, prefix: str) -> Store:
        """The store under `prefix`."""
        return type(self)(f"{self.url}/{_checked(prefix)}")

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise Corrupt(f"{self._url_of(key)} is not JSON ({error}); use the previous good version") from error

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, _json_bytes(value))

    def create_json(self, key: str, value: Any) -> str:
        return self.create(key, _json_bytes(value))

    def _url_of(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _read_only(self, key: str) -> StoreError:
        return StoreError(
            f"{self._url_of(key)} cannot be written: keep datasets and checkpoints in a folder or on s3://"
        )


class LocalStore(Store):
    """A folder. `create` is a hard link to a finished temporary file: it never overwrites, nor shows half a file."""

    def __init__(self, url: str):
        super().__init__(str(Path(url).expanduser().absolute()))

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        with self._translated(key), self._path(key).open("rb") as file:
            parts = [os.pread(file.fileno(), end - start, start) for start, end in ranges]
        return _require_whole(parts, ranges, self._url_of(key))

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> str:
        with self._translated(key), self._temporary(key) as temporary:
            _write_synced(temporary, data)
            os.link(temporary, self._path(key))
            return _file_token(temporary)

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        root, found = Path(self.url), {}
        top = root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(root).as_posix()
                if key.startswith(prefix) and key > after and not name.startswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # deleted while we walk
                        found[key] = _file_token(path)
        return dict(sorted(found.items()))

    def modified(self, prefix: str = "") -> dict[str, float]:
        return {key: int(token.rpartition("-")[2]) / 1e9 for key, token in self.tokens(prefix).items()}

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def upload(self, path: str | Path, key: str) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            shutil.copyfile(path, temporary)
            _write_synced(temporary, b"")
            temporary.replace(self._path(key))

    def adopt(self, path: str | Path, key: str) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            shutil.move(path, temporary)
            _write_synced(temporary, b"")
            temporary.replace(self._path(key))

    def download(self, key: str, path: str | Path) -> None:
        with self._translated(key):
            shutil.copyfile(self._path(key), path)

    def local_copy(self, key: str, folder: str | Path) -> Path:
        if not self.exists(key):
            raise NotFound(f"{self._url_of(key)} does not exist")
        return self._path(key)

    def size(self, key: str) -> int:
        with self._translated(key):
            return self._path(key).stat().st_size

    def parquet(self, key: str, metadata: FileMetaData | None = None) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        with self._translated(key):
            return ParquetFile(self._path(key), metadata=metadata, pre_buffer=True, page_checksum_verification=True)

    def _path(self, key: str) -> Path:
        return Path(self.url, _checked(key))

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        folder = self._path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            yield temporary
            _sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from error
        except FileExistsError as error:
            raise AlreadyExists(f"{self._url_of(key)} is already there") from error
        except OSError as error:
            raise StoreError(f"{self._url_of(key)}: {error.strerror or error}; check disk and rights") from error


class S3Store(Store):
    """A prefix of a bucket. `create` is a PUT with `If-None-Match: *` and its own, outcome-aware retries."""

    def __init__(self, url: str):
        super().__init__(url)
        self.bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self.prefix = prefix + "/" if prefix else ""
        if not self.bucket:
            raise ConfigError(f"{url!r} names no bucket; write s3://bucket/prefix")

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._body(self._client(), **self._at(key))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        def get(span: tuple[int, int]) -> bytes:
            return self._body(client, **self._at(key), Range=f"bytes={span[0]}-{span[1] - 1}")

        client = self._client()
        with self._translated(key), ThreadPoolExecutor(min(8, len(ranges)) or 1) as pool:
            return _require_whole(list(pool.map(get, ranges)), ranges, self._url_of(key))

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key):
            self._client().put_object(**self._at(key), Body=data)

    def create(self, key: str, data: bytes) -> str:
        from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError

        client, in_doubt, last = self._client(attempts=1), False, ""
        for attempt in range(_CREATE_ATTEMPTS):
            time.sleep(_jittered(0.2 * attempt))
            try:
                reply = client.put_object(**self._at(key), Body=data, IfNoneMatch="*")
                return _object_token(len(data), reply["ETag"])
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:  # without a put of ours in doubt this is somebody else's object, whatever is in it
                    if in_doubt and self.read(key) == data:
                        return ""
                    raise AlreadyExists(f"{self._url_of(key)} is already there") from error
                if status < 500 and status != 409:
                    raise self._translate(error, key) from error
                in_doubt, last = True, str(error)
            except EndpointConnectionError as error:  # never sent, so in doubt only if an earlier one was
                last = str(error)
            except HTTPClientError as error:  # timeout, reset: the server may have it, now or soon
                in_doubt, last = True, str(error)
        if not in_doubt:
            raise StoreError(f"{self._url_of(key)}: {last}; is the object store up? (`upvla status`)")
        with contextlib.suppress(StoreError, NotFound):
            if self.read(key) == data:
                return ""
            raise AlreadyExists(f"{self._url_of(key)} is already there")
        raise OutcomeUnknown(f"creating {self._url_of(key)}: no reply ({last}); read it back before trying again")

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        listed = self._listed(prefix, after).items()
        return {key: _object_token(item["Size"], item["ETag"]) for key, item in listed}

    def modified(self, prefix: str = "") -> dict[str, float]:
        return {key: item["LastModified"].timestamp() for key, item in self._listed(prefix).items()}

    def _listed(self, prefix: str, after: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        client, begin = self._client(), {"StartAfter": self.prefix + after} if after else {}
        with self._translated(prefix):
            while True:
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **begin)
                for item in page.get("Contents", ()):
                    found[item["Key"].removeprefix(self.prefix)] = item
                if not page.get("IsTruncated"):
                    break
                begin = {"ContinuationToken": page["NextContinuationToken"]}
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._client().delete_object(**self._at(key))

    def exists(self, key: str) -> bool:
        try:
            with self._translated(key):
                self._client().head_object(**self._at(key))
            return True
        except NotFound:
            return False

    def upload(self, path: str | Path, key: str) -> None:
        with self._translated(key):
            self._client().upload_file(str(path), self.bucket, self.prefix + _checked(key))

    def size(self, key: str) -> int:
        with self._translated(key):
            return int(self._client().head_object(**self._at(key))["ContentLength"])

    def download(self, key: str, path: str | Path) -> None:
        with self._translated(key):
            self._client().download_file(self.bucket, self.prefix + _checked(key), str(path))

    def parquet(self, key: str, metadata: FileMetaData | None = None) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        with self._translated(key):
            handle = _arrow_s3(os.getpid(), *_s3_environment()).open_input_file(f"{self.bucket}/{self.prefix}{key}")
            return ParquetFile(handle, metadata=metadata, pre_buffer=True, page_checksum_verification=True)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + _checked(key)}

    def _body(self, client: Any, **request: str) -> bytes:
        """One object's bytes. A reply that breaks off is asked for again: the client's own retries end where it
        begins."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(1, _READ_ATTEMPTS):
            body = client.get_object(**request)["Body"]
            with contextlib.suppress(IncompleteReadError, HTTPClientError):
                return bytes(body.read())
            time.sleep(_jittered(0.1 * attempt))
        return bytes(client.get_object(**request)["Body"].read())

    def _client(self, attempts: int = 4) -> Any:
        return _s3_client(os.getpid(), attempts, *_s3_environment())

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, OSError) as error:
            raise self._translate(error, key) from error

    def _translate(self, error: Exception, key: str) -> UpvlaError:
        answer = getattr(error, "response", {})
        code, url = str(answer.get("Error", {}).get("Code", "")), self._url_of(key)
        if code == "NoSuchBucket":
            return StoreError(f"{url}: there is no bucket {self.bucket!r}; create it or correct the URL")
        if code in ("404", "NoSuchKey") or isinstance(error, FileNotFoundError):
            return NotFound(f"{url} does not exist")
        if code in ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return StoreError(f"{url}: access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({error})")
        if code == "RequestTimeTooSkewed":
            return StoreError(f"{url}: this machine's clock is off by more than the store tolerates; set it ({error})")
        if code in ("416", "InvalidRange"):
            return Corrupt(f"{url} ends before the range that was asked for")
        if "InternalError" in str(error):
            return StoreError(f"{url}: the object store itself failed; see its log, and whether its disk is full")
        return StoreError(f"{url}: {error}; is the object store up, and AWS_ENDPOINT_URL right?")


class FsspecStore(Store):
    """Any other fsspec URL, to read from: without a conditional create no dataset or checkpoint lives here."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        super().__init__(url)
        self._files, root = url_to_fs(self.url)
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        try:
            return bytes(self._files.cat_file(f"{self._root}/{_checked(key)}"))
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from error
        except OSError as error:
            raise StoreError(f"{self._url_of(key)}: {error}") from error

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        path = f"{self._root}/{_checked(key)}"
        try:
            parts = [bytes(self._files.cat_file(path, start, end)) for start, end in ranges]
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from error
        except OSError as error:
            raise StoreError(f"{self._url_of(key)}: {error}") from error
        return _require_whole(parts, ranges, self._url_of(key))

    def size(self, key: str) -> int:
        try:
            return int(self._files.size(f"{self._root}/{_checked(key)}"))
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from error

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        folder = prefix.rpartition("/")[0]
        found = self._files.find(f"{self._root}/{folder}".rstrip("/"), detail=True)
        keys = {path[len(self._root) :].lstrip("/"): info for path, info in sorted(found.items())}
        names = ("size", "ETag", "mtime", "created", "LastModified")
        return {
            key: "-".join(str(info[name]) for name in names if name in info)
            for key, info in keys.items()
            if key.startswith(prefix) and key > after
        }


def _checked(key: str) -> str:
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise ConfigError(f"{key!r} is no key: keys are relative, without '..'")
    return key


def _file_token(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _object_token(size: int, etag: str) -> str:
    return f"{size}-{etag.strip(chr(34))}"


def _jittered(seconds: float) -> float:
    """Up to half as long again, so that clients that failed together do not come back together."""
    return seconds * (1 + uuid.uuid4().int % 1000 / 2000)  # no global random generator


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()


def _require_whole(parts: list[bytes], ranges: Sequence[tuple[int, int]], url: str) -> list[bytes]:
    for part, (start, end) in zip(parts, ranges, strict=True):
        if len(part) != end - start:
            raise Corrupt(f"{url} ends before byte {end} (range {start}:{end} gave {len(part)} bytes)")
    return parts


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _s3_environment() -> tuple[str | None, str, str | None, str | None]:
    """Endpoint, region, access key, secret; absent keys leave the choice to the client's own chain."""
    get = os.environ.get
    region = get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1"
    return get("AWS_ENDPOINT_URL") or None, region, get("AWS_ACCESS_KEY_ID"), get("AWS_SECRET_ACCESS_KEY")


@functools.lru_cache(maxsize=8)
def _s3_client(
    pid: int, attempts: int, endpoint: str | None, region: str, access_key: str | None, secret: str | None
) -> Any:
    """One client a process: `pid` keeps a forked child from sharing its parent's sockets."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=32,
        connect_timeout=5,
        read_timeout=60,
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    session = boto3.session.Session(access_key, secret, os.environ.get("AWS_SESSION_TOKEN"), region)
    return session.client("s3", endpoint_url=endpoint, config=config)


@functools.lru_cache(maxsize=8)
def _arrow_s3(pid: int, endpoint: str | None, region: str, access_key: str | None, secret: str | None) -> Any:
    """pyarrow's S3 reads row groups as fast as any client; it has no conditional write, so it only reads."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    scheme, _, host = (endpoint or "").rpartition("://")
    return S3FileSystem(
        access_key=access_key,
        secret_key=secret,
        session_token=os.environ.get("AWS_SESSION_TOKEN") if access_key else None,
        region=region,
        endpoint_override=host or None,
        scheme=scheme or "https",
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ARROW_ATTEMPTS),
    )
