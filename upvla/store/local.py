"""A folder as a store."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upvla.errors import AlreadyExists, NotFound, OutcomeUnknown, StoreError
from upvla.store.base import Store, checked, require_whole

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile

_TEMPORARY = ".tmp-"  # files being written, or left by who was killed; never listed


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
        return require_whole(parts, ranges, self._url_of(key))

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> str:
        linked = False
        try:
            with self._translated(key), self._temporary(key) as temporary:
                _write_synced(temporary, data)
                os.link(temporary, self._path(key))
                linked = True
                return _file_token(temporary)
        except StoreError as error:
            if linked:  # others see it, but a power cut may still take it
                raise OutcomeUnknown(f"creating {error}; read it back before trying again") from error
            raise

    def tokens(self, prefix: str = "", after: str = "") -> dict[str, str]:
        return self._tokens(prefix, after, temporary=False)

    def _tokens(self, prefix: str, after: str, *, temporary: bool) -> dict[str, str]:
        root, found = Path(self.url), {}
        top = root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(root).as_posix()
                if key.startswith(prefix) and key > after and name.startswith(_TEMPORARY) == temporary:
                    with contextlib.suppress(FileNotFoundError):  # deleted while we walk
                        found[key] = _file_token(path)
        return dict(sorted(found.items()))

    def modified(self, prefix: str = "") -> dict[str, float]:
        return _times(self.tokens(prefix))

    def unfinished(self) -> dict[str, float]:
        return _times(self._tokens("", "", temporary=True))

    def abandon(self, name: str) -> None:
        self.delete(name)

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
        return Path(self.url, checked(key))

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        folder = self._path(key).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(
                f"{folder} cannot be a folder: a file is there, or above it; name another place"
            ) from error
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


def _times(tokens: dict[str, str]) -> dict[str, float]:
    return {key: int(token.rpartition("-")[2]) / 1e9 for key, token in tokens.items()}


def _file_token(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


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
