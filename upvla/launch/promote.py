"""Moving the champion's alias, so that one of two who promote at once wins and the other is told.

MLflow sets an alias atomically, but not conditionally. The condition is an entry in the store, created only if its
number is free; the alias follows from it. An entry whose alias was never set (its writer died) is carried out by
whoever comes next.
"""

from __future__ import annotations

import time
from typing import Any

from upvla.errors import AlreadyExists, Mismatch, NotFound
from upvla.store import Store
from upvla.tracking import CHAMPION, PROTOCOL, Registry
from upvla.types import ModelVersion


def promote(
    store: Store, registry: Registry, name: str, to: str, *, expected: str | None, because: str
) -> dict[str, Any]:
    """Make version `to` the champion of `name`; the entry of the log that says so.

    expected: version that `to` was compared with, None where there was no champion. Raises `Mismatch` if another
    version is champion by now, or if `to` was never evaluated; `NotFound` if there is no such version. Promoting the
    champion again changes nothing.
    """
    log = store.sub(f"registry/{name}/promotions")
    newest = _newest(log)
    if newest and not log.exists(f"{newest:06d}.done"):
        _carry_out(log, registry, name)
    champion = registry.by_alias(name, CHAMPION)
    found = champion.version if champion else None
    if found == to:
        return {"from": to, "to": to, "because": "it is the champion already"}
    if found != expected:
        raise Mismatch(
            f"{name}: the champion is version {found} by now, {to} was compared with {expected}: compare again"
        )
    _require_evaluated(registry, name, to)
    entry = {"from": found, "to": to, "because": because, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        log.create_json(f"{newest + 1:06d}.json", entry)
    except AlreadyExists as error:
        raise Mismatch(f"{name}: another promotion was faster: compare {to} with the new champion") from error
    _carry_out(log, registry, name)
    return entry


def history(store: Store, name: str) -> list[dict[str, Any]]:
    """Every promotion, oldest first."""
    log = store.sub(f"registry/{name}/promotions")
    return [log.read_json(key) for key in sorted(log.list()) if key.endswith(".json")]


def _newest(log: Store) -> int:
    """Number of the newest entry, 0 where there is none."""
    return max((int(key.removesuffix(".json")) for key in log.list() if key.endswith(".json")), default=0)


def _carry_out(log: Store, registry: Registry, name: str) -> None:
    """Point the alias at what the newest entry names; whoever is overtaken meanwhile puts it right again."""
    carried = 0
    while (newest := _newest(log)) > carried:
        registry.set_alias(name, CHAMPION, log.read_json(f"{newest:06d}.json")["to"])
        log.write(f"{newest:06d}.done", b"")
        carried = newest


def _require_evaluated(registry: Registry, name: str, to: str) -> None:
    versions: dict[str, ModelVersion] = {version.version: version for version in registry.versions(name)}
    if to not in versions:
        raise NotFound(f"{name} has no version {to}; versions: {', '.join(versions) or 'none'}")
    if not any(tag.startswith(PROTOCOL) for tag in versions[to].tags):
        raise Mismatch(f"{name} version {to} was never evaluated: `upvla evaluate {name}@{to}` first")
