"""The judge: chains of any suite, a policy in them, a record each. One process, as many worlds side by side as asked.

A chain's record depends on the suite, the policy and the chain, never on lanes, order or neighbours. What the policy or
a world does wrong goes into the record of that chain; only a `ConfigError` (a world that cannot open) ends the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import cv2
import numpy as np

from upvla.errors import SimulatorError
from upvla.rollout.benchmarks import BLIND, SCRIPTED, is_checkpoint, load_policy
from upvla.rollout.evaluate import Control
from upvla.rollout.film import Film
from upvla.rollout.play import Answer, Ask, BatchPolicy, Play, Rules, Script, answers, drive, play
from upvla.sim.suite import Info, Suite, World
from upvla.types import Chain, ChainRecord, Observation, Policy, Prediction

Recorded = tuple[tuple[np.ndarray, ...], ...]
"""Actions f32[T,A] of each task of a chain; a tuple a chain."""

_LOST = SimulatorError.__name__  # how a record's error begins when it says nothing about the policy
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@dataclass
class Cost:
    """What an evaluation took, summed over processes; seconds are the clock's."""

    env_steps: int = 0
    frames: int = 0  # observations with images
    chunks: int = 0
    simulator_s: float = 0.0
    policy_s: float = 0.0  # an expert's thinking too

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def figures(self, seconds: float, cores: int) -> dict[str, float]:
        """Rates; `wall_over_ideal` is 1.0 where `cores` processes did nothing else than simulate and think."""

        def rate(total: float, of: float) -> float:
            return round(total / of, 3) if of else 0.0

        return {
            "env_steps_per_s": rate(self.env_steps, seconds),
            "frames_per_s": rate(self.frames, seconds),
            "policy_ms_per_chunk": rate(1000 * self.policy_s, self.chunks),
            "simulator_ms_per_step": rate(1000 * self.simulator_s, self.env_steps),
            "simulator_ms_per_chunk": rate(1000 * self.simulator_s, self.chunks),
            "simulator_s": round(self.simulator_s, 3),
            "policy_s": round(self.policy_s, 3),
            "seconds": round(seconds, 3),
            "wall_over_ideal": rate(seconds * cores, self.simulator_s + self.policy_s),
        }


class Measured:
    """A world that says what it costs."""

    def __init__(self, world: World, judge: SuiteJudge) -> None:
        self.world, self._judge = world, judge
        self.name, self.action_space = world.name, world.action_space

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self._judge.simulated(self.world.reset, robot_state, scene_state)

    def step(self, action: np.ndarray) -> None:
        self._judge.simulated(self.world.step, action)
        self._judge.cost.env_steps += 1

    def observe(self) -> Observation:
        seen = self._judge.simulated(self.world.observe)
        self._judge.cost.frames += bool(seen.images)
        return seen

    def info(self) -> Info:
        return self._judge.simulated(self.world.info)

    def fingerprint(self) -> Mapping[str, str]:
        return self.world.fingerprint()

    def close(self) -> None:
        self.world.close()


def one_thread() -> None:
    """Let torch work in the calling thread alone: equal threads everywhere, so the same sums in the same order."""
    import torch  # seconds, which only those spend who have a model

    torch.set_num_threads(1)


def load_alone(name: str, suite: Suite, slots: int, device: str = "cpu") -> Policy | BatchPolicy:
    """`load_policy`, and what it loads thinks in one thread."""
    if is_checkpoint(name):
        one_thread()
    return load_policy(name, suite, slots=slots, device=device)


@dataclass
class SuiteJudge:
    """Runs chains in one process: the policy is loaded once, worlds are opened as they are needed and kept.

    `policy`: a name that `load_policy` knows, `expert` or `replay` (which plays `recorded`, by chain index), or a
    policy that answers many worlds. `cost` grows while it runs; `busy` chains are being played.
    """

    suite: Suite
    policy: str | BatchPolicy
    control: Control = field(default_factory=Control)
    lanes: int = 1
    slots: int = 1
    recorded: Recorded = ()
    cost: Cost = field(default_factory=Cost)
    busy: int = field(default=0, repr=False)
    _idle: list[tuple[str, Measured]] = field(default_factory=list, repr=False)
    _open: int = field(default=0, repr=False)
    _opening: bool = field(default=False, repr=False)

    @property
    def playing(self) -> bool:
        """Whether something should be moving: a world that opens takes its time."""
        return self.busy > 0 and not self._opening

    def __call__(self, shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
        return list(self.run(iter(shard)))

    def run(self, chains: Iterator[tuple[int, Chain] | None]) -> Iterator[ChainRecord]:
        """Records as they come. A world that dies is opened again, once, and its chain is judged from its start.

        None among the chains means that there is no more for now; it may come only while some are `busy`.
        """
        answer, lanes = self._answer(self._policy())
        try:
            yield from drive((given and self._lane(*given) for given in chains), answer, lanes)
        finally:
            while self._idle:
                self._drop(self._idle.pop()[1])

    def film(self, number: int, chain: Chain, folder: Path) -> dict[str, Path]:
        """Play one chain and write `chain-<number>.mp4`, and for a predicting policy `chain-<number>-frames.png`."""
        policy = self._policy()
        film = Film(picture=getattr(policy, "picture", None))
        answer, _ = self._answer(policy)
        world = self._opened(chain.scene, cameras=True)
        try:
            list(drive(iter([self._play(world, number, chain, film)]), answer, 1))
        finally:
            self._drop(world)
        found = {"video": film.save_video(folder / f"chain-{number:03d}.mp4")}
        if (strip := film.strip()) is not None:
            found["frames"] = folder / f"chain-{number:03d}-frames.png"
            cv2.imwrite(str(found["frames"]), strip[..., ::-1])
        return found

    def simulated(self, work: Callable[_Given, _Result], *given: _Given.args, **named: _Given.kwargs) -> _Result:
        """What `work` returns; its time is the simulator's."""
        began = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            self.cost.simulator_s += time.perf_counter() - began

    # ------------------------------------------------------------------------------------------------- one chain

    def _lane(self, number: int, chain: Chain) -> Play:
        record = yield from self._once(number, chain)
        if record.error.startswith(_LOST):
            record = yield from self._once(number, chain)
        return record

    def _once(self, number: int, chain: Chain) -> Play:
        try:
            world = self._world(chain.scene)
        except SimulatorError as error:
            return ChainRecord(number, chain.scene, chain.tasks, 0, (0,), f"{_LOST}: {error}", "error")
        self.busy += 1
        whole = False
        try:
            record = yield from self._play(world, number, chain)
            whole = not record.error.startswith(_LOST)
            return record
        finally:
            self.busy -= 1
            if whole:
                self._idle.append((chain.scene, world))
            else:
                self._drop(world)

    def _play(self, world: Measured, number: int, chain: Chain, film: Film | None = None) -> Play:
        suite = self.suite

        def succeeded(task: str, start: Info, now: Info) -> bool:
            return self.simulated(suite.succeeded, task, start, now)

        rules = Rules(succeeded, suite.instruction, suite.max_steps, self.control)
        return play(world, chain, number, rules, film, self._script(world, number, chain))

    def _script(self, world: Measured, number: int, chain: Chain) -> Script | None:
        if self.policy == "expert":
            return lambda task: self._thought(self.suite.expert(world.world, task))
        if self.policy == "replay":
            given = dict(zip(chain.tasks, self.recorded[number], strict=True))
            return lambda task: iter(given[task])
        return None

    def _thought(self, actions: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while True:
            began = time.perf_counter()
            action = next(actions, None)
            self.cost.policy_s += time.perf_counter() - began
            if action is None:
                return
            yield action

    # ------------------------------------------------------------------------------------------- who acts, and where

    def _policy(self) -> Policy | BatchPolicy | None:
        if not isinstance(self.policy, str):
            return self.policy
        if self.policy in SCRIPTED:
            return None
        return load_alone(self.policy, self.suite, self.slots)

    def _answer(self, policy: Policy | BatchPolicy | None) -> tuple[Answer, int]:
        if policy is None:
            return (lambda asks: []), 1
        answer, most = answers(policy)

        def timed(asks: Sequence[Ask]) -> Sequence[Prediction | Exception]:
            began = time.perf_counter()
            try:
                return answer(asks)
            finally:
                self.cost.policy_s += time.perf_counter() - began
                self.cost.chunks += len(asks)

        return timed, min(self.lanes, most or self.lanes)

    def _world(self, scene: str) -> Measured:
        for i, (of, _) in enumerate(self._idle):
            if of == scene:
                return self._idle.pop(i)[1]
        if self._open >= self.lanes and self._idle:
            self._drop(self._idle.pop(0)[1])
        return self._opened(scene, cameras=self.policy not in BLIND)

    def _opened(self, scene: str, cameras: bool) -> Measured:
        self._opening = True
        try:
            world = Measured(self.suite.open(scene, cameras=cameras), self)
        finally:
            self._opening = False
        self._open += 1
        return world

    def _drop(self, world: Measured) -> None:
        world.close()
        self._open -= 1
