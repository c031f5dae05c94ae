"""Mixture positions -> this rank's batches, fetched and decoded by threads ahead of time, in an order that is nobody's
state.

Global batch k is the positions [k * G, (k + 1) * G); rank r of W takes those with position % W == r. So the same global
batches come in the same order for any world size, number of threads and micro-batch, and resuming needs one integer.
Threads suffice because decoding and resizing release the interpreter lock; one more fetches row groups before the
decoders need them, so that a store far away costs latency once. It does no more than that: what it does in Python,
the decoders wait for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from upvla.data.mixture import Mixture
from upvla.data.samples import Fetched, SampleReader
from upvla.errors import ConfigError
from upvla.images import use_one_thread
from upvla.types import Sample

_Batch = TypeVar("_Batch")


class Loader(Generic[_Batch]):
    """Endless iterator over this rank's micro-batches of each global step, `list[Batch]`.

    `step` counts the global batches handed out; it is the whole state. Memory is bounded by `prefetch_steps`. An
    unreadable sample raises at its own step. `data_wait_s` is how long the consumer stood waiting.
    """

    def __init__(
        self,
        mixture: Mixture,
        reader: SampleReader,
        collate: Callable[[Sequence[Sample]], _Batch],
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        start_step: int = 0,
        threads: int = 2,
        prefetch_steps: int = 1,
    ):
        rows, rest = divmod(mixture.plan.global_batch, world_size)
        if rest or rows % micro_batch:
            raise ConfigError(
                f"a global batch of {mixture.plan.global_batch} rows cannot be dealt to {world_size} ranks in "
                f"micro-batches of {micro_batch}; world_size * micro_batch must divide it"
            )
        if mixture.plan.lanes % world_size:
            fitting = [n for n in range(1, mixture.plan.lanes + 1) if mixture.plan.lanes % n == 0]
            raise ConfigError(
                f"a world of {world_size} ranks does not divide the mixture's {mixture.plan.lanes} lanes; use one of "
                f"{fitting} ranks, or make a mixture with other lanes"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of a world of {world_size}")
        self._mixture, self._reader, self._collate = mixture, reader, collate
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch
        self._threads, self._prefetch_steps = threads, prefetch_steps
        self._decoders: ThreadPoolExecutor | None = None
        self._fetcher: ThreadPoolExecutor | None = None
        self._memory = _Memory()
        self._ahead: deque[list[Future[_Batch]]] = deque()
        self.step = start_step
        self.data_wait_s = 0.0

    def positions(self, step: int) -> list[range]:
        """This rank's mixture positions of one global step, a range a micro-batch."""
        size, stride = self._mixture.plan.global_batch, self._world_size
        first = step * size + self._rank  # the world size divides a global batch
        span = self._micro_batch * stride
        return [range(start, start + span, stride) for start in range(first, (step + 1) * size, span)]

    def __iter__(self) -> Iterator[list[_Batch]]:
        return self

    def __next__(self) -> list[_Batch]:
        if self._decoders is None or self._fetcher is None:
            use_one_thread()
            self._decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="upvla-loader")
            self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="upvla-loader-fetch")
        while len(self._ahead) <= self._prefetch_steps:
            fetched = [self._fetcher.submit(self._fetch, p) for p in self.positions(self.step + len(self._ahead))]
            self._ahead.append([self._decoders.submit(self._load, rows) for rows in fetched])
        started = time.perf_counter()
        due = self._ahead.popleft()
        self.step += 1  # also where a sample cannot be read: who goes on goes on with the next step
        batches = [future.result() for future in due]
        self.data_wait_s += time.perf_counter() - started
        return batches

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `step` global batches, whoever consumed them, at whatever world size."""
        self._forget()
        self.step = int(state["step"])

    def close(self) -> None:
        self._forget()
        for pool in (self._fetcher, self._decoders):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._fetcher = self._decoders = None

    def __enter__(self) -> Loader[_Batch]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fetch(self, positions: range) -> list[Fetched]:
        return [self._reader.fetch(self._mixture.sample_at(position), position) for position in positions]

    def _load(self, fetched: Future[list[Fetched]]) -> _Batch:
        return self._collate(self._reader.decode_rows(fetched.result(), self._memory.take))

    def _forget(self) -> None:
        for futures in self._ahead:
            for future in futures:
                future.cancel()
        self._ahead.clear()


class _Memory:
    """Memory of batches that is used again once nobody refers to it: a fresh 25 MB a batch costs 6,000 page faults."""

    _KEPT = 16
    _FREE = 3  # references to an array that only this pool has: the list's, the loop's, the counter's argument

    def __init__(self) -> None:
        self._lock, self._arrays = threading.Lock(), list[np.ndarray]()

    def take(self, size: int) -> np.ndarray:
        """u8[size], of no particular content."""
        with self._lock:
            for array in self._arrays:
                if len(array) >= size and sys.getrefcount(array) == self._FREE:
                    return array[:size]
            self._arrays = [*self._arrays[-self._KEPT + 1 :], np.empty(size, np.uint8)]
            return self._arrays[-1][:]
