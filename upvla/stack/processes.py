"""Processes that belong to one home folder: started detached, found by their mark, stopped without remains.

The process table is the only record of what runs: every server, and every process that it ever starts, carries
`UPVLA_STACK=<home>` in its environment. So a foreign process is never stopped, not even when it has inherited an old
number, and nothing of ours is left behind, not even when the home folder was deleted under it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import psutil

from upvla.errors import StackError

_TERM_S = 15.0  # SeaweedFS takes 4 s, Ray drains for 1 s; under load more
_KILL_S = 5.0
_RELEASE_S = 3.0  # the threads of a killed process hold its sockets for a moment after it counts as dead


def start(home: Path, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Start `command` in a session of its own (Ctrl-C in the terminal is not for it), marked as ours."""
    marks = {
        "UPVLA_STACK": str(home),
        "UPVLA_PART": name,
        "SPT_NOENV": "1",  # else setproctitle, which Ray uses, writes over the environment in the process table
    }
    with log.open("ab") as output:
        output.write(f"\n--- {datetime.now().astimezone().isoformat(timespec='seconds')} {name} starts\n".encode())
        output.flush()
        with _interruptible():
            subprocess.Popen(
                command,
                env={**environment, **marks},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so does all that it starts; but Prefect's servers, told to end by
    SIGTERM, interrupt themselves. A handler of ours, unlike being ignored, is not inherited by a new program."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def marked(home: Path, name: str | None = None) -> list[psutil.Process]:
    """Living processes of this home (of one part), except the caller."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or not _alive(process):
                continue
            marks = process.environ()
            if marks.get("UPVLA_STACK") == str(home) and name in (None, marks.get("UPVLA_PART")):
                found.append(process)
    return found


def values(home: Path, variable: str) -> set[str]:
    """What an environment variable is in the living processes of this home."""
    found = set()
    for process in marked(home):
        with contextlib.suppress(psutil.Error):
            found.add(process.environ().get(variable, ""))
    return found - {""}


def main_process(home: Path, name: str, command: Sequence[str]) -> psutil.Process | None:
    """The process that `start` started: that exact command; a forked child of it is younger."""
    same = []
    for process in marked(home, name):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == list(command[1:]):
                same.append(process)
    return min(same, key=psutil.Process.create_time, default=None)


def stop(processes: Sequence[psutil.Process], grace_s: float = _TERM_S) -> None:
    """Ask them to end, parents first (Ray drains for 30 s when its agents are gone before it); then make them."""
    asked: set[int] = set()
    deadline = time.monotonic() + grace_s
    while (processes := [p for p in processes if _alive(p)]) and time.monotonic() < deadline:
        numbers = {process.pid for process in processes}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in asked and process.ppid() not in numbers:
                    process.terminate()  # psutil compares start times: a reused number is never hit
                    asked.add(process.pid)
        time.sleep(0.05)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + _KILL_S
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    """A zombie is not: in a container whose first process reaps nobody it stays in the table for ever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def require_free(name: str, host: str, ports: Mapping[int, str]) -> None:
    """Raise `StackError` naming the first port that cannot be bound, who holds it, and the setting that moves it."""
    deadline = time.monotonic() + _RELEASE_S
    for port, setting in ports.items():
        while not _is_free(host, port):
            if time.monotonic() > deadline:
                raise StackError(
                    f"port {port}, which {name} needs, is held by {_holder(port)}: stop that, or move ours with "
                    f"UPVLA_PORTS={setting}=NUMBER or `stack.ports.{setting}` in configs/site/local.yaml"
                )
            time.sleep(0.1)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise StackError(f"{host} is no address of this machine: correct `stack.host` of the site") from error
            return False
    return True


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        return f"pid {process.pid}"


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return describe(psutil.Process(connection.pid))
    return "a process that this user may not see"
