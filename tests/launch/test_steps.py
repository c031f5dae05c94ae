from __future__ import annotations

import subprocess
import sys
import time
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


WORK = """
import sys, time
from pathlib import Path
from upvla.launch.steps import once
from upvla.store import open_store

def work():
    with Path(sys.argv[2]).open("a") as told:
        told.write("began\\n")
    print("began", flush=True)
    time.sleep(float(sys.argv[3]))
    return {"by": sys.argv[4]}

print(once(open_store(sys.argv[1]), "encode", 1, work, in_turn=True)["by"], flush=True)
"""


def worker(store: Store, told: Path, takes_s: float, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, store.url, str(told), str(takes_s), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_in_turn_one_works_and_both_have_its_result(store: Store, tmp_path: Path) -> None:
    told = tmp_path / "told"
    both = [worker(store, told, 1.0, "the first") for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert told.read_text() == "began\n" and [lines[-1] for lines in said] == ["the first"] * 2


def test_nobody_waits_for_a_process_that_was_killed_at_its_work(store: Store, tmp_path: Path) -> None:
    killed = worker(store, tmp_path / "told", 600, "the killed")
    assert killed.stdout is not None and killed.stdout.readline() == "began\n"
    killed.kill()
    killed.wait()
    began = time.monotonic()
    assert once(store, "encode", 1, lambda: {"by": "the next"}, in_turn=True)["by"] == "the next"
    assert time.monotonic() - began < 10  # a third of what a process of another machine would be given
