from __future__ import annotations

import asyncio
import shlex
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.launch.conftest import RayHead
from upvla.errors import JobFailed, StackError
from upvla.launch.jobs import Jobs

pytestmark = pytest.mark.seam


def python(code: str) -> str:
    return f"{sys.executable} -S -c {shlex.quote(code)}"


def test_a_job_that_fails_is_a_new_attempt_next_time(ray_head: RayHead, tmp_path: Path) -> None:
    marker = tmp_path / "seen"
    code = f"""
import os, pathlib, sys
print("hello from the job", os.environ["COLOUR"])
marker = pathlib.Path({str(marker)!r})
if not marker.exists():
    marker.touch()
    sys.exit("upvla: config: the first attempt fails")
"""
    jobs, lines = Jobs(ray_head.jobs_url), []
    with pytest.raises(JobFailed, match=r"flaky-1 ended as FAILED(.|\n)*the first attempt fails"):
        jobs.run("flaky", python(code), env={"COLOUR": "blue"}, on_line=lines.append)
    jobs.run("flaky", python(code), env={"COLOUR": "green"}, on_line=lines.append)
    assert [line for line in lines if line.startswith("hello")] == [
        "hello from the job blue",
        "hello from the job green",
    ]


def test_a_second_caller_attaches_and_sees_the_whole_log(ray_head: RayHead, tmp_path: Path) -> None:
    count, attached = tmp_path / "count", tmp_path / "attached"
    code = f"""
import os, time
open({str(count)!r}, "a").write("x")
for i in range(8):
    print("tick", i, flush=True)
    while i == 3 and not os.path.exists({str(attached)!r}):
        time.sleep(0.05)
"""
    seen: list[list[str]] = [[], []]
    callers = [
        threading.Thread(
            target=Jobs(ray_head.jobs_url).run,
            args=("shared", python(code)),
            kwargs={"env": {}, "on_line": lines.append},
        )
        for lines in seen
    ]
    for caller, lines in zip(callers, seen, strict=True):
        caller.start()
        deadline = time.monotonic() + 120
        while not lines and time.monotonic() < deadline:
            time.sleep(0.1)
    attached.touch()
    for caller in callers:
        caller.join(120)
    ticks = [f"tick {i}" for i in range(8)]
    assert [[line for line in lines if line.startswith("tick")] for lines in seen] == [ticks, ticks]
    assert count.read_text() == "x"


def test_an_interrupt_stops_the_job(ray_head: RayHead) -> None:
    def interrupt(line: str) -> None:
        if line == "started":
            raise KeyboardInterrupt

    jobs = Jobs(ray_head.jobs_url)
    code = "import time; print('started', flush=True); time.sleep(100)"
    with pytest.raises(KeyboardInterrupt):
        jobs.run("interrupted", python(code), env={}, on_line=interrupt)
    deadline = time.monotonic() + 120
    while jobs.cancel("interrupted") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not jobs.cancel("interrupted")


def test_a_caller_that_its_orchestrator_lost_leaves_the_job_running(ray_head: RayHead) -> None:
    def cancel(line: str) -> None:
        if line == "started":
            raise asyncio.CancelledError  # as Prefect's is

    jobs = Jobs(ray_head.jobs_url)
    code = "import time; print('started', flush=True); time.sleep(100)"
    with pytest.raises(asyncio.CancelledError):
        jobs.run("left", python(code), env={}, on_line=cancel)
    assert jobs.cancel("left")


def test_no_job_server(ray_head: RayHead) -> None:
    with pytest.raises(StackError, match=r"no Ray job server at http://127\.0\.0\.1:9"):
        Jobs("http://127.0.0.1:9")
