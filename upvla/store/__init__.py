"""Bytes at a URL: a local folder, an S3 prefix, or (to read from) any fsspec URL.

One operation carries the weight of everything above it: `create` puts an object only if nothing has that name, and of
any number of concurrent creators exactly one wins. Stores travel between processes as their URL; clients are made
lazily, once a process, from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`).
Keys are relative posix paths, and a listing's prefix is a plain string prefix, as in S3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from typing import Any

from upvla.errors import AlreadyExists, StoreError
from upvla.store.base import Store
from upvla.store.local import LocalStore
from upvla.store.readonly import FsspecStore
from upvla.store.s3 import S3Store

__all__ = [
    "LocalStore",
    "S3Store",
    "Store",
    "canonical_json",
    "content_hash",
    "open_store",
    "supports_conditional_create",
    "text_hash",
]


def canonical_json(value: Any) -> str:
    """One text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_hash(value: Any) -> str:
    """First 16 hex digits of the sha256 of `value` as canonical JSON: the identity of everything that has one."""
    return text_hash(canonical_json(value))


def text_hash(text: str) -> str:
    """`content_hash` of the value that has this canonical JSON."""
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
    """Try it: whether a second `create` of one key is refused and the first one's bytes survive. A store that is away,
    or cannot be written at all, raises its `StoreError`."""
    key = f".probe-{uuid.uuid4().hex}"
    store.create(key, b"first")
    try:
        with contextlib.suppress(AlreadyExists):
            store.create(key, b"second")
        return store.read(key) == b"first"
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)
