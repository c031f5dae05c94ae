"""Chains spread over processes on Ray: simulators side by side, the policy in each of them or in one that all ask.

Every process says every second what it has finished and whether anything moves in it. One that dies, hangs or stops
answering is killed; the chains that it held are judged again, one at a time in a new process, so that the one that is
to blame is found. When two processes were lost that judged nothing else, its record says so; no other chain is touched.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError

from upvla.errors import JobFailed, SimulatorError
from upvla.launch.simulators import REPORT_S, Model, Numbered, Report, SharedPolicy, Simulators
from upvla.rollout.benchmarks import is_checkpoint
from upvla.rollout.evaluate import Layout
from upvla.rollout.judge import Cost, SuiteJudge
from upvla.sim.suite import Suite
from upvla.types import Chain, ChainRecord

_STOP_S = 10.0
_STILLBORN = 3  # processes in a row
_AHEAD = 1  # chains that a process has waiting beside those that it plays

Keep = Callable[[Sequence[ChainRecord]], None]


def judge_chains(
    judge: SuiteJudge,
    chains: Sequence[Numbered],
    num_workers: int,
    layout: Layout,
    keep: Keep,
    *,
    use_gpu: bool = False,
) -> Cost:
    """One evaluation by a `Crew` of its own. Ray must be connected."""
    with Crew(judge.suite, min(num_workers, len(chains)), layout, judge.slots, use_gpu=use_gpu) as crew:
        return crew.judge(judge, chains, keep)


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

    def begin(self, judge: SuiteJudge) -> None:
        self.cost, self.heard = Cost(), self.heard and time.monotonic()
        self.running = self.actor.run.remote(judge)
        self.report = self.actor.report.remote()

    def give(self, given: Numbered) -> None:
        self.held[given[0]] = given[1]
        self.actor.feed.remote(given)


class Crew:
    """Processes that judge policies on a suite, one policy after the other: they start once. Ray must be connected.

    with Crew(suite, 2, layout, slots) as crew:
        crew.prepare(url)  # the model loads while we do something else
        cost = crew.judge(judge, chains, keep)
    """

    def __init__(self, suite: Suite, num_workers: int, layout: Layout, slots: int, *, use_gpu: bool = False) -> None:
        self._suite, self._layout, self._slots, self._use_gpu = suite, layout, slots, use_gpu
        self._num_workers = num_workers
        self._model: tuple[str, Any] | None = None  # where one process has the policy
        self._members: list[_Member] = []
        self._todo: deque[Numbered] = deque()
        self._suspects: deque[Numbered] = deque()
        self._cost, self._stillborn = Cost(), 0
        self._blamed: Counter[int] = Counter()  # chains, by the processes that were lost alone with them
        self._judge: SuiteJudge

    def __enter__(self) -> Self:
        self._man()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._dismiss()

    def prepare(self, policy: str) -> None:
        """Begin to load a policy that will be judged, and return. What goes wrong is raised by `judge`."""
        if not is_checkpoint(policy):
            return
        if self._layout.model == "one":
            self._model_of(policy)
            return
        for member in self._members:
            member.actor.prepare.remote(policy)

    def judge(self, judge: SuiteJudge, chains: Sequence[Numbered], keep: Keep) -> Cost:
        """Hands the records of all `chains` to `keep` as they come; what they took.

        Raises what keeps every chain from being judged: a world that cannot open, a policy that cannot be loaded.
        """
        self._todo, self._cost, self._stillborn, self._blamed = deque(chains), Cost(), 0, Counter()
        if not chains:
            return self._cost
        try:
            self._man()
            self._judge = self._asking(judge)
            for member in self._members:
                member.begin(self._judge)
                if member.heard:
                    self._feed(member)  # others when they stand: a cluster may never have room for them
            while self._todo or any(member.held for member in self._members) or self._suspects:
                reports = [member.report for member in self._members]
                ray.wait(reports, timeout=REPORT_S)
                ready, _ = ray.wait(reports, num_returns=len(reports), timeout=0)
                for member in list(self._members):
                    why = self._listen(member, keep) if member.report in ready else self._silent(member)
                    if why:
                        keep(self._replace(member, why))
            self._let_go()
        except BaseException:
            self._dismiss()
            raise
        return self._cost

    def _man(self) -> None:
        self._members += [self._start() for _ in range(self._num_workers - len(self._members))]

    def _start(self, alone: bool = False) -> _Member:
        options = {"num_cpus": 1, "max_concurrency": 4}
        return _Member(ray.remote(Simulators).options(**options).remote(self._suite, self._slots), alone)

    def _asking(self, judge: SuiteJudge) -> SuiteJudge:
        """The judge, asking the model of another process where one has it."""
        if self._layout.model == "each" or not isinstance(judge.policy, str) or not is_checkpoint(judge.policy):
            return judge
        model = self._model_of(judge.policy)
        try:
            ray.get(model.ready.remote())
        except RayActorError as error:
            raise JobFailed(f"the process that holds {judge.policy} cannot start: {error}") from error
        return replace(judge, policy=SharedPolicy(judge.policy, judge.suite.action_space, model))

    def _model_of(self, policy: str) -> Any:
        """It answers the same question the same way, so Ray may start it again and repeat what was asked."""
        if self._model and self._model[0] != policy:
            ray.kill(self._model[1])
            self._model = None
        if not self._model:
            gpus = 1 if self._use_gpu else 0
            actor: Any = ray.remote(Model)
            actor = actor.options(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)
            self._model = policy, actor.remote(policy, self._suite, self._slots, "cuda" if self._use_gpu else "cpu")
        return self._model[1]

    def _listen(self, member: _Member, keep: Keep) -> str:
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
        left = len(self._todo) + sum(len(each.held) for each in self._members)
        share = -(-left // len(self._members))  # of the last chains, nobody gets more than another
        while not member.alone and self._todo and len(member.held) < min(share, self._judge.lanes + _AHEAD):
            member.give(self._todo.popleft())

    def _replace(self, member: _Member, why: str) -> list[ChainRecord]:
        """Kill it and start another for what it held; the record of the chain that two judged alone and were lost."""
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
        alone = member.held if member.alone and len(member.held) == 1 else {}
        self._blamed.update(alone.keys())
        guilty = [each for each in alone.items() if self._blamed[each[0]] == 2]
        for number, chain in guilty:
            error = f"{SimulatorError.__name__}: the process that judged it {why}, twice"
            condemned.append(ChainRecord(number, chain.scene, chain.tasks, 0, (0,), error, "error"))
        self._suspects.extend(each for each in member.held.items() if each not in guilty)
        self._members.append(self._start(alone=True))
        self._members[-1].begin(self._judge)
        return condemned

    def _let_go(self) -> None:
        """Let every process close its worlds, which may have processes of their own; who does not makes room."""
        for member in self._members:
            member.actor.feed.remote(None)
        ended = [each for member in self._members if member.heard for each in (member.running, member.report)]
        ready, _ = ray.wait(ended, num_returns=len(ended), timeout=_STOP_S)
        for member in list(self._members):
            self._cost += member.cost
            if not {member.running, member.report} <= set(ready):
                ray.kill(member.actor)
                self._members.remove(member)

    def _dismiss(self) -> None:
        for actor in (*(member.actor for member in self._members), *(self._model or ())[1:]):
            ray.kill(actor)
        self._members.clear()
        self._suspects.clear()
        self._model = None
