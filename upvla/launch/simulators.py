"""What runs in an evaluation's other processes: simulators that judge chains, and a model that many of them ask."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import RayTaskError

from upvla.rollout.benchmarks import is_checkpoint
from upvla.rollout.judge import Cost, SuiteJudge, load_alone, one_thread
from upvla.rollout.play import Ask, BatchPolicy
from upvla.sim.suite import Suite
from upvla.types import ActionSpace, Chain, ChainRecord, Prediction

REPORT_S = 1.0

Numbered = tuple[int, Chain]


class Report(NamedTuple):
    """What a process of simulators says of itself. `still_s`: for how long nothing moved while chains are played."""

    records: list[ChainRecord]
    cost: Cost
    still_s: float
    failure: Exception | None


class Simulators:
    """`run` keeps one thread for an evaluation, as a GL context belongs to a thread; the rest answer from others."""

    def __init__(self, suite: Suite, slots: int) -> None:
        self._suite, self._slots = suite, slots
        self._judge: SuiteJudge | None = None
        self._loading, self._loaded = threading.Lock(), ("", cast(BatchPolicy | None, None))
        self._given: queue.SimpleQueue[Numbered | None] = queue.SimpleQueue()
        self._found: list[ChainRecord] = []
        self._failure: Exception | None = None
        self._ended = self._stands = False
        self._news = threading.Condition()
        self._seen, self._moved = (0, 0), time.monotonic()

    def prepare(self, policy: str) -> None:
        """Load what `run` will need; if that fails, it fails again there."""
        with contextlib.suppress(Exception):
            self._load(policy)

    def run(self, judge: SuiteJudge) -> None:
        """Judges what it is fed, until that is None."""
        self._ended = False
        try:
            if isinstance(judge.policy, str) and is_checkpoint(judge.policy):
                judge = replace(judge, policy=self._load(judge.policy))
            with self._news:
                self._judge, self._seen, self._moved = judge, (0, 0), time.monotonic()
            for record in judge.run(self._chains(judge)):
                with self._news:
                    self._found.append(record)
                    self._news.notify()
        except Exception as error:
            self._failure = error
        with self._news:
            self._ended = True
            self._news.notify()

    def _load(self, policy: str) -> BatchPolicy:
        with self._loading:
            if self._loaded[0] != policy:
                self._loaded = "", None  # one at a time: they may be large
                self._loaded = policy, cast(BatchPolicy, load_alone(policy, self._suite, self._slots))
            one_thread()  # which torch keeps for each thread that calls it
            return cast(BatchPolicy, self._loaded[1])

    def _chains(self, judge: SuiteJudge) -> Iterator[Numbered | None]:
        """What was fed, until None was; None where nothing waits while worlds are busy."""
        while True:
            try:
                given = self._given.get(block=judge.busy == 0)
            except queue.Empty:
                yield None
                continue
            if given is None:
                return
            yield given

    def feed(self, given: Numbered | None) -> None:
        self._given.put(given)

    def report(self) -> Report:
        """Returns when there is news, or after a second. The first time, that it stands is the news."""
        with self._news:
            self._news.wait_for(lambda: self._found or self._failure or self._ended or not self._stands, REPORT_S)
            found, self._found, self._stands = self._found, [], True
            if self._judge is None:  # the policy is being loaded
                return Report(found, Cost(), 0.0, self._failure)
            cost, now = replace(self._judge.cost), time.monotonic()
            moved = (cost.env_steps, cost.chunks) != self._seen
            if found or moved or not self._judge.playing:
                self._seen, self._moved = (cost.env_steps, cost.chunks), now
            return Report(found, cost, now - self._moved, self._failure)


class Model:
    """The one process that has the policy."""

    def __init__(self, policy: str, suite: Suite, slots: int, device: str) -> None:
        self._policy = cast(BatchPolicy, load_alone(policy, suite, slots, device))

    def ready(self) -> None:
        """Returns once the policy is loaded."""

    def act_many(self, asks: Sequence[Ask]) -> list[tuple[Prediction, dict[str, Any]]]:
        """Answers, and what is to be remembered."""
        return list(zip(self._policy.act_many(asks), (ask.memory for ask in asks), strict=True))


class SharedPolicy:
    """The policy of another process, for as many worlds as ask."""

    def __init__(self, name: str, action_space: ActionSpace, model: Any) -> None:
        self.name, self.action_space, self._model = name, action_space, model

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        try:
            replies = ray.get(self._model.act_many.remote(list(asks)))
        except RayTaskError as error:
            raise error.cause or error from None
        for ask, (_, memory) in zip(asks, replies, strict=True):
            ask.memory.update(memory)
        return [prediction for prediction, _ in replies]
