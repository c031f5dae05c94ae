"""The playtable's suites: initial states and chains, policies by name or checkpoint, and judging them.

Functions here run in worker processes and take only what pickles: names, URLs, configs, chains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import torch

from upvla.checkpoint import load_bundle
from upvla.errors import ConfigError
from upvla.rollout.client import RemotePolicy
from upvla.rollout.evaluate import EvalConfig, SuiteConfig, protocol_fingerprint
from upvla.rollout.film import Film
from upvla.rollout.play import Rules, run_chain
from upvla.rollout.policy import RandomPolicy, StillPolicy, UPVLAPolicy
from upvla.sim.playtable import chains, tasks
from upvla.sim.playtable.env import PlaytableEnv
from upvla.types import CALVIN_RELATIVE, Chain, ChainRecord, Policy

REFERENCES = ("random", "still")


def suite_chains(suite: SuiteConfig) -> list[Chain]:
    """Initial states and tasks of a suite, from its seed alone."""
    found: list[Chain] = []
    names = tuple(tasks.task(name).spec.name for name in suite.tasks) or tuple(tasks.TASKS)
    for scene in suite.scenes:
        if suite.kind == "chains":
            found += chains.sample_chains(scene, suite.num, suite.seed, tasks=names)
        else:
            for task in names:
                found += chains.sample_starts(scene, task, suite.num, suite.seed)
    return found


def suite_fingerprint(config: EvalConfig, suite: SuiteConfig, chosen: Sequence[Chain]) -> str:
    """Asks the environment itself, so that a renderer that differs cannot go unnoticed."""
    env = PlaytableEnv(suite.scenes[0])
    try:
        return protocol_fingerprint(config, suite, chosen, env.fingerprint())
    finally:
        env.close()


def load_policy(name: str) -> Policy:
    """`random`, `still`, the URL of an exported checkpoint, or ws://HOST:PORT of a policy server."""
    if name.startswith(("ws://", "wss://")):
        return RemotePolicy(name, deadline_s=2.0)
    if name == "random":
        return RandomPolicy(CALVIN_RELATIVE)
    if name == "still":
        return StillPolicy(CALVIN_RELATIVE)
    if "/" not in name:
        raise ConfigError(f"no policy {name!r}: name one of {', '.join(REFERENCES)}, or the URL of a checkpoint")
    return UPVLAPolicy(load_bundle(name))


class Judge:
    """Runs shards of chains in one worker process: the policy is loaded once, an environment a scene once."""

    def __init__(self, policy: str, config: EvalConfig) -> None:
        self.policy, self.config = policy, config

    def load(self) -> Policy:
        return load_policy(self.policy)

    def __call__(self, shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
        torch.set_num_threads(1)  # equal threads everywhere: the same sums in the same order
        policy = self.load()
        envs: dict[str, PlaytableEnv] = {}
        try:
            return [self._judge(envs, policy, index, chain) for index, chain in shard]
        finally:
            for env in envs.values():
                env.close()

    def film(self, index: int, chain: Chain, folder: Path) -> Mapping[str, Path]:
        """Run one chain and write `chain-<index>.mp4`, and for a predicting policy `chain-<index>-frames.png`."""
        torch.set_num_threads(1)
        policy = self.load()
        film = Film(picture=policy.picture if isinstance(policy, UPVLAPolicy) else None)
        envs: dict[str, PlaytableEnv] = {}
        try:
            self._judge(envs, policy, index, chain, film)
        finally:
            for env in envs.values():
                env.close()
        found = {"video": film.save_video(folder / f"chain-{index:03d}.mp4")}
        strip = film.strip()
        if strip is not None:
            found["frames"] = folder / f"chain-{index:03d}-frames.png"
            cv2.imwrite(str(found["frames"]), strip[..., ::-1])
        return found

    def _judge(
        self, envs: dict[str, PlaytableEnv], policy: Policy, index: int, chain: Chain, film: Film | None = None
    ) -> ChainRecord:
        if chain.scene not in envs:
            envs[chain.scene] = PlaytableEnv(chain.scene)
        rules = Rules(tasks.succeeded, tasks.instruction, self.config.max_steps, self.config.replan)
        return run_chain(envs[chain.scene], policy, chain, index, rules, film)
