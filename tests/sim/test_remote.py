"""A simulator behind a process boundary: what crosses it, and what a crash, a hang and a refusal become."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upvla.errors import SimulatorError
from upvla.sim.remote import RemoteWorld
from upvla.sim.remote.host import receive, send

TOY = Path(__file__).with_name("toy_world.py")


@contextmanager
def world(kind: str = "World", timeout_s: float = 60.0, **options: Any) -> Iterator[RemoteWorld]:
    remote = RemoteWorld(f"{TOY}:{kind}", options, timeout_s=timeout_s)
    try:
        yield remote
    finally:
        remote.close()


@pytest.mark.parametrize("value", [
    None, True, 3, -0.5, "Grüße", [], {}, [1, [2, {"a": None}]],
    np.zeros((0, 3), np.float32), np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::-1], np.array(2.5),
    {"images": {"static": np.full((200, 200, 3), 7, np.uint8)}, "n": [np.int64(4), np.array([True, False])]},
])  # fmt: skip
def test_what_is_sent_is_what_arrives(value: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, value)
        np.testing.assert_equal(receive(theirs), value)


def test_objects_never_cross() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TypeError):
        send(ours, np.array([{"a": 1}], object))


@pytest.mark.seam
def test_a_world_answers_refuses_and_lives_on() -> None:
    with world(start=1.0) as remote:
        found = remote.call("move", by=np.array([1.0, 2.0]))
        assert found["x"] == 4.0
        np.testing.assert_array_equal(found["rows"][0], [1.0, 2.0])
        with pytest.raises(SimulatorError, match="refuse: KeyError: 'no such joint'"):
            remote.call("refuse")
        with pytest.raises(SimulatorError, match="thing: TypeError"):
            remote.call("thing")
        assert remote.call("move", by=np.array([1.0]))["x"] == 5.0


@pytest.mark.seam
def test_a_crash_says_what_the_simulator_said_last() -> None:
    with world() as remote, pytest.raises(SimulatorError, match=r"died during 'crash'.*segmentation of something"):
        remote.call("crash")


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["World", "Forking"])
def test_a_hang_ends_with_the_watchdog_and_leaves_no_process(kind: str) -> None:
    with world(kind, timeout_s=20.0) as remote:
        pid = remote.call("process")
        remote._timeout_s = 1.0
        began = time.monotonic()
        with pytest.raises(SimulatorError, match="did not answer 'hang' within 1 s"):
            remote.call("hang")
        assert time.monotonic() - began < 15
        assert _gone(pid)
        with pytest.raises(SimulatorError):
            remote.call("process")


@pytest.mark.seam
def test_a_fresh_world_remembers_nothing() -> None:
    with world("Forking", start=1.0) as remote:
        first = remote.call("process")
        assert remote.call("move", by=np.array([5.0]))["x"] == 6.0
        remote.fresh()
        assert remote.call("process") != first
        assert remote.call("move", by=np.array([5.0]))["x"] == 6.0


@pytest.mark.seam
def test_a_world_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(SimulatorError, match="cannot start: ValueError: start must be finite"),
        world(start=float("inf")),
    ):
        pass
    with pytest.raises(SimulatorError, match="cannot start /no/such/python"):
        RemoteWorld(f"{TOY}:World", {}, python="/no/such/python")


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["World", "Forking"])
def test_a_busy_world_ends_with_a_caller_that_was_killed(kind: str) -> None:
    code = (
        "import sys; from upvla.sim.remote import RemoteWorld\n"
        f"world = RemoteWorld({f'{TOY}:{kind}'!r}, {{}})\n"
        "print(world.call('process'), flush=True); world.call('hang')"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    assert not _gone(pid, tries=1)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert _gone(pid)


@pytest.mark.seam
def test_closing_twice_is_harmless() -> None:
    with world() as remote:
        pid = remote.call("process")
        remote.close()
        assert _gone(pid)


def _gone(pid: int, tries: int = 100) -> bool:
    for _ in range(tries):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False
