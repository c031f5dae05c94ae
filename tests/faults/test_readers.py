"""T7, every format: whatever bytes of a source are changed, a reader gives a recording or one of our errors."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_sources import write_bridge, write_lerobot_v21, write_libero, write_llava
from tests.factories import write_calvin
from upvla.data.quality import QualityLimits, check
from upvla.data.sources import open_source
from upvla.errors import BadEpisode, UpvlaError

MUTATIONS = 40  # a format
SETS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "calvin": (lambda folder: write_calvin(folder, (3, 4), static=(24, 24, 3), gripper=(16, 16, 3)), {}),
    "lerobot": (write_lerobot_v21, {"action_space": "calvin_relative"}),
    "rlds": (lambda folder: write_bridge(folder, [(3, 4)]), {"layout": "bridge_v2"}),
    "hdf5": (lambda folder: write_libero(folder / "stove.hdf5", (4, 3)), {}),
    "llava": (write_llava, {}),
}


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, lengthened, a stretch zeroed or repeated, or a few bytes changed."""
    changed, place = bytearray(data), int(rng.integers(max(1, len(data))))
    how, length = int(rng.integers(5)), int(rng.integers(1, 64))
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + rng.integers(0, 256, length, dtype=np.uint8).tobytes() + data[place:]
    if how == 2:
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    elif how == 3:
        changed[place:place] = changed[place : place + length]
    else:
        for at in rng.integers(0, max(1, len(data)), min(4, len(data))).tolist():
            changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _read_all(format: str, folder: Path, options: dict[str, Any]) -> Counter[str]:
    """Reason -> how many recordings, "good" among them; "refused" where the source as a whole is."""
    found = Counter[str]()
    try:
        source = open_source(format, str(folder), **options)
        keys = source.keys()
    except UpvlaError:
        return Counter({"refused": 1})
    for key in keys:
        try:
            source.token(key)
            check(source.read(key), QualityLimits())
            found["good"] += 1
        except BadEpisode as error:
            found[error.reason] += 1
        except UpvlaError:
            found["refused"] += 1
    return found


def _mutate_and_read(format: str, folder: Path, results: Any) -> None:
    """In a process of its own: libraries that read files may crash it, and that would be a finding."""
    write, options = SETS[format]
    write(folder / "set")
    rng, total = np.random.Generator(np.random.Philox(11)), Counter[str]()
    files = sorted(path for path in (folder / "set").rglob("*") if path.is_file())
    for number in range(MUTATIONS):
        path = files[int(rng.integers(len(files)))]
        saved = path.read_bytes()
        path.write_bytes(_mutated(saved, rng))
        try:
            total += _read_all(format, folder / "set", options)
        except Exception as error:
            shutil.copy(path, folder / "culprit")
            results.send(f"mutation {number} of {path.name}: {error!r}")
            return
        path.write_bytes(saved)
    results.send(dict(total))


@pytest.mark.parametrize("format", SETS)
def test_changed_bytes_give_a_recording_or_a_reason(format: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_mutate_and_read, args=(format, tmp_path, theirs))
    child.start()
    theirs.close()
    found = ours.recv()  # EOFError: the child crashed
    child.join()
    assert child.exitcode == 0 and isinstance(found, dict), found
    assert found["good"] > 0 and sum(found.values()) > found["good"]
