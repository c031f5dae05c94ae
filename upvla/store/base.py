"""What every store can do, and what it answers where it cannot."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upvla.errors import ConfigError, Corrupt, StoreError, shown

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile


class Store(ABC):
    """Objects under `url`. Raises `NotFound`, `AlreadyExists`, `StoreError`, `OutcomeUnknown` and nothing else."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.url,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.url)!r})"

    @abstractmethod
    def read(self, key: str) -> bytes: ...

    @abstractmethod
    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        """Sorted keys that start with `prefix` and are greater than `after`, each with a string that changes when its
        object does."""

    def modified(self, prefix: str = "") -> dict[str, float]:
        """Keys with the time of their last write, in seconds of the store's own clock."""
        raise self._read_only(prefix)

    def unfinished(self) -> dict[str, float]:
        """What writes take up that never ended, or have not yet, none of which is listed: names for `abandon`, with the
        time of the store's own clock at which they were last heard of."""
        return {}

    def abandon(self, name: str) -> None:
        """Free what an unfinished write takes up; no error if it has ended meanwhile."""
        raise self._read_only(name)

    def list(self, prefix: str = "") -> list[str]:
        return list(self.tokens(prefix))

    def exists(self, key: str) -> bool:
        return key in self.tokens(checked(key))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Bytes `[start, end)` of one object, in the order asked. A range past the end is `Corrupt`."""
        data = self.read(key)
        return require_whole([data[start:end] for start, end in ranges], ranges, self._url_of(key))

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
        return type(self)(f"{self.url}/{checked(prefix)}")

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


def checked(key: str) -> str:
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise ConfigError(f"{key!r} is no key: keys are relative, without '..'")
    return key


def require_whole(parts: list[bytes], ranges: Sequence[tuple[int, int]], url: str) -> list[bytes]:
    for part, (start, end) in zip(parts, ranges, strict=True):
        if len(part) != end - start:
            raise Corrupt(f"{url} ends before byte {end} (range {start}:{end} gave {len(part)} bytes)")
    return parts


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()
