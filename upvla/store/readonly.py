"""Any other fsspec URL as a store to read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upvla.errors import ConfigError, NotFound, StoreError, cause
from upvla.store.base import Store, checked, require_whole

_VERSION = (
    "size", "etag", "mtime", "created", "lastmodified",  # S3, Azure, folders, memory
    "updated", "generation", "md5hash", "crc32c", "contentmd5", "md5", "checksum",  # Google, and hashes where there are
    "modified", "modifiedat", "modificationtime", "crc", "sha", "sha1", "sha256", "blobid",  # drives, HDFS, code hosts
)  # fmt: skip


class FsspecStore(Store):
    """Any other fsspec URL, to read from: without a conditional create no dataset or checkpoint lives here."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        super().__init__(url)
        try:
            self._files, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # the package of this kind of URL is not here, or there is none
            raise ConfigError(f"{url} cannot be opened: {error}; s3:// and folders need nothing more") from error
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        try:
            return bytes(self._files.cat_file(f"{self._root}/{checked(key)}"))
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from cause(error, self.url)
        except OSError as error:
            raise StoreError(f"{self._url_of(key)}: {error}") from cause(error, self.url)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        path = f"{self._root}/{checked(key)}"
        try:
            parts = [bytes(self._files.cat_file(path, start, end)) for start, end in ranges]
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from cause(error, self.url)
        except OSError as error:
            raise StoreError(f"{self._url_of(key)}: {error}") from cause(error, self.url)
        return require_whole(parts, ranges, self._url_of(key))

    def size(self, key: str) -> int:
        try:
            return int(self._files.size(f"{self._root}/{checked(key)}"))
        except FileNotFoundError as error:
            raise NotFound(f"{self._url_of(key)} does not exist") from cause(error, self.url)

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        folder = prefix.rpartition("/")[0]
        found = self._files.find(f"{self._root}/{folder}".rstrip("/"), detail=True)
        keys = {path[len(self._root) :].lstrip("/"): info for path, info in sorted(found.items())}
        return {key: _token(info) for key, info in keys.items() if key.startswith(prefix) and key > after}


def _token(info: Mapping[str, Any]) -> str:
    """What a file system says of an object's version. Each has names of its own: `ETag` and `etag`, `LastModified` and
    `last_modified` are one."""
    told = {name.lower().replace("_", ""): value for name, value in info.items()}
    return "-".join(str(told[name]) for name in _VERSION if told.get(name) is not None)
