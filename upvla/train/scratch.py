"""Folders on a worker's own disk for shards in transit. A killed owner's folder is removed by whoever comes next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from upvla.train import group

_STALE_S = 60.0  # a younger folder may be one that its owner has made and not locked yet


@contextlib.contextmanager
def locked_folder(scratch: Path) -> Iterator[Path]:
    """A folder of our own below `scratch`, locked while we live; what killed workers left there is removed first."""
    scratch.mkdir(parents=True, exist_ok=True)
    for old in scratch.glob("resume-*"):
        with contextlib.suppress(OSError):  # BlockingIOError: its owner lives
            if time.time() - old.stat().st_mtime > _STALE_S:
                with _locked(old):
                    shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=scratch))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def shared_folder(scratch: Path) -> Iterator[tuple[Path, bool]]:
    """One folder for all workers that share this disk, and whether this worker is the one who fills it. Collective."""
    with locked_folder(scratch) as ours:
        stat = scratch.stat()
        disk = (socket.gethostname(), stat.st_dev, stat.st_ino)
        folder = next(path for other, path in group.gather((disk, ours)) if other == disk)
        yield folder, folder == ours


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
