"""A prefix of a bucket as a store: boto3 for objects, pyarrow for row groups."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upvla.errors import AlreadyExists, ConfigError, Corrupt, NotFound, OutcomeUnknown, StoreError, UpvlaError
from upvla.store.base import Store, checked, require_whole

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile

_UPLOAD = "?uploadId="  # between the key and the upload, in the name of an unfinished write
_CREATE_ATTEMPTS = 4
_READ_ATTEMPTS = 4
_SINGLE_PUT = 64 * 2**20  # more goes in parts: S3 takes at most 5 GB in one
_ARROW_ATTEMPTS = 6  # a row group that does not come stops a training run


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
            return require_whole(list(pool.map(get, ranges)), ranges, self._url_of(key))

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key):
            if len(data) <= _SINGLE_PUT:
                self._client().put_object(**self._at(key), Body=data)
            else:
                self._client().upload_fileobj(io.BytesIO(data), self.bucket, self.prefix + checked(key))

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
                    if in_doubt:
                        return self._read_back(key, data, last)
                    raise AlreadyExists(f"{self._url_of(key)} is already there") from error
                if status < 500 and status != 409:
                    if in_doubt:
                        return self._read_back(key, data, str(error))
                    raise self._translate(error, key) from error
                in_doubt, last = True, str(error)
            except EndpointConnectionError as error:  # never sent, so in doubt only if an earlier one was
                last = str(error)
            except HTTPClientError as error:  # timeout, reset: the server may have it, now or soon
                in_doubt, last = True, str(error)
        if not in_doubt:
            raise StoreError(f"{self._url_of(key)}: {last}; is the object store up? (`upvla status`)")
        return self._read_back(key, data, last)

    def _read_back(self, key: str, data: bytes, said: str) -> str:
        """What `create` answers after a lost reply: what is there decides, and where nobody says, it stays open."""
        try:
            there = self.read(key)
        except (StoreError, NotFound) as error:
            message = f"creating {self._url_of(key)}: no reply ({said}); read it back before trying again"
            raise OutcomeUnknown(message) from error
        if there == data:
            return ""
        raise AlreadyExists(f"{self._url_of(key)} is already there")

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        listed = self._listed(prefix, after).items()
        return {key: _object_token(item["Size"], item["ETag"]) for key, item in listed}

    def modified(self, prefix: str = "") -> dict[str, float]:
        return {key: item["LastModified"].timestamp() for key, item in self._listed(prefix).items()}

    def unfinished(self) -> dict[str, float]:
        """Multipart uploads, a large object each."""
        with self._translated(""):
            pages = (
                self._client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix)
            )
            uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        return {
            f"{upload['Key'].removeprefix(self.prefix)}{_UPLOAD}{upload['UploadId']}": upload["Initiated"].timestamp()
            for upload in uploads
        }

    def abandon(self, name: str) -> None:
        key, _, upload = name.rpartition(_UPLOAD)
        with contextlib.suppress(NotFound), self._translated(key):
            self._client().abort_multipart_upload(**self._at(key), UploadId=upload)

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
            self._client().upload_file(str(path), self.bucket, self.prefix + checked(key))

    def size(self, key: str) -> int:
        with self._translated(key):
            return int(self._client().head_object(**self._at(key))["ContentLength"])

    def download(self, key: str, path: str | Path) -> None:
        with self._translated(key):
            self._client().download_file(self.bucket, self.prefix + checked(key), str(path))

    def parquet(self, key: str, metadata: FileMetaData | None = None) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        with self._translated(key):
            handle = _arrow_s3(os.getpid(), *_s3_environment()).open_input_file(f"{self.bucket}/{self.prefix}{key}")
            return ParquetFile(handle, metadata=metadata, pre_buffer=True, page_checksum_verification=True)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + checked(key)}

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
        if code in ("404", "NoSuchKey", "NoSuchUpload") or isinstance(error, FileNotFoundError):
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


def _object_token(size: int, etag: str) -> str:
    return f"{size}-{etag.strip(chr(34))}"


def _jittered(seconds: float) -> float:
    """Up to half as long again, so that clients that failed together do not come back together."""
    return seconds * (1 + uuid.uuid4().int % 1000 / 2000)  # no global random generator


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
