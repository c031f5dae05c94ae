"""T7, every format: whatever bytes of a source are changed, a reader gives a recording or one of our errors, soon and
in little memory, and an ingest gives a version or one of our errors."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_sources import write_bridge, write_lerobot_v21, write_libero, write_llava
from tests.factories import write_calvin
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.quality import QualityLimits, check
from upvla.data.sources import open_source
from upvla.errors import BadEpisode, UpvlaError
from upvla.store import open_store

Reading = Callable[[str, Path, dict[str, Any]], Counter[str]]
FUZZ = settings(deadline=None, derandomize=True, database=None)
MOST_S, MOST_KIB = 5.0, 1 << 20  # that a recording may take to be refused
SETS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "calvin": (lambda folder: write_calvin(folder, (3, 4), static=(24, 24, 3), gripper=(16, 16, 3)), {}),
    "lerobot": (write_lerobot_v21, {"action_space": "calvin_relative"}),
    "rlds": (lambda folder: write_bridge(folder, [(3, 4)]), {"layout": "bridge_v2"}),
    "hdf5": (lambda folder: write_libero(folder / "stove.hdf5", (4, 3)), {}),
    "llava": (write_llava, {}),
}


class Change(NamedTuple):
    """What happens to one file. Numbers are taken modulo what there is: files, bytes."""

    file: int
    how: str
    places: list[int]
    filler: bytes

    def of(self, data: bytes) -> bytes:
        """Cut, lengthened, a stretch zeroed or repeated, or a few bits changed."""
        changed, places = bytearray(data), [place % max(1, len(data)) for place in self.places]
        stretch = slice(places[0], places[0] + len(self.filler))
        if self.how == "cut":
            del changed[places[0] :]
        elif self.how == "insert":
            changed[places[0] : places[0]] = self.filler
        elif self.how == "zero":
            changed[stretch] = bytes(len(changed[stretch]))
        elif self.how == "repeat":
            changed[places[0] : places[0]] = changed[stretch]
        elif data:
            for place, byte in zip(places, self.filler, strict=False):
                changed[place] ^= 1 << byte % 8
        return bytes(changed)


CHANGES = st.builds(
    Change,
    file=st.integers(0, 2**16),
    how=st.sampled_from(["cut", "insert", "zero", "repeat", "flip"]),
    places=st.lists(st.integers(0, 2**32), min_size=1, max_size=4),
    filler=st.binary(min_size=1, max_size=64),
)


def _read_all(format: str, folder: Path, options: dict[str, Any]) -> Counter[str]:
    """Reason -> how many recordings, "good" among them; "refused" where the source as a whole is."""
    found = Counter[str]()
    try:
        source = open_source(format, str(folder), **options)
        keys = source.keys()
    except UpvlaError:
        return Counter({"refused": 1})
    for key in keys:
        began = time.monotonic()
        try:
            source.token(key)
            check(source.read(key), QualityLimits())
            found["good"] += 1
        except BadEpisode as error:
            found[error.reason] += 1
        except UpvlaError:
            found["refused"] += 1
        assert time.monotonic() - began < MOST_S, key
    return found


def _ingest_all(format: str, folder: Path, options: dict[str, Any]) -> Counter[str]:
    """As `_read_all`, of a dataset that this makes."""
    config = IngestConfig(format=format, dataset="table", options=options, min_accept_ratio=0)
    with tempfile.TemporaryDirectory() as store:
        try:
            found = ingest(open_store(store), config, str(folder))
        except UpvlaError:
            return Counter({"refused": 1})
    return Counter({"good": found["recordings"]}) + Counter(found["quarantined"])


def _change_and_read(format: str, read_all: Reading, examples: int, folder: Path, results: Any) -> None:
    """In a process of its own: libraries that read files may crash it, and that would be a finding, which lies in
    `folder` then."""
    write, options = SETS[format]
    write(folder)
    files, total = sorted(path for path in folder.rglob("*") if path.is_file()), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(FUZZ, max_examples=examples)
    @given(CHANGES)
    def read(change: Change) -> None:
        path = files[change.file % len(files)]
        saved = path.read_bytes()
        path.write_bytes(change.of(saved))
        try:
            total.update(read_all(format, folder, options))
        finally:
            path.write_bytes(saved)

    try:
        read()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
    except Exception as error:
        results.send("".join(traceback.format_exception(error)))  # the smallest change that does it among the notes
    else:
        results.send(dict(total))


@pytest.mark.parametrize(("read_all", "examples"), [(_read_all, 40), (_ingest_all, 8)])
@pytest.mark.parametrize("format", SETS)
def test_changed_bytes_give_a_recording_or_a_reason(
    format: str, read_all: Reading, examples: int, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_change_and_read, args=(format, read_all, examples, tmp_path / "set", theirs))
    child.start()
    theirs.close()
    found = ours.recv()  # EOFError: the child crashed
    child.join()
    assert child.exitcode == 0 and isinstance(found, dict), found
    assert found["good"] > 0 and sum(found.values()) > found["good"]
