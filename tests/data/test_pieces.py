from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.factories import write_calvin
from upvla.data import pieces
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.pieces import Pieces, packed, unpacked
from upvla.data.sources.calvin import CalvinSource
from upvla.store import Store, open_store
from upvla.types import Episode, Talk

CONFIG = IngestConfig(format="calvin", dataset="table", validation_fraction=0.3)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    return write_calvin(folder, (6, 8, 5, 7, 6, 9), static=(48, 48, 3), gripper=(32, 32, 3))


@pytest.fixture(scope="module")
def episodes(recordings: Path) -> list[Episode]:
    """This source encodes the frames itself."""
    source = CalvinSource(str(recordings), span_end="exclusive")
    return [source.read(key) for key in source.keys()]


def require_same(found: Episode | None, wanted: Episode) -> None:
    assert found is not None
    for name, value in vars(wanted).items():
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value, name


def test_a_piece_is_the_whole_recording(episodes: list[Episode]) -> None:
    first = replace(episodes[0], talks=(Talk(2, "colour", (("Which?", "Red."), ("And?", "Blue."))),))
    without = replace(first, scene_state=None, absolute_actions=None, images={}, spans=())
    picture = replace(
        without,
        timestamps=np.zeros(1),
        state=np.zeros((1, 0), np.float32),
        actions=np.zeros((1, 0), np.float32),
        images={"static": [b"\xff\xd8 as the source had it"]},
    )
    for episode in (first, without, picture):
        require_same(unpacked(packed(episode)), episode)


def test_what_is_not_as_it_was_written_is_nobodys_recording(
    store: Store, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = packed(episodes[0])
    assert unpacked(data[:-1]) is unpacked(b"") is unpacked(data[:-1] + bytes([data[-1] ^ 1])) is None
    monkeypatch.setattr(pieces, "_EVERY_S", 0.0)
    Pieces(store, "meaning").add(episodes[0], "token")
    (name,) = store.list("pieces/")
    store.write(name, data[:-1])
    again = Pieces(store, "meaning")
    assert again.find(episodes[0].id, "token") is None
    again.add(episodes[0], "token")
    require_same(Pieces(store, "meaning").find(episodes[0].id, "token"), episodes[0])


def test_pieces_are_of_one_meaning_and_token_and_go_when_the_portion_is_done(
    store: Store, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_EVERY_S", 0.0)
    first, second = Pieces(store, "meaning"), Pieces(store, "meaning")
    first.add(episodes[0], "token")
    second.add(episodes[1], "token")  # another portion's
    later = Pieces(store, "meaning")
    require_same(later.find(episodes[0].id, "token"), episodes[0])
    assert later.find(episodes[0].id, "repaired") is Pieces(store, "other").find(episodes[0].id, "token") is None
    later.clear()
    assert [Pieces(store, "meaning").find(episode.id, "token") is None for episode in episodes[:2]] == [True, False]


def test_they_wait_for_their_time_and_memory_is_bounded(
    store: Store, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = [sum(len(frame) for frames in episode.images.values() for frame in frames) for episode in episodes]
    monkeypatch.setattr(pieces, "_HELD_BYTES", sum(size[3:5]))
    found = Pieces(store, "meaning")
    for episode in episodes[:5]:
        found.add(episode, "token")
    assert store.list("pieces/") == []  # a portion that is soon done leaves nothing
    monkeypatch.setattr(pieces, "_EVERY_S", 0.0)
    monkeypatch.setattr(pieces, "_HELD_BYTES", sum(size[3:6]))
    found.add(episodes[5], "token")
    left = Pieces(store, "meaning")
    assert [left.find(episode.id, "token") is not None for episode in episodes] == [False] * 3 + [True] * 3


def _read_and_die(url: str, source: str, at: int) -> None:
    """Ingest with every recording kept at once, and be killed when the one of this number is about to be read."""
    real, count = CalvinSource.read, 0

    def deadly(self: CalvinSource, key: str) -> Episode:
        nonlocal count
        count += 1
        if count == at:
            time.sleep(1)  # the recording before is written meanwhile, in another thread
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    CalvinSource.read = deadly  # type: ignore[method-assign]
    pieces._EVERY_S = 0.0
    ingest(open_store(url), CONFIG, source)


def test_a_killed_portion_goes_on_at_the_recording_that_was_in_hand(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = open_store(str(tmp_path / "calm"))
    expected = ingest(calm, CONFIG, str(recordings))
    keys, url = CalvinSource(str(recordings), span_end="exclusive").keys(), str(tmp_path / "killed")
    child = multiprocessing.get_context("fork").Process(target=_read_and_die, args=(url, str(recordings), 5))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    real, read = CalvinSource.read, list[str]()

    def noted(self: CalvinSource, key: str) -> Episode:
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(CalvinSource, "read", noted)
    store = open_store(url)
    found = ingest(store, CONFIG, str(recordings))
    assert read == keys[4:]  # all six are one portion
    assert found["content_id"] == expected["content_id"]
    assert [key for key in store.list() if "/data/" in key] == [key for key in calm.list() if "/data/" in key]
    assert not [key for key in store.list() if "/pieces/" in key]
