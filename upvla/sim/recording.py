"""Any suite's experts recorded into CALVIN's raw layout, the one that `upvla ingest` reads.

    out/training/episode_%07d.npz     rgb_<camera>, robot_obs, scene_obs (before the action), rel_actions (the action),
                                      actions (pose after it, gripper command)
        ep_start_end_ids.npy, ep_lens.npy, scene_info.npy, lang_annotations/auto_lang_ann.npy
        embodiment.json               what the arrays mean, where it is not CALVIN's robot
    out/.collect/                     recordings in work, each renamed into place when whole

A recording is a pure function of its chain and the seed; a run that was killed is finished by running it again.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.suite import Suite, World
from upvla.store import content_hash
from upvla.types import CALVIN_RELATIVE, Chain

Expert = Callable[[World, str, np.random.Generator], Iterator[np.ndarray]]
"""`expert(env, task, rng)` yields actions, each after looking at `env`; it may read everything that `env` offers."""

Progress = Callable[[int, int], None]
"""(recordings done, recordings in all)"""


def load_expert(place: str) -> Expert:
    """The function that `module:function` names, on Python's own module path."""
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no expert at {place!r} ({error}); write it as module:function") from error
    if not callable(found):
        raise ConfigError(f"{place!r} is a {type(found).__name__}, not a function (env, task, rng) -> actions")
    return cast(Expert, found)


def record_suite(
    suite: Suite,
    chains: Sequence[Chain],
    out_dir: str | Path,
    *,
    expert: Expert | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record every chain until its first failure under `out_dir`; what is there already is not recorded again.

    expert: the suite's own without one. Returns {recordings, frames, spans, tasks: {name: [tried,
    succeeded]}}. Raises `ConfigError` when the folder holds other recordings.
    """
    out = Path(out_dir)
    work = out / ".collect"
    mark = content_hash(
        [suite.name, seed, [[c.scene, c.tasks, c.robot_state.tolist(), c.scene_state.tolist()] for c in chains]]
    )
    _claim(work, mark)
    play = expert or (lambda env, task, rng: suite.expert(env, task))
    worlds: dict[str, World] = {}
    try:
        for i, chain in enumerate(chains):
            if not (work / f"{i:05d}").exists():
                if chain.scene not in worlds:
                    for name in list(worlds):
                        worlds.pop(name).close()
                    worlds[chain.scene] = suite.open(chain.scene)
                _record(suite, worlds[chain.scene], chain, work / f"{i:05d}", play, np.random.default_rng((seed, i)))
            if progress:
                progress(i + 1, len(chains))
    finally:
        for world in worlds.values():
            world.close()
    return _assemble(suite, chains, out / "training", work)


def _claim(work: Path, mark: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    owner = work / "config.txt"
    if owner.exists() and owner.read_text() != mark:
        raise ConfigError(f"{work.parent} holds other recordings: choose another folder, or delete it to record anew")
    owner.write_text(mark)


def _record(
    suite: Suite,
    env: World,
    chain: Chain,
    folder: Path,
    expert: Expert,
    rng: np.random.Generator,
) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    env.reset(chain.robot_state, chain.scene_state)
    steps, spans, tried = 0, [], []
    for task in chain.tasks:
        texts = suite.paraphrases(task)
        first, start, text, done = steps, env.info(), texts[int(rng.integers(len(texts)))], False
        for action in islice(expert(env, task, rng), suite.max_steps):
            _save_frame(part / f"{steps}.npz", env, action)
            steps += 1
            if done := suite.succeeded(task, start, env.info()):
                break
        tried.append((task, done))
        if not done:
            break
        spans.append((first, steps - 1, text, task))
    (part / "recording.json").write_text(json.dumps({"steps": steps, "spans": spans, "tried": tried}))
    part.replace(folder)


def _save_frame(path: Path, env: World, action: np.ndarray) -> None:
    before = env.observe()
    arrays = {f"rgb_{camera}": frame for camera, frame in before.images.items()}
    arrays |= {"rel_actions": action, "robot_obs": before.state, "scene_obs": env.truth()}
    env.step(action)
    arrays["actions"] = np.append(env.state()[: len(action) - 1], action[-1])
    with path.open("wb") as file:
        np.savez(file, **cast(Any, arrays))


def _assemble(suite: Suite, chains: Sequence[Chain], split: Path, work: Path) -> dict[str, Any]:
    """Number all frames in order of recordings, then write the indices; every step may be repeated."""
    (split / "lang_annotations").mkdir(parents=True, exist_ok=True)
    recordings = [json.loads((work / f"{i:05d}" / "recording.json").read_text()) for i in range(len(chains))]
    first, ranges, spans = 0, [], []
    scenes: dict[str, list[int]] = {}
    for i, (chain, recording) in enumerate(zip(chains, recordings, strict=True)):
        for step in range(recording["steps"]):
            source = work / f"{i:05d}" / f"{step}.npz"
            if source.exists():
                source.replace(split / f"episode_{first + step:07d}.npz")
        last = first + recording["steps"] - 1
        ranges.append((first, last))
        spans += [(first + low, first + high, text, task) for low, high, text, task in recording["spans"]]
        scenes.setdefault(f"{suite.name.partition('-')[0]}_scene_{chain.scene}", [first, last])[1] = last
        first = last + 1
    np.save(split / "ep_start_end_ids.npy", np.array(ranges, np.int64).reshape(-1, 2))
    np.save(split / "ep_lens.npy", np.array([recording["steps"] for recording in recordings], np.int64))
    np.save(split / "scene_info.npy", np.array(scenes, object))
    language = {
        "language": {"ann": [text for _, _, text, _ in spans], "task": [task for *_, task in spans]},
        "info": {"episodes": [], "indx": [(low, high) for low, high, _, _ in spans]},
    }
    np.save(split / "lang_annotations" / "auto_lang_ann.npy", np.array(language, object))
    if suite.action_space != CALVIN_RELATIVE and first:
        _describe(suite, split)
    tried = Counter(task for recording in recordings for task, _ in recording["tried"])
    done = Counter(task for *_, task in spans)
    return {
        "recordings": len(chains),
        "frames": first,
        "spans": len(spans),
        "tasks": {task: [tried[task], done[task]] for task in tried},
    }


def _describe(suite: Suite, split: Path) -> None:
    with np.load(split / "episode_0000000.npz") as frame:
        shapes = {name: list(frame[name].shape) for name in ("rel_actions", "actions", "robot_obs", "scene_obs")}
    about = {
        "embodiment": suite.name.partition("-")[0],
        "action_space": suite.action_space.to_json(),
        "arrays": shapes,
    }
    (split / "embodiment.json").write_text(json.dumps(about, indent=1))
