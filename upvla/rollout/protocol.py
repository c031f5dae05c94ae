"""What is settled before anything is scored: the protocol, who is judged, and that the simulator repeats itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from upvla.checkpoint import read_facts
from upvla.errors import Mismatch
from upvla.rollout.benchmarks import SCRIPTED, is_checkpoint, without_model
from upvla.rollout.evaluate import Control
from upvla.sim.contract import MAX_STEPS
from upvla.sim.suite import Suite, World, chains_id, code_id
from upvla.store import content_hash
from upvla.types import Chain

_TRIES = 5  # chains of which an expert must manage one


def protocol(suite: Suite, chains: Sequence[Chain], control: Control) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what must be equal before two scores may be compared, the cameras of the suite's worlds and their sizes).

    Opens a world, puts it into the first chain's state and looks, so that whatever keeps it from opening or from
    rendering is said before anything is judged.
    """
    first = chains[0]
    world = suite.open(first.scene)
    try:
        suite.action_space.require_equal(world.action_space, ours=f"suite {suite.name}", theirs=f"world {world.name}")
        world.reset(first.robot_state, first.scene_state)
        cameras = {name: list(image.shape[:2]) for name, image in world.observe().images.items()}
        about = dict(world.fingerprint())
    finally:
        world.close()
    tasks = sorted({task for chain in chains for task in chain.tasks})
    asked = {
        "suite": suite.name,
        "chains": chains_id(chains),
        "num_chains": len(chains),
        "scenes": ",".join(sorted({chain.scene for chain in chains})),
        "seeds": ",".join(str(seed) for seed in sorted({chain.seed for chain in chains})[:8]),
        "instructions": content_hash([suite.instruction(task) for task in tasks]),
        "max_steps": suite.max_steps,
        "actions": content_hash(suite.action_space.to_json()),
        **{f"control.{name}": value for name, value in control.model_dump(mode="json").items()},
        **{f"camera.{name}": "x".join(map(str, size)) for name, size in cameras.items()},
        **{f"env.{name}": value for name, value in about.items()},
    }
    return asked, cameras


def identity(
    policy: str, suite: Suite, cameras: Mapping[str, Any], slots: int = 1, expected: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Who is judged. Raises `Mismatch` where it and the suite's world speak of different actions, where it looks
    through a camera that the world does not have, or where it is not what is `expected` (`name`, `stats_id`)."""
    if policy in SCRIPTED:
        folder = Path(inspect.getfile(type(suite))).parent  # experts are no part of the world's own code
        return {"name": policy, "code": code_id(*folder.glob("*.py"))}
    cameras_of, found = _about(policy, suite, slots)
    missing = [camera for camera in cameras_of if camera not in cameras]
    if missing:
        raise Mismatch(
            f"camera: model {policy} looks through {missing[0]!r}, suite {suite.name} has {', '.join(cameras)}"
        )
    for name, value in (expected or {}).items():
        if value and found.get(name) != value:
            raise Mismatch(f"{name}: {policy} has {found.get(name)}, registered was {value}: register it anew")
    return found


def _about(policy: str, suite: Suite, slots: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(the cameras that it needs, what decides its answers). Of a checkpoint nothing is loaded: processes will do that
    which judge it, and it would take this one seconds."""
    if not is_checkpoint(policy):
        loaded = without_model(policy, suite)
        return loaded.cameras, {"name": loaded.name, **loaded.identity()}
    model_id, config, action_space, stats = read_facts(policy)
    suite.action_space.require_equal(action_space, ours=f"suite {suite.name}", theirs=f"model {policy}")
    return config.cameras, {
        "name": model_id,
        "stats_id": content_hash(stats),
        "actions": content_hash(action_space.to_json()),
        "chunk": config.chunk,
        "cameras": list(config.cameras),
        "vision_resize": config.vision_resize.model_dump(mode="json"),
        "code_resize": config.vq_resize.model_dump(mode="json"),
        "slots": slots,
        "torch": version("torch"),
    }


def self_test(suite: Suite, chains: Sequence[Chain]) -> dict[str, Any]:
    """Whether an expert's actions, recorded in one world, succeed again in another: {task, steps}, or {skipped: why}.

    Raises `Mismatch` where they do not: no score from such a suite would mean anything.
    """
    if not suite.has_expert:
        return {"skipped": f"{suite.name} has no expert; `upvla evaluate replay` plays recordings instead"}
    failed = []
    for chain in chains[:_TRIES]:
        task = chain.tasks[0]
        done = _attempt(suite, chain, task, suite.expert)
        if done is None:
            failed.append(task)
            continue
        again = _attempt(suite, chain, task, partial(_given, done))
        if again is None or len(again) != len(done):
            raise Mismatch(
                f"self-test of {suite.name}: {task} succeeded after {len(done)} actions; the same actions in a fresh "
                f"world {'did not' if again is None else f'did after {len(again)}'}: it does not repeat itself"
            )
        return {"task": task, "steps": len(done)}
    raise Mismatch(f"self-test of {suite.name}: its expert fails in {', '.join(failed)}; is the simulator whole?")


def _given(actions: np.ndarray, world: World, task: str) -> Iterator[np.ndarray]:
    return iter(actions)


def _attempt(
    suite: Suite, chain: Chain, task: str, act: Callable[[World, str], Iterator[np.ndarray]]
) -> np.ndarray | None:
    """Actions f64[T,A] with which `task` succeeds from the chain's state in a new world; None where it does not."""
    world, actions = suite.open(chain.scene, cameras=False), list[np.ndarray]()
    try:
        world.reset(chain.robot_state, chain.scene_state)
        start = world.info()
        for action in islice(act(world, task), max(suite.max_steps, MAX_STEPS)):
            actions.append(np.array(action))
            world.step(action)
            if suite.succeeded(task, start, world.info()):
                return np.stack(actions)
    finally:
        world.close()
    return None
