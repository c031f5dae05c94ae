"""A simulator in a process of its own, maybe in a Python of its own: `RemoteWorld` is this side of the boundary.

Simulators clash over pins, keep state in globals, print, hang and crash. Behind a socket pair they can do none of it to
the caller: what they pin is their own interpreter's affair, and a death or a hang is one `SimulatorError`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upvla.errors import SimulatorError
from upvla.sim.remote import host

_HERE = Path(__file__).parent
_START_S = 300.0  # loading meshes and assets on a busy machine
_CALL_S = 120.0  # a watchdog's patience: no call of any simulator takes a tenth of it


class RemoteWorld:
    """Methods of the class `place` (`file.py:Class`, a file beside this one), called in another process.

    python: the interpreter that holds the simulator; `paths` go before its own module search path, in place of this
    process's PYTHONPATH. A failing start raises `SimulatorError` with what the world said.
    """

    def __init__(
        self,
        place: str,
        options: Mapping[str, Any],
        *,
        python: str = sys.executable,
        paths: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        timeout_s: float = _CALL_S,
    ) -> None:
        self.name, self._timeout_s = Path(place).name.partition("_")[0], timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the world
        self._connection, theirs = socket.socketpair()
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # ours, not its
        variables = {**inherited, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        command = [python, str(_HERE / "host.py"), str(theirs.fileno()), str(_HERE / place), json.dumps(options)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                self._connection.close()
                self._log.close()
                raise SimulatorError(
                    f"{self.name}: cannot start {python}: {error}; name a Python that exists"
                ) from error
        self._answer("start", _START_S)

    def call(self, method: str, **arguments: Any) -> Any:
        """What the world's method returns. What it raises, its death and its silence are a `SimulatorError`."""
        self._send(method, arguments)
        return self._answer(method, self._timeout_s)

    def fresh(self) -> None:
        """Go on with a copy of the world as it was when it had just been loaded (for worlds that fork)."""
        self._send("fresh", {})
        self._answer("fresh", self._timeout_s)

    def close(self) -> None:
        """Kill the process and whatever it started. Calling again is harmless."""
        if self._process.poll() is None or self._connection.fileno() >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._connection.close()
        self._log.close()

    def _send(self, method: str, arguments: Mapping[str, Any]) -> None:
        try:
            self._connection.settimeout(self._timeout_s)
            host.send(self._connection, {"call": method, "arguments": dict(arguments)})
        except OSError as error:
            raise self._lost(f"is gone before {method!r}") from error

    def _answer(self, method: str, timeout_s: float) -> Any:
        try:
            self._connection.settimeout(timeout_s)
            answer = host.receive(self._connection)
        except TimeoutError as error:
            raise self._lost(f"did not answer {method!r} within {timeout_s:.0f} s") from error
        except (EOFError, OSError) as error:
            raise self._lost(f"died during {method!r}") from error
        if "error" in answer:
            if method == "start":
                raise self._lost(f"cannot start: {answer['error']}")
            raise SimulatorError(f"{self.name}: {method}: {answer['error']}")
        return answer["value"]

    def _lost(self, what: str) -> SimulatorError:
        """Ends the process for good; the last lines that it printed say why."""
        said = ""
        if not self._log.closed:
            self._log.seek(0)
            said = " | ".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])
        self.close()
        return SimulatorError(f"the {self.name} simulator {what}" + (f"; it said: {said}" if said else ""))
