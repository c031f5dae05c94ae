"""The robot's side of a policy server: needs numpy and `websockets`, nothing else of upvla's dependencies.

    with RemotePolicy("ws://127.0.0.1:8600", token) as policy:
        control(policy, "open the drawer", observe, command, steps=360)

`RemotePolicy` is a `Policy` like any other: evaluation drives it as it drives one in this process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from upvla.errors import Mismatch, NoAnswer
from upvla.rollout import wire
from upvla.types import ActionSpace, Observation, Prediction

TOKEN = "UPVLA_POLICY_TOKEN"
"""Environment variable that holds a server's token where none is given."""

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_LATE_S = 0.5  # what a reply may take on the network beyond its deadline


class RemotePolicy:
    """One session with a policy server. Raises `NoAnswer` when it is late, busy or gone, `Mismatch` when it refuses."""

    def __init__(self, url: str, token: str = "", *, deadline_s: float | None = 1.0, timeout_s: float = 10.0) -> None:
        """`url` is the server's, ws:// or http://; `deadline_s` is what one prediction may take, None for the longest
        that the server allows: where a world waits, as in an evaluation."""
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise Mismatch(f"policy url {url!r}: write it as ws://HOST:PORT")
        self._url, self._timeout_s = url, timeout_s
        self._address = f"{_SCHEMES[parts.scheme]}://{parts.netloc}/v1/act"
        self._token = token or os.environ.get(TOKEN, "")
        self._connection: ClientConnection | None = None
        self._instruction: str | None = None
        self._begin, self._asked, self._number = False, 0.0, 0
        self.about: dict[str, Any] = {}
        """The server's greeting: model_id, version, stats_id, cameras, action_space, deadline_ms."""
        self.timing: dict[str, float] = {}
        """Of the last answer: queue_ms, predict_ms, total_ms as seen from here."""
        self._open()
        self._deadline_s = self.about["deadline_ms"] / 1000 if deadline_s is None else deadline_s

    @property
    def name(self) -> str:
        return str(self.about["model_id"])

    @property
    def action_space(self) -> ActionSpace:
        return self._action_space

    @property
    def cameras(self) -> tuple[str, ...]:
        """What the observations must hold."""
        return tuple(self.about["cameras"])

    def identity(self) -> dict[str, Any]:
        """Who answers, as far as it says; stored with every score."""
        return {"stats_id": self.about["stats_id"], "version": self.about["version"], "served": True}

    def reset(self, instruction: str) -> None:
        """The next observation begins a subtask."""
        self._instruction, self._begin = instruction, True

    def act(self, observation: Observation) -> Prediction:
        self.ask(observation)
        return self.answer()

    def ask(self, observation: Observation) -> None:
        """Send an observation and return at once; `answer` takes the reply. Only the last asked counts."""
        if self._instruction is None:
            raise Mismatch("policy: act() before reset(instruction): call reset once a subtask")
        cameras = {f"image_{camera}": observation.images[camera] for camera in self._cameras(observation)}
        self._number += 1
        header = {
            "id": self._number,
            "begin": self._begin,
            "instruction": self._instruction,
            "deadline_ms": 1000 * self._deadline_s,
        }
        message = wire.pack(header, {**cameras, "state": np.asarray(observation.state, np.float32)})
        self._asked = time.monotonic()
        try:
            self._opened().send(message)
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        self._begin = False

    def answer(self, timeout_s: float | None = None) -> Prediction:
        """The reply to the last `ask`. With `timeout_s` of 0, `NoAnswer("pending")` where it has not come yet."""
        until = self._asked + self._deadline_s + _LATE_S
        limit = until if timeout_s is None else min(until, time.monotonic() + timeout_s)
        while True:
            try:
                message = self._opened().recv(timeout=max(0.0, limit - time.monotonic()))
            except TimeoutError as error:
                if time.monotonic() < until:
                    raise NoAnswer("pending", f"{self._url} has not answered yet") from error
                raise NoAnswer(
                    "deadline", f"{self._url} said nothing for {self._deadline_s + _LATE_S:.2f} s"
                ) from error
            except (ConnectionClosed, OSError) as error:
                raise self._gone(error) from error
            header, arrays = wire.unpack(message if isinstance(message, bytes) else message.encode())
            if header.get("id") in (self._number, None):  # else the reply to an observation that nobody waits for
                return self._prediction(header, arrays)

    def close(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            connection = connect(
                self._address,
                additional_headers={"Authorization": f"Bearer {self._token}"},
                compression=None,  # pictures of a camera do not get smaller by it
                max_size=wire.MAX_BYTES,
                open_timeout=self._timeout_s,
                close_timeout=1.0,
                proxy=None,
            )
            greeting = connection.recv(timeout=self._timeout_s)
        except InvalidStatus as error:
            status = error.response.status_code
            if status == 401:
                raise Mismatch(f"{self._url} does not know this token: give the server's, or set {TOKEN}") from error
            raise NoAnswer("busy" if status == 503 else "away", f"{self._url} answered with status {status}") from error
        except (InvalidHandshake, ConnectionClosed, TimeoutError, OSError) as error:
            raise NoAnswer(
                "away", f"no policy server at {self._url} ({error}): start one with `upvla serve`"
            ) from error
        self.about = json.loads(greeting)
        if self.about.get("format") != wire.FORMAT:
            connection.close()
            raise Mismatch(
                f"{self._url} speaks format {self.about.get('format')}, this client {wire.FORMAT}: update one"
            )
        self._action_space = ActionSpace.from_json(self.about["action_space"])
        self._connection = connection

    def _opened(self) -> ClientConnection:
        if self._connection is None:
            raise NoAnswer("away", f"the session with {self._url} has ended: open another")
        return self._connection

    def _cameras(self, observation: Observation) -> list[str]:
        missing = [camera for camera in self.about["cameras"] if camera not in observation.images]
        if missing:
            raise Mismatch(f"policy: it needs camera {missing[0]!r}; the observation has {sorted(observation.images)}")
        return list(self.about["cameras"])

    def _prediction(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Prediction:
        if error := header.get("error"):
            if error["code"] in ("deadline", "busy"):
                raise NoAnswer(error["code"], error["message"])
            raise Mismatch(f"{self._url} refused: {error['code']}: {error['message']}")
        self.about["model_id"] = header["model_id"]  # after a reload, from the subtask's first answer on
        self.timing = {"queue_ms": header["queue_ms"], "predict_ms": header["predict_ms"]}
        self.timing["total_ms"] = 1000 * (time.monotonic() - self._asked)
        actions = arrays["actions"]
        if actions.ndim != 2 or actions.shape[1] != len(self.action_space) or not np.isfinite(actions).all():
            raise Mismatch(
                f"{self._url} sent a chunk {actions.shape} that is not finite f32[C,{len(self.action_space)}]"
            )
        return Prediction(actions)

    def _gone(self, error: Exception) -> NoAnswer:
        self.close()
        return NoAnswer("away", f"{self._url} hung up ({error})")


def control(
    policy: RemotePolicy,
    instruction: str,
    observe: Callable[[], Observation],
    command: Callable[[np.ndarray], None],
    *,
    steps: int,
    lead: int = 4,
    patience_s: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Drive a robot at its action space's rate; returns the steps made. An example to start from, and a tested one.

    The next chunk is asked for `lead` steps before the current one ends, and the robot goes on meanwhile: from the
    reply, the actions for steps that have passed are left out. Every action is clipped to the action space's limits.
    When a chunk has ended and the next does not come within `patience_s`, when the server refuses or goes away:
    `NoAnswer` or `Mismatch` is raised and `command` is not called again: hold still, or brake as your robot does.
    """
    space = policy.action_space
    low, high = (np.array([getattr(dim, side) for dim in space.dims], np.float32) for side in ("low", "high"))
    policy.reset(instruction)
    chunk, since, asked_at = policy.act(observe()).actions, 0, -1
    due = time.monotonic()
    for step in range(steps):
        if asked_at < 0 and since + len(chunk) - step <= lead:
            policy.ask(observe())
            asked_at = step
        if asked_at >= 0:
            ended = step - since >= len(chunk)
            if (fresh := _arrived(policy, patience_s if ended else 0.0)) is not None:
                chunk, since, asked_at = fresh.actions, asked_at, -1
        if step - since >= len(chunk):
            raise NoAnswer(
                "silence", f"no action for step {step}: the last chunk ended {step - since - len(chunk)} ago"
            )
        command(np.clip(chunk[step - since], low, high))
        due += space.dt_s
        sleep(max(0.0, due - time.monotonic()))
    return steps


def _arrived(policy: RemotePolicy, wait_s: float) -> Prediction | None:
    try:
        return policy.answer(wait_s)
    except NoAnswer as error:
        if error.reason != "pending":
            raise
        return None
