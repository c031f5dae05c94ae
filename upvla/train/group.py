"""What the workers of a process group say to each other beside the engine's own traffic. Everything is collective."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from upvla.errors import UpvlaError

T = TypeVar("T")

Failure = (UpvlaError, OSError)
"""What one worker tells the others instead of leaving them waiting; anything else is a bug and ends its process."""

_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.5


def gather(value: T, group: Any = None) -> list[T]:
    """Every worker's `value` in rank order, on every worker (small Python objects; also a barrier)."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def agree(work: Callable[[], T], group: Any = None) -> list[T]:
    """Run `work` on every worker; results in rank order. If it failed anywhere, all raise the first failure."""
    mine: tuple[Any, Exception | None]
    try:
        mine = (work(), None)
    except Failure as error:
        mine = (None, error)
    answers: list[tuple[Any, Exception | None]] = gather(mine, group)
    for _, failure in answers:
        if failure is not None:
            raise failure
    return [value for value, _ in answers]


def together(work: Callable[[], T]) -> list[T]:
    """`agree` for work that may take minutes on one worker while the others have nothing to do.

    The workers keep talking meanwhile, so the group's time-out stays what it is for: a worker that is stopped or gone
    is noticed as fast here as between two steps.
    """
    done: list[Callable[[], T]] = []

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            done.append(_raising(error))
        else:
            done.append(lambda: value)

    threading.Thread(target=run, name="upvla-together", daemon=True).start()
    pause = _PAUSE_S
    while not all(gather(bool(done))):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return agree(done[0])


def wait_at_most(timeout_s: float, *groups: Any) -> None:
    """From now on this worker gives up one that does not answer for so long, among all workers and in `groups`."""
    for each in (torch.distributed.group.WORLD, *groups):
        each.set_timeout(datetime.timedelta(seconds=timeout_s))


def side_group(timeout_s: float) -> Any:
    """A group of the same workers over gloo with a time-out of its own: for what a thread does beside training."""
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def _raising(error: BaseException) -> Callable[[], Any]:
    def reraise() -> Any:
        raise error

    return reraise
