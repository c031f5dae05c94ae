"""The playtable measured: experts by task and scene, whole chains, speed; and a picture of the four scenes.

    python benchmarks/playtable.py [--scenes ABCD] [--trials 50] [--chains 200] [--noise 0] [--json [FILE]]
                                   [--speed] [--picture scenes.png]

Trials are a task and a scene: 50 make 200 a task. Seeds are held out from everything that is recorded or tuned on.
`--json` adds to what the file holds, so the scenes can be measured one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from _figures import give, parse

from upvla.sim.playtable.chains import sample_chains, sample_starts, state_at_random, symbols_at_random
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import run
from upvla.sim.playtable.recorder import CollectConfig, collect
from upvla.sim.playtable.scene import LAYOUTS
from upvla.sim.playtable.tasks import TASKS

HELD_OUT = 1_000_003
POOLED, CELL, LENGTH = 0.97, 0.88, 4.5  # what experts must reach: a task, a task in one scene, chains of a scene

Cell = dict[str, float]


def attempt(env: PlaytableEnv, task: str, trials: int, noise: float) -> Cell:
    """One task in one scene."""
    steps = []
    for i, start in enumerate(sample_starts(env.scene, task, trials, HELD_OUT)):
        env.reset(start.robot_state, start.scene_state)
        done, taken = run(env, task, np.random.default_rng(i), noise)
        steps += [taken] * done
    return {"done": len(steps), "of": trials, "mean_steps": float(np.mean(steps)) if steps else 0.0}


def chain_scores(env: PlaytableEnv, count: int, noise: float) -> dict[str, Any]:
    """CALVIN's protocol: the first failure ends a chain."""
    lengths: list[int] = []
    failed: dict[str, int] = {}
    for i, chain in enumerate(sample_chains(env.scene, count, HELD_OUT)):
        env.reset(chain.robot_state, chain.scene_state)
        lengths.append(0)
        for task in chain.tasks:
            if not run(env, task, np.random.default_rng(i), noise)[0]:
                failed[task] = failed.get(task, 0) + 1
                break
            lengths[-1] += 1
    rates = [float(np.mean([length >= k for length in lengths])) for k in range(1, 6)]
    return {"average_length": float(np.mean(lengths)), "success": rates, "of": count, "failed": failed}


def speed() -> dict[str, float]:
    """Rates a core-second: physics, two cameras, and recording all 34 tasks end to end."""
    env, still = PlaytableEnv("A"), np.array((0, 0, 0, 0, 0, 0, 1.0))

    def rate(count: int, work: Callable[[], object]) -> float:
        rounds = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(count):
                work()
            rounds.append(count / (time.process_time() - start))
        return max(rounds)

    found = {"env_steps": rate(300, lambda: env.step(still)), "two_camera_frames": rate(60, env.observe)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        summary = collect(CollectConfig(scenes=("A", "D"), recordings_per_scene=4), folder, workers=1)
        found["recorded_frames"] = summary["frames"] / (time.process_time() - began)
    env.close()
    return found


def picture(envs: dict[str, PlaytableEnv], path: Path) -> None:
    """A column a scene: both lamps off and all shut, lamps on and drawer open, and the gripper's view."""
    columns = []
    for number, (scene, env) in enumerate(envs.items()):
        rng = np.random.default_rng(number + 5)
        cells = []
        for slider, drawer, lit in (("right", "closed", 0), ("left", "open", 1)):
            symbols = {**symbols_at_random(rng), "slider": slider, "drawer": drawer, "led": lit, "lightbulb": lit}
            symbols |= {"red_block": "table", "blue_block": "table"}
            symbols["pink_block"] = "slider_right" if slider == "left" else "slider_left"
            env.reset(*state_at_random(scene, symbols, rng))
            images = env.observe().images
            cells.append(images["static"])
        wrist = np.zeros((200, 200, 3), np.uint8) + 255
        wrist[8:176, 16:184] = cv2.resize(images["gripper"], (168, 168), interpolation=cv2.INTER_NEAREST)
        cv2.putText(wrist, f"scene {scene}", (62, 194), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
        columns.append(
            np.vstack([np.pad(cell, ((3, 3), (3, 3), (0, 0)), constant_values=255) for cell in (*cells, wrist)])
        )
    sheet = cv2.resize(np.hstack(columns), None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), sheet[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def show(result: dict[str, Any]) -> bool:
    """Print the expert table; whether it holds what experts must reach."""
    holds = True
    for task, row in result["tasks"].items():
        pooled = sum(cell["done"] for cell in row.values()) / sum(cell["of"] for cell in row.values())
        worst = min(cell["done"] / cell["of"] for cell in row.values())
        holds &= pooled >= POOLED and worst >= CELL
        cells = "  ".join(f"{scene} {cell['done']:3d}/{cell['of']}" for scene, cell in sorted(row.items()))
        steps = np.mean([cell["mean_steps"] for cell in row.values()])
        print(f"{task:26s} {cells}  pooled {pooled:6.1%}  steps {steps:.0f}")
    for scene, chains in sorted(result["chains"].items()):
        holds &= chains["average_length"] >= LENGTH
        rates = " ".join(f"{rate:.3f}" for rate in chains["success"])
        print(f"scene {scene}: {chains['of']} chains, average length {chains['average_length']:.3f}, 1..5 done {rates}")
    print(f"at least {POOLED:.0%} a task, {CELL:.0%} a task and scene, length {LENGTH}: {'yes' if holds else 'NO'}")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default="".join(LAYOUTS))
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--chains", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parse(parser)
    result: dict[str, Any] = {"noise": options.noise, "tasks": {}, "chains": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
        if result["noise"] != options.noise:
            parser.error(f"{options.json} holds results at noise {result['noise']}; name another file")
    if options.picture:
        picture({scene: PlaytableEnv(scene) for scene in LAYOUTS}, options.picture)
    if options.speed:
        result["speed_per_core_s"] = speed()
        print("a core's second:", {name: round(value) for name, value in result["speed_per_core_s"].items()})
    for scene in options.scenes:
        env = PlaytableEnv(scene)
        if options.trials:
            for task in TASKS:
                result["tasks"].setdefault(task, {})[scene] = attempt(env, task, options.trials, options.noise)
        if options.chains:
            result["chains"][scene] = chain_scores(env, options.chains, options.noise)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2))
    good = show(result)
    give(options, result)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
