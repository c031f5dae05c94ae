"""Experts recorded into CALVIN's raw layout: one npz a frame, language spans over continuous recordings.

    out/training/episode_%07d.npz     rgb_static, rgb_gripper, robot_obs, scene_obs (before the action), rel_actions
                                      (the action), actions (gripper pose after it, gripper command)
        ep_start_end_ids.npy, ep_lens.npy, scene_info.npy
        lang_annotations/auto_lang_ann.npy    spans as (first, last) frame, both inside
    out/.collect/                     recordings in work, each renamed into place when whole; `complete.json` ends it

A recording is a pure function of (config, index), so a run killed anywhere is finished by running it again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from upvla.errors import ConfigError
from upvla.sim import contract as c
from upvla.sim.playtable import chains
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import Expert
from upvla.sim.playtable.scene import layout
from upvla.sim.playtable.tasks import TASKS, instruction, succeeded, task
from upvla.store import content_hash
from upvla.types import Chain

_FORMAT = 2  # of what `record` writes; raise it when recordings change for the same config
_GIVE_UP = 240  # steps after which an expert's attempt counts as failed

Progress = Callable[[int, int], None]
"""(recordings done, recordings in all)"""


class CollectConfig(BaseModel):
    """What to record. Chains and shared starts add up; recording i depends on these values and i alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: tuple[str, ...] = ("A", "B", "C")
    tasks: tuple[str, ...] = tuple(TASKS)
    recordings_per_scene: int = Field(default=20, ge=0)
    tasks_per_recording: int = Field(default=5, ge=1, le=c.CHAIN_LENGTH)
    starts_per_task: int = Field(default=0, ge=0)
    """Initial states a scene that are each recorded once for every task that applies in them: there the instruction
    alone tells the recordings apart."""
    seed: int = 0
    noise: float = Field(default=0.15, ge=0, le=1)
    follow_through: int = Field(default=4, ge=0)
    """Steps for which the expert goes on after success, inside the span, so that success is not marginal."""

    @field_validator("scenes", "tasks")
    @classmethod
    def _exist(cls, names: tuple[str, ...], info: Any) -> tuple[str, ...]:
        for name in names:
            try:
                (layout if info.field_name == "scenes" else task)(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{info.field_name} must be named, each once")
        return names

    def fingerprint(self) -> str:
        return content_hash({**self.model_dump(mode="json"), "format": _FORMAT})


def jobs(config: CollectConfig) -> list[Chain]:
    """The recordings to make, by scene: where each starts, and its tasks."""
    found: list[Chain] = []
    for scene in config.scenes:
        found += chains.sample_chains(
            scene, config.recordings_per_scene, config.seed, config.tasks_per_recording, config.tasks
        )
        for start in chains.sample_shared_starts(scene, config.tasks, config.starts_per_task, config.seed):
            found += [start._replace(tasks=(name,)) for name in start.tasks]
    return found


def collect(
    config: CollectConfig, out_dir: str | Path, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Record everything under `out_dir` on `workers` processes (all cores); a finished folder is left as it is.

    Returns {fingerprint, recordings, frames, spans, scenes: {name: frames}, tasks: {name: [tried, succeeded]}}.
    Raises `ConfigError` when the folder holds another configuration's recordings.
    """
    out = Path(out_dir)
    work = out / ".collect"
    _claim(work, config.fingerprint())
    if (work / "complete.json").exists():
        return dict(json.loads((work / "complete.json").read_text()))
    todo = jobs(config)
    missing = [(i, chain) for i, chain in enumerate(todo) if not (work / f"{i:05d}" / "recording.json").exists()]
    done = len(todo) - len(missing)
    for _ in _record_all(config, work, missing, workers or os.cpu_count() or 1):
        done += 1
        if progress:
            progress(done, len(todo))
    return _assemble(config, out / "training", work, len(todo))


def _claim(work: Path, fingerprint: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    owner = work / "config.txt"
    if not owner.exists():
        _write(owner, fingerprint.encode())
    if (found := owner.read_text()) != fingerprint:
        raise ConfigError(
            f"{work.parent} holds recordings of configuration {found}, not {fingerprint}; "
            "choose another folder, or delete it to record anew"
        )


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


# ---------------------------------------------------------------------------------------------------- recording


def _record_all(config: CollectConfig, work: Path, todo: list[tuple[int, Chain]], workers: int) -> Iterator[None]:
    """Yields once a finished recording. Worker processes die with their parent."""
    if workers == 1 or len(todo) <= 1:
        for i, chain in todo:
            record(config, work, i, chain)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_die_with_parent) as pool:
        running = {pool.submit(record, config, work, i, chain) for i, chain in todo}
        try:
            while running:
                finished, running = wait_for(running, return_when="FIRST_COMPLETED")
                for future in finished:
                    future.result()
                    yield
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=4)
def _env(scene: str) -> PlaytableEnv:
    return PlaytableEnv(scene)


def record(config: CollectConfig, work: Path, index: int, chain: Chain) -> None:
    """Play one chain by experts into `work/<index>/`: frames numbered from 0, and `recording.json`."""
    env, rng = _env(chain.scene), np.random.default_rng((config.seed, index, 1))
    part = work / f"{index:05d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    env.reset(chain.robot_state, chain.scene_state)
    expert, steps, spans, tried = Expert(env, rng, config.noise), 0, [], []
    for name in chain.tasks:
        first, start, text = steps, env.info(), instruction(name, rng)
        for action in expert.actions(name, _GIVE_UP, config.follow_through):
            _save_frame(part / f"{steps}.npz", env, action)
            steps += 1
        done = succeeded(name, start, env.info())
        tried.append((name, done))
        if not done:
            break
        spans.append((first, steps - 1, text, name))
    _write(part / "recording.json", json.dumps({"steps": steps, "spans": spans, "tried": tried}).encode())
    part.replace(work / f"{index:05d}")


def _save_frame(path: Path, env: PlaytableEnv, action: np.ndarray) -> None:
    """Observe, act, and write the frame in CALVIN's arrays."""
    images = env.observe().images
    robot, scene = env.robot_state(), env.scene_state()
    env.step(action)
    with path.open("wb") as file:
        np.savez(
            file,
            actions=np.append(env.robot_state()[:6], action[6]),
            rel_actions=action,
            robot_obs=robot,
            scene_obs=scene,
            rgb_static=images["static"],
            rgb_gripper=images["gripper"],
        )


# ----------------------------------------------------------------------------------------------------- assembling


def _assemble(config: CollectConfig, split: Path, work: Path, count: int) -> dict[str, Any]:
    """Number all frames in order of recordings, then write the indices; every step may be repeated."""
    (split / "lang_annotations").mkdir(parents=True, exist_ok=True)
    recordings = [json.loads((work / f"{i:05d}" / "recording.json").read_text()) for i in range(count)]
    scenes = [chain.scene for chain in jobs(config)]
    first, ranges, spans = 0, [], []
    scene_info: dict[str, list[int]] = {}
    for i, recording in enumerate(recordings):
        for step in range(recording["steps"]):
            source = work / f"{i:05d}" / f"{step}.npz"
            if source.exists():
                source.replace(split / f"episode_{first + step:07d}.npz")
        last = first + recording["steps"] - 1
        ranges.append((first, last))
        spans += [(first + low, first + high, text, name) for low, high, text, name in recording["spans"]]
        scene_info.setdefault(f"playtable_{scenes[i]}", [first, last])[1] = last
        first = last + 1
    lengths = [recording["steps"] for recording in recordings]
    language = {
        "language": {
            "ann": [text for _, _, text, _ in spans],
            "task": [name for _, _, _, name in spans],
            "emb": np.zeros((len(spans), 1, 384), np.float32),  # part of the layout; nothing here reads it
        },
        "info": {"episodes": [], "indx": [(low, high) for low, high, _, _ in spans]},
    }
    np.save(split / "ep_start_end_ids.npy", np.array(ranges, np.int64).reshape(-1, 2))
    np.save(split / "ep_lens.npy", np.array(lengths, np.int64))
    np.save(split / "scene_info.npy", np.array(scene_info, object))
    np.save(split / "lang_annotations" / "auto_lang_ann.npy", np.array(language, object))
    tried = Counter(name for recording in recordings for name, _ in recording["tried"])
    done = Counter(name for _, _, _, name in spans)
    summary = {
        "fingerprint": config.fingerprint(),
        "recordings": count,
        "frames": first,
        "spans": len(spans),
        "scenes": {name: high - low + 1 for name, (low, high) in scene_info.items()},
        "tasks": {name: [tried[name], done[name]] for name in config.tasks},
    }
    _write(work / "complete.json", json.dumps(summary, indent=1).encode())
    return summary
