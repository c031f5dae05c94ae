"""Chains spread over processes on Ray: simulators side by side, the policy in each of them or in one that all ask.

Every process says every second what it has finished and whether anything moves in it. One that dies, hangs or stops
answering is killed; the chains that it held are judged again, one at a time in a new process, so that the one that is
to blame is found. If that happens to it a second time, its record says so, and no other chain is touched.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from upvla.errors import JobFailed, SimulatorError
from upvla.rollout.benchmarks import BLIND, SERVED, load_policy
from upvla.rollout.evaluate import Layout
from upvla.rollout.judge import Cost, SuiteJudge
from upvla.rollout.play import Ask, BatchPolicy
from upvla.sim.suite import Suite
from upvla.types import ActionSpace, Chain, ChainRecord, Prediction

_REPORT_S = 1.0
_STOP_S = 10.0
_STILLBORN = 3  # processes in a row
_AHEAD = 1  # chains that a process has waiting beside those that it plays

Numbered = tuple[int, Chain]


def judge_chains(
    judge: SuiteJudge,
    chains: Sequence[Numbered],
    num_workers: int,
    layout: Layout,
    keep: Callable[[Sequence[ChainRecord]], None],
    *,
    use_gpu: bool = False,
) -> Cost:
    """Hands the records of all `chains` to `keep` as they come; what they took. Ray must be connected.

    Raises what keeps every chain from being judged: a world that cannot open, a policy that cannot be loaded.
    """
    return _Crew(judge, deque(chains), num_workers, layout, use_gpu).run(keep) if chains else Cost()


# ---------------------------------------------------------------------------------------------------- the driver's side


@dataclass
class _Member:
    """One process of simulators, as the driver sees it."""

    actor: Any
    alone: bool  # it judges one suspect at a time
    report: Any = None
    running: Any = None
    held: dict[int, Chain] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    heard: float | None = None  # when it spoke last; a process that has not started yet may take its time

    def give(self, given: Numbered) -> None:
        self.held[given[0]] = given[1]
        self.actor.feed.remote(given)


class _Crew:
    def __init__(
        self, judge: SuiteJudge, todo: deque[Numbered], num_workers: int, layout: Layout, use_gpu: bool
    ) -> None:
        self._todo, self._layout = todo, layout
        self._suspects: deque[Numbered] = deque()
        self._cost = Cost()
        self._model = None
        self._stillborn = 0
        if layout.model == "one" and isinstance(judge.policy, str) and _is_loaded(judge.policy):
            self._model = _start_model(judge, judge.policy, use_gpu)
            judge = replace(judge, policy=SharedPolicy(judge.policy, judge.suite.action_space, self._model))
        self._judge = judge
        self._members = [self._start() for _ in range(min(num_workers, len(todo)))]

    def run(self, keep: Callable[[Sequence[ChainRecord]], None]) -> Cost:
        try:
            while self._todo or self._suspects or any(member.held for member in self._members):
                reports = [member.report for member in self._members]
                ray.wait(reports, timeout=_REPORT_S)
                ready, _ = ray.wait(reports, num_returns=len(reports), timeout=0)
                for member in list(self._members):
                    why = self._listen(member, keep) if member.report in ready else self._silent(member)
                    if why:
                        keep(self._replace(member, why))
            self._let_go()
        finally:
            for actor in (*(member.actor for member in self._members), *([self._model] if self._model else [])):
                ray.kill(actor)
        return reduce(add, (member.cost for member in self._members), self._cost)

    def _listen(self, member: _Member, keep: Callable[[Sequence[ChainRecord]], None]) -> str:
        """Take in what a process says, and feed it; why it is lost, or nothing."""
        try:
            said: Report = ray.get(member.report)
        except RayActorError as error:
            return f"died ({str(error).splitlines()[0]})" if member.heard is None else "died"
        if said.failure is not None:
            raise said.failure
        member.heard, member.cost = time.monotonic(), said.cost
        if said.records:
            self._stillborn = 0
        for record in said.records:
            member.held.pop(record.number, None)
        keep(said.records)
        if said.still_s > self._layout.patience_s:
            return f"did not move for {said.still_s:.0f} s"
        self._feed(member)
        member.report = member.actor.report.remote()
        return ""

    def _silent(self, member: _Member) -> str:
        waited = 0.0 if member.heard is None else time.monotonic() - member.heard
        return f"did not answer for {waited:.0f} s" if waited > self._layout.patience_s else ""

    def _feed(self, member: _Member) -> None:
        if member.alone:
            if not member.held and self._suspects:
                member.give(self._suspects.popleft())
            member.alone = bool(member.held or self._suspects)
        while not member.alone and self._todo and len(member.held) < self._judge.lanes + _AHEAD:
            member.give(self._todo.popleft())

    def _replace(self, member: _Member, why: str) -> list[ChainRecord]:
        """Kill it and start another for what it held; the record of a chain that was alone with it both times."""
        ray.kill(member.actor)
        self._members.remove(member)
        self._cost += member.cost
        condemned = []
        self._stillborn = 0 if member.held else self._stillborn + 1
        if self._stillborn > _STILLBORN:
            raise JobFailed(
                f"simulators of {self._judge.suite.name}: their processes judge nothing; the last {why}. "
                "Do the cluster's workers run this code? RAY_ADDRESS=local starts a cluster of your own"
            )
        if member.alone and len(member.held) == 1:
            ((number, chain),) = member.held.items()
            error = f"{SimulatorError.__name__}: the process that judged it {why}, twice"
            condemned.append(ChainRecord(number, chain.scene, chain.tasks, 0, (0,), error, "error"))
        else:
            self._suspects.extend(member.held.items())
        self._members.append(self._start(alone=True))
        return condemned

    def _start(self, alone: bool = False) -> _Member:
        member = _Member(ray.remote(_Simulators).options(num_cpus=1, max_concurrency=3).remote(self._judge), alone)
        member.running = member.actor.run.remote()
        member.report = member.actor.report.remote()
        return member

    def _let_go(self) -> None:
        """Let every process close its worlds, which may have processes of their own."""
        for member in self._members:
            member.actor.feed.remote(None)
        ray.wait([member.running for member in self._members], num_returns=len(self._members), timeout=_STOP_S)


def _is_loaded(policy: str) -> bool:
    """Whether the policy is a model that some process of ours must have."""
    return policy not in BLIND and not policy.startswith(SERVED)


def _start_model(judge: SuiteJudge, policy: str, use_gpu: bool) -> Any:
    """It answers the same question the same way, so Ray may start it again and repeat what was asked."""
    options = {"num_cpus": 0, "num_gpus": 1 if use_gpu else 0, "max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(_Model)
    model = actor.options(**options).remote(policy, judge.suite, judge.slots, "cuda" if use_gpu else "cpu")
    try:
        ray.get(model.ready.remote())
    except RayActorError as error:
        raise JobFailed(f"the process that holds {policy} cannot start: {error}") from error
    return model


# ------------------------------------------------------------------------------------------------ in other processes


class Report(NamedTuple):
    """What a process of simulators says of itself. `still_s`: for how long nothing moved while chains are played."""

    records: list[ChainRecord]
    cost: Cost
    still_s: float
    failure: Exception | None


class _Simulators:
    """`run` keeps one thread for its whole life, as a GL context belongs to a thread; the rest answer from others."""

    def __init__(self, judge: SuiteJudge) -> None:
        self._judge = judge
        self._given: queue.SimpleQueue[Numbered | None] = queue.SimpleQueue()
        self._found: list[ChainRecord] = []
        self._failure: Exception | None = None
        self._news = threading.Condition()
        self._seen, self._moved = (0, 0), time.monotonic()

    def run(self) -> None:
        try:
            for record in self._judge.run(self._chains()):
                with self._news:
                    self._found.append(record)
                    self._news.notify()
        except Exception as error:
            with self._news:
                self._failure = error
                self._news.notify()

    def _chains(self) -> Iterator[Numbered | None]:
        """What was fed, until None was; None where nothing waits while worlds are busy."""
        while True:
            try:
                given = self._given.get(block=self._judge.busy == 0)
            except queue.Empty:
                yield None
                continue
            if given is None:
                return
            yield given

    def feed(self, given: Numbered | None) -> None:
        self._given.put(given)

    def report(self) -> Report:
        """Returns when there is news, or after a second."""
        with self._news:
            self._news.wait_for(lambda: self._found or self._failure, _REPORT_S)
            found, self._found = self._found, []
            cost, now = replace(self._judge.cost), time.monotonic()
            moved = (cost.env_steps, cost.chunks) != self._seen
            if found or moved or not self._judge.playing:
                self._seen, self._moved = (cost.env_steps, cost.chunks), now
            return Report(found, cost, now - self._moved, self._failure)


class _Model:
    """The one process that has the policy."""

    def __init__(self, policy: str, suite: Suite, slots: int, device: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._policy = cast(BatchPolicy, load_policy(policy, suite, slots=slots, device=device))

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
