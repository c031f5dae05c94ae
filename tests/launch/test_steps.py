from __future__ import annotations

from pathlib import Path

import pytest

from upvla.launch.steps import finished, once
from upvla.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_a_finished_step_is_read_back(store: Store) -> None:
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"version": len(calls)}

    first = once(store, "ingest", {"source": "a"}, work)
    assert once(store, "ingest", {"source": "a"}, work) == first
    assert first["version"] == 1
    assert first["seconds"] >= 0
    assert once(store, "ingest", {"source": "b"}, work)["version"] == 2
    assert once(store, "mix", {"source": "a"}, work)["version"] == 3
    assert finished(store, "ingest", {"source": "a"}) == first
    assert finished(store, "ingest", {"source": "c"}) is None


def test_a_failed_step_leaves_no_trace(store: Store) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        once(store, "ingest", 1, fail)
    assert finished(store, "ingest", 1) is None
    assert once(store, "ingest", 1, lambda: {"ok": True})["ok"]


def test_of_two_at_once_the_first_to_finish_wins(store: Store) -> None:
    def slower() -> dict[str, str]:
        assert once(store, "train", 1, lambda: {"by": "faster"})["by"] == "faster"
        return {"by": "slower"}

    assert once(store, "train", 1, slower)["by"] == "faster"
