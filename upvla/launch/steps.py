"""The ledger of finished steps: an orchestrator may run a step twice, the ledger makes the second time a no-op."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from upvla.errors import AlreadyExists, NotFound
from upvla.store import Store, content_hash


def once(store: Store, stage: str, key_value: Any, fn: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Result of `fn()` under the content key of `key_value`: run at most once to success, then read back.

    `key_value` is whatever decides the result (configs, content ids), as JSON; `fn` returns references (JSON), never
    data. A failing `fn` leaves no trace. If two callers run `fn` at once the first to finish wins and both return its
    result. `seconds`, how long the run that counts took, is added to the result.
    """
    key = step_key(stage, key_value)
    try:
        return store.read_json(key)["result"]
    except NotFound:
        pass
    began = time.monotonic()
    result = dict(fn()) | {"seconds": round(time.monotonic() - began, 3)}
    try:
        store.create_json(key, {"stage": stage, "key": key_value, "result": result})
    except AlreadyExists:
        return store.read_json(key)["result"]
    return result


def finished(store: Store, stage: str, key_value: Any) -> dict[str, Any] | None:
    """The recorded result, or None when the step has not finished yet."""
    try:
        return store.read_json(step_key(stage, key_value))["result"]
    except NotFound:
        return None


def step_key(stage: str, key_value: Any) -> str:
    return f"steps/{stage}/{content_hash(key_value)}.json"
