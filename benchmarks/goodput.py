"""What a run keeps of its time when a worker is killed again and again.

    python benchmarks/goodput.py [--kills 4] [--kill-every-s 360] [--save-every-s 30] [--json [FILE]]

Two workers train the `tiny` policy on synthetic recordings under Ray Train, all of it on an S3 server; every
`--kill-every-s` seconds one of them gets SIGKILL. Goodput is the share of the wall clock, from the driver's first
moment to the run's last step, that went into steps of the result: start-up, stalls for resume points, detection,
restart and steps taken again all lower it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
from _figures import give, parse
from _recordings import s3_bucket
from _stage import prepare, write_spec

from upvla.launch.train import RESULT
from upvla.store import open_store

_STEP = re.compile(r"goodput +(\d+)/\d+ .* lr ")
_STAGE = {"name": "goodput", "weights": {"pre": 1.0, "act": 1.0}, "micro_batch": 8, "log_every": 1, "eval_batches": 1}


class Seen(NamedTuple):
    """A line about a training step, and when it came."""

    at: float
    step: int


class Killed(NamedTuple):
    at: float
    pid: int
    last_step: int


def run(url: str, kills: int, kill_every_s: float, first_kill_s: float = 0.0) -> tuple[list[Seen], list[Killed], float]:
    """The run from its start to its end: steps as they were told, who was killed when, and the seconds in all."""
    command = [sys.executable, "-m", "upvla.launch.driver", url]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_DEDUP_LOGS": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    seen: list[Seen] = []
    killed: list[Killed] = []
    dice = random.Random(0)
    due = began + (first_kill_s or kill_every_s)
    for line in process.stdout:
        if not (found := _STEP.search(line)):
            continue
        now = time.monotonic()
        seen.append(Seen(now, int(found[1])))
        if len(killed) < kills and now >= due:
            victim = dice.choice(_workers(process.pid))
            killed.append(Killed(now, victim.pid, seen[-1].step))
            victim.kill()
            due = now + kill_every_s
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode}")
    return seen, killed, time.monotonic() - began


def _workers(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def restarts(seen: Sequence[Seen], killed: Sequence[Killed]) -> list[dict[str, float]]:
    """Of every kill: seconds to the first new step, steps lost, and the seconds that they had taken."""
    rows = []
    for kill in killed:
        after = next(line for line in seen if line.at > kill.at and line.step <= kill.last_step + 1)
        kept = [line.at for line in seen if line.at <= kill.at and line.step == after.step - 1]
        rows.append(
            {
                "pid": kill.pid,
                "at_step": kill.last_step,
                "restart_s": after.at - kill.at,
                "lost_steps": kill.last_step - (after.step - 1),
                "lost_s": kill.at - kept[-1] if kept else kill.at - seen[0].at,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--kill-every-s", type=float, default=360)
    parser.add_argument("--save-every-s", type=float, default=30)
    options = parse(parser)
    with s3_bucket() as bucket:
        store, references = prepare(bucket, recordings=16, global_batch=32)
        engine = {"num_workers": 2, "zero_stage": 2}
        probe = write_spec(store, references, _STAGE | {"steps": 12}, engine)
        seen, _, start_s = run(probe, 0, 1e9)
        step_s = (seen[-1].at - seen[1].at) / (seen[-1].step - seen[1].step)
        steps = round((options.kills + 0.8) * options.kill_every_s / step_s)
        timed = {"steps": steps, "save_every": max(1, round(options.save_every_s / step_s)), "eval_every": steps}
        url = write_spec(store, references, _STAGE | timed, engine)
        seen, killed, wall_s = run(url, options.kills, options.kill_every_s)
        result = dict(open_store(url.rpartition("/")[0]).read_json(RESULT))
    rows = restarts(seen, killed)
    figures: dict[str, Any] = {
        "step_s": step_s,
        "save_every_steps": timed["save_every"],
        "wall_s": wall_s,
        "start_to_first_step_s": result["seconds_to_first_log"] if not killed else start_s - 12 * step_s,
        "goodput_pct": result["speed"]["goodput_pct"],
        "checkpoint_stall_pct": result["speed"]["checkpoint_stall_pct"],
        "kills": rows,
    }
    print(f"{'killed':>8} {'at step':>8} {'restart s':>10} {'lost steps':>11} {'lost s':>7}")
    for row in rows:
        lost = f"{row['lost_steps']:>11} {row['lost_s']:>7.1f}"
        print(f"{row['pid']:>8} {row['at_step']:>8} {row['restart_s']:>10.1f} {lost}")
    print(
        f"goodput {figures['goodput_pct']:.1f} %, stall for resume points {figures['checkpoint_stall_pct']:.2f} % of "
        f"step time; {steps} steps of {step_s:.2f} s, a resume point every {timed['save_every']}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    give(options, figures)


if __name__ == "__main__":
    main()
