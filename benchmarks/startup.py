"""Seconds from a training job's submission until its first step is told, on a stack of its own.

    python benchmarks/startup.py [--starts 3] [--json [FILE]]

The stack (`upvla up`, on the ports of the local site) has two cores for Ray; its parts are up and idle. A toy stage of
the `tiny` policy is submitted as a Ray job as a flow submits it, and followed by its log; then the next one, of another
seed. The first start is left out: it may build DeepSpeed's operators, and reads every library from disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from _figures import give, parse
from _stage import make_spec, prepare

from upvla import stack
from upvla.launch.jobs import Jobs
from upvla.launch.train import TrainSpec, run_training
from upvla.store import Store

_STEP = re.compile(r"startup +1/")
_STAGE = {"name": "startup", "weights": {"pre": 1.0, "act": 1.0}, "micro_batch": 4, "log_every": 1, "steps": 3}


def seconds_to_first_step(store: Store, spec: TrainSpec, url: str) -> float:
    told: list[float] = []

    def on_line(line: str) -> None:
        if _STEP.search(line):
            told.append(time.monotonic())

    began = time.monotonic()
    run_training(store, spec, Jobs(url), on_line=on_line, python=sys.executable)
    return told[0] - began


def measured(starts: int) -> dict[str, Any]:
    store, references = prepare(os.environ["UPVLA_STORE_URL"], recordings=4, global_batch=8)
    figures: dict[str, Any] = {}
    for workers in (1, 2):
        seconds = []
        for start in range(starts + 1):
            engine = {"num_workers": workers, "zero_stage": workers}
            spec = make_spec(store, references | {"seed": 10 * workers + start}, _STAGE, engine)
            seconds.append(seconds_to_first_step(store, spec, os.environ["UPVLA_RAY_JOBS_URL"]))
            _say(f"{workers} workers, start {start}: {seconds[-1]:.1f} s")
        figures[f"workers_{workers}"] = {"first_s": seconds[0], "median_s": statistics.median(seconds[1:])}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    options = parse(parser)
    with tempfile.TemporaryDirectory(prefix="upvla-bench-", ignore_cleanup_errors=True) as folder:
        config = stack.load_site("local").model_copy(update={"home": Path(folder), "num_cpus": 2})
        stack.up(config, progress=_say)
        try:
            os.environ.update(stack.environment(config))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as client:
                figures = client.submit(measured, options.starts).result()  # Ray reads the token's place when imported
        finally:
            stack.down(config, progress=_say)
    for name, row in figures.items():
        print(f"{name}: {row['median_s']:.1f} s to the first step ({row['first_s']:.1f} s the first time)")
    give(options, figures)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
