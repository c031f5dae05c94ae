"""The one thread that runs a served model, and the line of requests before it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from upvla.errors import Mismatch, NoAnswer
from upvla.rollout import wire
from upvla.rollout.play import Answer, Ask, BatchPolicy, answers
from upvla.types import Policy, Prediction

_TOGETHER = 16  # requests that are answered in one batch


@dataclass(frozen=True)
class Served:
    """A model that is loaded: the policy, and what a caller must know of it."""

    policy: Policy | BatchPolicy
    model_id: str
    version: str  # in the registry; empty for a checkpoint by URL
    cameras: tuple[str, ...]
    stats_id: str = ""

    def greeting(self) -> dict[str, Any]:
        return {
            "format": wire.FORMAT,
            "model_id": self.model_id,
            "version": self.version,
            "stats_id": self.stats_id,
            "cameras": list(self.cameras),
            "action_space": self.policy.action_space.to_json(),
        }


Load = Callable[[str], Served | None]
"""The model to serve now; None where it is still the one of the given model id."""


@dataclass(eq=False)
class Session:
    served: Served
    memory: dict[str, Any] = field(default_factory=dict)
    begun: bool = False


class Asked:
    """One observation on its way through the line of those that wait."""

    def __init__(self, session: Session, ask: Ask, deadline_s: float) -> None:
        self.session, self.ask = session, ask
        self.came = time.monotonic()
        self.expires = self.came + deadline_s
        self.taken = 0.0
        self.done: Future[Prediction] = Future()


class Predictor:
    """Runs the model. Requests that wait together for one model are answered together."""

    def __init__(self) -> None:
        self._line: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def submit(self, request: Asked) -> None:
        self._line.put(request)

    def close(self) -> None:
        self._line.put(None)
        self._thread.join(5.0)

    def _run(self) -> None:
        while (first := self._line.get()) is not None:
            waiting = [first]
            while len(waiting) < _TOGETHER and not self._line.empty():
                if (more := self._line.get()) is None:
                    return
                waiting.append(more)
            for served in {id(r.session.served): r.session.served for r in waiting}.values():
                answer, lanes = answers(served.policy)
                same = [r for r in waiting if r.session.served is served]
                for i in range(0, len(same), lanes or len(same)):
                    _answer(answer, same[i : i + (lanes or len(same))])


def _answer(answer: Answer, requests: Sequence[Asked]) -> None:
    """Give each its prediction or its error; whoever waited past the deadline is not asked about any more."""
    now = time.monotonic()
    due = []
    for request in requests:
        request.taken = now
        if not request.done.set_running_or_notify_cancel():
            continue  # nobody waits for it any more
        if now > request.expires:
            request.done.set_exception(
                NoAnswer("deadline", f"waited {1000 * (now - request.came):.0f} ms for its turn")
            )
        else:
            due.append(request)
    try:
        replies = list(answer([request.ask for request in due])) if due else []
        if len(replies) != len(due):
            raise Mismatch(f"policy: {len(due)} observations, {len(replies)} answers")
    except Exception as error:
        replies = [error for _ in due]
    for request, reply in zip(due, replies, strict=True):
        if isinstance(reply, Exception):
            request.done.set_exception(reply)
        else:
            request.done.set_result(reply)
