"""The playtable measured: experts by task and scene, whole chains, speed; and a picture of the four scenes.

    python benchmarks/playtable.py [--trials 25] [--chains 25] [--noise 0] [--json out.json] [--picture scenes.png]

Trials are a task and a scene; seeds are held out from everything that is recorded or tuned on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from upvla.sim.playtable.chains import sample_chains, sample_starts, state_at_random, symbols_at_random
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.expert import run
from upvla.sim.playtable.scene import LAYOUTS
from upvla.sim.playtable.tasks import TASKS

HELD_OUT = 1_000_003


def success(envs: dict[str, PlaytableEnv], trials: int, noise: float) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        row: dict[str, Any] = {}
        steps = []
        for scene, env in envs.items():
            done = 0
            for i, start in enumerate(sample_starts(scene, task, trials, HELD_OUT)):
                env.reset(start.robot_state, start.scene_state)
                succeeded, taken = run(env, task, np.random.default_rng(i), noise)
                done += succeeded
                steps += [taken] * succeeded
            row[scene] = done
        table[task] = row | {
            "of": trials,
            "mean_steps": float(np.mean(steps)),
            "p95_steps": float(np.quantile(steps, 0.95)),
        }
    return table


def chain_length(env: PlaytableEnv, scene: str, count: int, noise: float) -> float:
    done = 0
    for i, chain in enumerate(sample_chains(scene, count, HELD_OUT)):
        env.reset(chain.robot_state, chain.scene_state)
        for task in chain.tasks:
            if not run(env, task, np.random.default_rng(i), noise)[0]:
                break
            done += 1
    return done / count


def speed(env: PlaytableEnv) -> dict[str, float]:
    """Per second of one core's time (not of the wall's), best of five rounds."""
    env.reset(*env.rest_state())
    env.observe()
    still = np.array((0, 0, 0, 0, 0, 0, 1.0))

    def rate(count: int, work: Any) -> float:
        rounds = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(count):
                work()
            rounds.append(count / (time.process_time() - start))
        return max(rounds)

    return {"env_steps": rate(300, lambda: env.step(still)), "two_camera_frames": rate(60, env.observe)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--chains", type=int, default=25)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    envs = {scene: PlaytableEnv(scene) for scene in LAYOUTS}
    if options.picture:
        picture(envs, options.picture)
    result: dict[str, Any] = {"noise": options.noise, "speed_per_core_s": speed(envs["A"])}
    if options.trials:
        result["tasks"] = success(envs, options.trials, options.noise)
        for task, row in result["tasks"].items():
            shares = "  ".join(f"{scene} {row[scene]}/{row['of']}" for scene in envs)
            print(f"{task:24s} {shares}  steps {row['mean_steps']:.0f} (95 %: {row['p95_steps']:.0f})")
    if options.chains:
        result["average_length"] = {
            scene: chain_length(env, scene, options.chains, options.noise) for scene, env in envs.items()
        }
        print("average length", result["average_length"])
    print("a core's second:", {name: round(value) for name, value in result["speed_per_core_s"].items()})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
