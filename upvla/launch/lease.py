"""One owner at a time for a key on a Store: a fencing token, without a clock that two machines would have to share.

    <store>/owner-000003.json     who took the key as number 3: created once, so one of many takers gets it
    <store>/beat-000003.json      a counter that the owner of number 3 keeps raising

The owner is whoever made the highest number. It is alive while its counter moves: who wants the key watches the counter
on a watch of its own, or, on the owner's own machine, looks whether its process is still there. Before anything is
committed the owner asks whether its number is still the highest: one that was stopped, and taken over, finds out there.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from upvla.errors import AlreadyExists, AlreadyOwned, NotFound, StoreError
from upvla.store import Store

log = logging.getLogger(__name__)

_BEAT_S = 5.0
_DEAD_AFTER_S = 30.0


class Lease:
    """`with Lease(store, what):` owns the key inside, or raises `AlreadyOwned` on entering.

    Entering takes as long as it takes to be sure that the last owner is gone: nothing when it has left in good order or
    was a process of this machine, `dead_after_s` otherwise.
    """

    def __init__(
        self, store: Store, what: str, *, beat_s: float = _BEAT_S, dead_after_s: float = _DEAD_AFTER_S
    ) -> None:
        self._store, self._what = store, what
        self._beat_s, self._dead_after_s = beat_s, dead_after_s
        self._left = threading.Event()
        self._beating: threading.Thread | None = None
        self.number = 0

    def __enter__(self) -> Lease:
        last = newest(self._store)
        if last:
            self._require_gone(last)
        self.number = last + 1
        try:
            self._store.create_json(_owner(self.number), _ourselves())
        except AlreadyExists as error:
            raise self._owned(self.number) from error
        self._beating = threading.Thread(target=self._beat, name="upvla-lease", daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._beating is not None:
            self._beating.join()
        try:
            self._store.write_json(_beat(self.number), {"left": True})
        except StoreError as failure:  # then the next owner waits until we are surely gone
            log.warning("%s was not released: %s", self._what, failure)

    def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._store.write_json(_beat(self.number), {"count": count})
            except StoreError as error:  # the store is away, for others, too
                log.warning("%s: no sign of life could be given (%s)", self._what, error)
            if self._left.wait(self._beat_s):
                return

    def _require_gone(self, number: int) -> None:
        owner = self._read(_owner(number))
        if self._read(_beat(number)).get("left") or _is_dead(owner):
            return
        seen, since = self._read(_beat(number)), time.monotonic()
        while time.monotonic() - since < self._dead_after_s:
            time.sleep(min(1.0, self._beat_s / 4))
            now = self._read(_beat(number))
            if now.get("left"):
                return
            if now != seen:
                raise self._owned(number)
        log.warning("%s: its owner %s gives no sign of life, it is taken over", self._what, _name(owner))

    def _owned(self, number: int) -> AlreadyOwned:
        owner = _name(self._read(_owner(number)))
        return AlreadyOwned(f"{self._what} is already owned by {owner}, which is alive; follow it, or stop it first")

    def _read(self, key: str) -> dict[str, Any]:
        try:
            return dict(self._store.read_json(key))
        except NotFound:
            return {}


def newest(store: Store) -> int:
    """The number of the present owner, 0 when there never was one."""
    return max((int(key.removeprefix("owner-").removesuffix(".json")) for key in store.list("owner-")), default=0)


def require_owner(store: Store, number: int, what: str) -> None:
    """Raise `AlreadyOwned` when somebody has taken the key over since `number` was given out."""
    if (now := newest(store)) != number:
        raise AlreadyOwned(
            f"{what} is already owned by a later trainer (token {now}, ours is {number}): this one was taken for dead; "
            "nothing of it is committed any more, follow the other"
        )


def _owner(number: int) -> str:
    return f"owner-{number:06d}.json"


def _beat(number: int) -> str:
    return f"beat-{number:06d}.json"


def _ourselves() -> dict[str, Any]:
    process = psutil.Process()
    return {"machine": _machine(), "pid": process.pid, "born": process.create_time()}


def _machine() -> str:
    """Of host, boot and process name space: within one, a process number says whether its process lives."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    return " ".join([*known, str(space.stat().st_ino) if space.exists() else ""]).strip()


def _is_dead(owner: dict[str, Any]) -> bool:
    """Only what ran on this very machine can be told for sure."""
    if owner.get("machine") != _machine():
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["born"])
    except psutil.NoSuchProcess:
        return True


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} of {owner['machine'].partition(' ')[0]}" if owner else "somebody"
