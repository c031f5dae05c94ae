"""The ledger of finished steps: an orchestrator may run a step twice, the ledger makes the second time a no-op."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from upvla.errors import AlreadyExists, AlreadyOwned, NotFound
from upvla.launch.lease import Lease
from upvla.store import Store, content_hash

log = logging.getLogger(__name__)

_LOOK_S = 0.5  # between two looks whether it is our turn


def once(
    store: Store, stage: str, key_value: Any, fn: Callable[[], Mapping[str, Any]], *, in_turn: bool = False
) -> dict[str, Any]:
    """Result of `fn()` under the content key of `key_value`: run at most once to success, then read back.

    `key_value` is whatever decides the result (configs, content ids), as JSON; `fn` returns references (JSON), never
    data. A failing `fn` leaves no result. If two callers run `fn` at once the first to finish wins and both return its
    result; `in_turn`, the second waits for the first and runs `fn` only where that failed or died. `seconds`, how long
    the run that counts took, is added to the result.
    """
    if (known := finished(store, stage, key_value)) is not None:
        return known
    if in_turn:
        with turn(store, stage, key_value):
            return once(store, stage, key_value, fn)
    began = time.monotonic()
    result = dict(fn()) | {"seconds": round(time.monotonic() - began, 3)}
    key = step_key(stage, key_value)
    try:
        store.create_json(key, {"stage": stage, "key": key_value, "result": result})
    except AlreadyExists:
        return store.read_json(key)["result"]
    return result


@contextmanager
def turn(store: Store, stage: str, key_value: Any) -> Iterator[None]:
    """One process at a time is inside; the others wait until it leaves, or, where it was killed, is surely gone."""
    lease = store.sub(step_key(stage, key_value).removesuffix(".json"))
    with ExitStack() as held:
        for wait in itertools.count():
            try:
                held.enter_context(Lease(lease, f"stage {stage}"))
                break
            except AlreadyOwned as error:
                log.log(logging.DEBUG if wait else logging.WARNING, "%s; waiting for it", error)
                time.sleep(_LOOK_S)
        yield


def finished(store: Store, stage: str, key_value: Any) -> dict[str, Any] | None:
    """The recorded result, or None when the step has not finished yet."""
    try:
        return store.read_json(step_key(stage, key_value))["result"]
    except NotFound:
        return None


def step_key(stage: str, key_value: Any) -> str:
    return f"steps/{stage}/{content_hash(key_value)}.json"
