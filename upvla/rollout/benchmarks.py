"""One door to every benchmark: a suite by name, a policy in it, records that compare.

Numbers of the project's own playtable bear its name and are never CALVIN numbers; suites called `calvin-...` run
CALVIN's own code.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from upvla.checkpoint import load_bundle
from upvla.errors import ConfigError, SimulatorError, UpvlaError
from upvla.rollout.evaluate import EvalConfig, SuiteConfig, protocol_fingerprint
from upvla.rollout.play import Rules, run_chain
from upvla.rollout.policy import RandomPolicy, StillPolicy, UPVLAPolicy
from upvla.sim import calvin, libero, metaworld
from upvla.sim.suite import Finding, Suite, World
from upvla.store import content_hash
from upvla.types import Chain, ChainRecord, Policy

BUILT_IN = ("random", "still", "expert")
_LOST = SimulatorError.__name__  # how a record's error begins when it says nothing about the policy


@dataclass(frozen=True)
class Places:
    """Where benchmarks lie that are not part of this environment. Nothing here takes part in a fingerprint."""

    calvin: str = ""  # a checkout of mees/calvin with calvin_env in it
    libero: str = ""  # a Python that holds LIBERO
    cache: str = ".upvla/benchmarks"  # what takes minutes to work out


def suite_names() -> list[str]:
    return [*calvin.SUITES, *libero.SUITES, *metaworld.suites()]


def open_suite(name: str, places: Places) -> Suite:
    """Raises `ConfigError`: no such suite (with the nearest name), or its place is not given."""
    if name in calvin.SUITES:
        if not places.calvin:
            raise ConfigError(f"{name} runs from your checkout: name it with --calvin PATH (docs/benchmarks.md)")
        checkout = calvin.Checkout(Path(places.calvin).expanduser().resolve())
        return calvin.CalvinSuite(checkout, Path(places.cache).expanduser(), name)
    if name in libero.SUITES:
        return libero.LiberoSuite(name, places.libero)
    if name in (found := metaworld.suites()):
        return found[name]
    near = difflib.get_close_matches(name, suite_names(), 1, 0.5)
    listed = "calvin-{a,b,c,d}, libero-{spatial,object,goal,10,90}, metaworld-{mt50,mt10,<task>}"
    raise ConfigError(f"no suite {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there is: {listed}"))


def inspect(what: str, path: str) -> list[Finding]:
    """What the benchmark needs and whether it is there. Raises `ConfigError` for a benchmark that nobody knows."""
    if what == "metaworld":
        return metaworld.inspect()
    if what not in ("calvin", "libero"):
        raise ConfigError(f"no benchmark {what!r}: choose calvin, libero or metaworld")
    if not path:
        raise ConfigError(
            f"`upvla doctor {what} PATH`: PATH is " + ("the checkout" if what == "calvin" else "a Python")
        )
    return calvin.inspect(path) if what == "calvin" else libero.inspect(path)


def load_policy(name: str, suite: Suite) -> Policy:
    """`random`, `still`, or the URL of an exported checkpoint, for the suite's robot."""
    if name == "random":
        return RandomPolicy(suite.action_space)
    if name == "still":
        return StillPolicy(suite.action_space)
    if "/" not in name:
        raise ConfigError(f"no policy {name!r}: name one of {', '.join(BUILT_IN)}, or the URL of a checkpoint")
    policy = UPVLAPolicy(load_bundle(name))
    suite.action_space.require_equal(policy.action_space, ours=f"suite {suite.name}", theirs=f"model {name}")
    return policy


def suite_fingerprint(suite: Suite, chains: Sequence[Chain], replan: int) -> str:
    """Asks the world itself, and what it will be told: scores compare only if all of that is equal."""
    world = suite.open(chains[0].scene)
    try:
        about = dict(world.fingerprint())
    finally:
        world.close()
    tasks = sorted({task for chain in chains for task in chain.tasks})
    about["instructions"] = content_hash([suite.instruction(task) for task in tasks])
    kind: Literal["chains", "tasks"] = "chains" if max(len(chain.tasks) for chain in chains) > 1 else "tasks"
    scenes = tuple(sorted({chain.scene for chain in chains}))
    asked = SuiteConfig(name=suite.name, kind=kind, scenes=scenes, num=len(chains))
    limits = EvalConfig(suites=(asked,), max_steps=suite.max_steps, replan=replan, videos=0)
    return protocol_fingerprint(limits, asked, chains, about)


def drive(
    world: World, suite: Suite, chain: Chain, index: int, actions: Callable[[str], Iterable[np.ndarray]]
) -> ChainRecord:
    """Run one chain on given actions a task: an expert's, or a recording's. Success is judged as for any policy."""
    world.reset(chain.robot_state, chain.scene_state)
    steps: list[int] = []
    for task in chain.tasks:
        start, used, done = world.info(), 0, False
        for action in islice(actions(task), suite.max_steps):
            world.step(action)
            used += 1
            if done := suite.succeeded(task, start, world.info()):
                break
        steps.append(used)
        if not done:
            return ChainRecord(index, chain.scene, chain.tasks, len(steps) - 1, tuple(steps))
    return ChainRecord(index, chain.scene, chain.tasks, len(steps), tuple(steps))


Recorded = tuple[tuple[np.ndarray, ...], ...]
"""Actions f32[T,A] of each task of a chain; a tuple a chain."""


@dataclass
class SuiteJudge:
    """Runs shards of chains in one process: the policy is loaded once, a world a scene at a time.

    `recorded` replays these actions instead of a policy's, by chain index.
    """

    suite: Suite
    policy: str
    replan: int = 10
    recorded: Recorded = ()
    _worlds: dict[str, World] = field(default_factory=dict, repr=False)

    @property
    def sees(self) -> bool:
        """Whether images take part at all; experts and recordings never look."""
        return self.policy not in ("expert", "replay", "still")

    def __call__(self, shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
        return list(self.run(shard))

    def run(self, shard: Iterable[tuple[int, Chain]]) -> Iterator[ChainRecord]:
        """Records as they come. A world that dies is opened again and its chain is judged once more."""
        torch.set_num_threads(1)  # equal threads everywhere: the same sums in the same order
        policy = None if self.policy in ("expert", "replay") else load_policy(self.policy, self.suite)
        try:
            for index, chain in shard:
                record = self._judge(policy, index, chain)
                if record.error.startswith(_LOST):
                    self._close()
                    record = self._judge(policy, index, chain)
                if record.error.startswith(_LOST):
                    self._close()
                yield record
        finally:
            self._close()

    def _judge(self, policy: Policy | None, index: int, chain: Chain) -> ChainRecord:
        try:
            world = self._world(chain.scene)
            if self.policy == "replay":
                given = dict(zip(chain.tasks, self.recorded[index], strict=True))
                return drive(world, self.suite, chain, index, given.__getitem__)
            if policy is None:
                return drive(world, self.suite, chain, index, partial(self.suite.expert, world))
            rules = Rules(self.suite.succeeded, self.suite.instruction, self.suite.max_steps, self.replan)
            return run_chain(world, policy, chain, index, rules)
        except ConfigError:
            raise
        except UpvlaError as failure:
            return ChainRecord(index, chain.scene, chain.tasks, 0, (0,), f"{type(failure).__name__}: {failure}")

    def _world(self, scene: str) -> World:
        if scene not in self._worlds:
            self._close()
            self._worlds[scene] = self.suite.open(scene, cameras=self.sees)
        return self._worlds[scene]

    def _close(self) -> None:
        while self._worlds:
            self._worlds.popitem()[1].close()
