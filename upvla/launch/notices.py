"""Why a worker should save and leave before the end: its node is being taken away, an operator asked for it, or there
is room for more workers.

All are looked for on a thread, so that asking between two steps costs nothing; the loop tells the other workers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from ray.exceptions import RayError

from upvla.errors import NotFound, StoreError
from upvla.store import Store

log = logging.getLogger(__name__)

REQUEST = "request.json"
_POLL_S, _ROOM_POLL_S = 2.0, 10.0


def request_stop(place: Store, job_id: str) -> None:
    """Ask the run whose prefix `place` is, in job `job_id`, to save a resume point after its present step and to end.

    It holds from now on: also for a job that has not come to its first step, but for no later one.
    """
    place.write_json(REQUEST, {"reason": "stop", "job": job_id})


class Notices:
    """Inside the context, `reason()` is empty until there is one: `stop`, `grow`, or `preempted` and ids of nodes.

    `settings["ray"]`: whether Ray Train runs us. `room` says whether there is some for more workers; Ray is asked.
    """

    def __init__(self, place: Store, settings: Mapping[str, Any], room: Callable[[], bool] = lambda: False) -> None:
        self._place, self._ray, self._room = place, bool(settings.get("ray")), room
        self._asks_for_room = time.monotonic() + _ROOM_POLL_S
        self._reason = ""
        self._over = threading.Event()

    def reason(self) -> str:
        return self._reason

    def __enter__(self) -> Notices:
        threading.Thread(target=self._watch, name="upvla-notices", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.is_set() and not self._reason:
            try:
                self._reason = self._preempted() or self._requested() or self._grown()
            except StoreError as error:
                log.warning("requests to this run cannot be read (%s)", error)
            except RayError as error:  # also when the group is taken down around us
                log.warning("Ray gives no more notice of preemption (%s)", str(error).partition("\n")[0])
                self._ray = False
            self._over.wait(_POLL_S)

    def _preempted(self) -> str:
        """Every worker asks as often as the others: Ray lets them wait for each other."""
        if not self._ray:
            return ""
        from ray.train import get_preemption_info

        info = get_preemption_info()
        return "" if info is None else " ".join(["preempted", *info.preempted_node_ids])

    def _requested(self) -> str:
        try:
            return str(self._place.read_json(REQUEST)["reason"])
        except NotFound:
            return ""

    def _grown(self) -> str:
        if time.monotonic() < self._asks_for_room:
            return ""
        self._asks_for_room = time.monotonic() + _ROOM_POLL_S
        return "grow" if self._room() else ""
