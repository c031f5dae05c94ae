from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from upvla.errors import AlreadyOwned
from upvla.launch import lease
from upvla.launch.lease import Lease, newest, require_owner
from upvla.store import Store, open_store

OWN = """
import sys, time
from upvla.launch.lease import Lease
from upvla.store import open_store
with Lease(open_store(sys.argv[1]), "training x", beat_s=0.1):
    print("owned", flush=True)
    time.sleep(600)
"""


def owner_process(store: Store) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWN, store.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    return process


def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on we are another machine: nothing can be said of a process by looking for it."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")


def test_the_next_owner_waits_for_nothing_when_the_last_has_left(store: Store) -> None:
    for number in (1, 2, 3):
        with Lease(store, "training x") as ours:
            assert (ours.number, newest(store)) == (number, number)
            require_owner(store, number, "training x")


def test_a_second_owner_is_refused_by_the_name_of_the_first(store: Store) -> None:
    with Lease(store, "training x", beat_s=0.05):
        with pytest.raises(AlreadyOwned, match=rf"training x is already owned by process {os.getpid()} of "):
            Lease(store, "training x", beat_s=0.05).__enter__()
        assert newest(store) == 1


@pytest.mark.parametrize("other_machine", [False, True])
def test_a_killed_owner_is_followed_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_machine: bool
) -> None:
    store = open_store(str(tmp_path))
    process = owner_process(store)
    if other_machine:
        far_away(monkeypatch)
    with pytest.raises(AlreadyOwned, match="already owned"):
        Lease(store, "training x", beat_s=0.1, dead_after_s=60).__enter__()
    process.kill()
    process.wait()
    began, dead_after_s = time.monotonic(), 2.0 if other_machine else 60.0
    with Lease(store, "training x", beat_s=0.1, dead_after_s=dead_after_s) as ours:
        assert ours.number == 2
        waited = time.monotonic() - began > dead_after_s
        assert waited == other_machine, "nobody waits for a process that is surely gone"


def test_an_owner_that_was_stopped_finds_out_that_it_was_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    process = owner_process(store)
    far_away(monkeypatch)
    stopped = psutil.Process(process.pid)
    stopped.suspend()
    while stopped.status() != psutil.STATUS_STOPPED:  # it may be amid a write, which it ends first
        time.sleep(0.01)
    try:
        with Lease(store, "training x", beat_s=0.1, dead_after_s=1.0) as ours:
            require_owner(store, ours.number, "training x")
            with pytest.raises(AlreadyOwned, match=r"a later trainer \(token 2, ours is 1\)"):
                require_owner(store, 1, "training x")
    finally:
        process.kill()
        process.wait()


def test_of_many_at_once_one_owns(store: Store) -> None:
    answers: list[str] = []
    begin, end = threading.Barrier(6), threading.Barrier(6)

    def take() -> None:
        begin.wait()
        try:
            with Lease(store, "training x", beat_s=0.05):
                answers.append("owned")
                end.wait()
        except AlreadyOwned:
            answers.append("refused")
            end.wait()

    takers = [threading.Thread(target=take) for _ in range(6)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(120)
    assert sorted(answers) == ["owned", *["refused"] * 5]
