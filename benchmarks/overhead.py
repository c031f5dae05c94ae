"""What Ray, DeepSpeed and our loop cost on top of a bare PyTorch loop, a step.

    python benchmarks/overhead.py [--rows 128] [--steps 20] [--stages 0 1 2 3] [--no-pair] [--json FILE]

The same `tiny` policy, the same batch, the same AdamW, one thread each. The bare loop is what one would write by
hand: forward, backward, clip, step. Ours is `upvla.train.loop.fit` on the DeepSpeed engine in a Ray Train worker. Both
live in processes of their own and take turns, one step at a time, so that the machine's noise falls on both; the ratio
is the median of the ratios of neighbouring steps. A step's number says on which core both take it: two cores of a
shared machine are not equally fast. ZeRO 0 to 3 with one worker: nothing is exchanged, all of it is overhead.
All of it has the memory allocator's settings of a training job (`upvla.launch.train.ALLOCATOR`).
CPU seconds of the step's own thread are shown beside the wall clock: other work on the machine does not change those.

Then two workers, who exchange gradients, take turns with two bare loops, each pinned to a core of its own, which know
nothing of each other: the ratio of rows a second is what training together costs (`--no-pair` leaves it out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from _allocator import as_in_a_training_job
from model_step import make_batch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from upvla.model.config import preset
from upvla.model.upvla import UPVLA
from upvla.types import Batch

WEIGHTS = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
LR, CLIP = 1e-4, 1.0
_POLL_S = 0.001
CORES = sorted(os.sched_getaffinity(0))[:2]


class Turns:
    """Who may take a step: a file that names the side and the number. Waiting costs a look a millisecond."""

    def __init__(self, folder: str, side: str) -> None:
        self._folder, self._side = Path(folder), side

    def wait(self, number: int) -> None:
        while not (self._folder / f"{self._side}-{number}.go").exists():
            time.sleep(_POLL_S)

    def give(self, side: str, number: int) -> None:
        (self._folder / f"{side}-{number}.go").touch()

    def done(self, number: int, wall_s: float, cpu_s: float) -> None:
        path = self._folder / f"{self._side}-{number}.json"
        path.with_suffix(".part").write_text(json.dumps([wall_s, cpu_s]))
        path.with_suffix(".part").rename(path)

    def answer(self, side: str, number: int) -> tuple[float, float]:
        path = self._folder / f"{side}-{number}.json"
        while not path.exists():
            time.sleep(_POLL_S)
        wall_s, cpu_s = json.loads(path.read_text())
        return float(wall_s), float(cpu_s)


def use_core(number: int) -> None:
    """The calling thread, which is the one that computes, takes step `number` on this core, whichever side it is."""
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})


def data(rows: int) -> tuple[UPVLA, Batch]:
    torch.manual_seed(0)
    config = preset("tiny")
    batch, _ = make_batch(config, rows - rows // 4, rows // 4)
    return UPVLA(config).train(), batch


def bare(rows: int) -> Iterator[tuple[float, float]]:
    """Seconds, wall and CPU, of one hand-written step after another."""
    model, batch = data(rows)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    while True:
        began, cpu = time.perf_counter(), time.process_time()
        terms = model(batch).objectives
        loss = torch.stack([WEIGHTS[name] * term.total / term.count for name, term in terms.items()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        yield time.perf_counter() - began, time.process_time() - cpu


def ours(settings: dict[str, Any]) -> None:
    """A Ray Train worker: one `fit`, whose every step waits for its turn."""
    from upvla.train.config import EngineConfig, OptimizerConfig, StageConfig
    from upvla.train.engine import build_engine
    from upvla.train.loop import fit

    torch.set_num_threads(1)
    rows, steps, workers = settings["rows"], settings["steps"], torch.distributed.get_world_size()
    model, batch = data(rows)
    turns = Turns(settings["folder"], f"ours{torch.distributed.get_rank()}")
    stage = StageConfig(name="t", steps=steps, weights=WEIGHTS, micro_batch=rows, log_every=1, eval_every=steps)
    config = EngineConfig(num_workers=workers, zero_stage=settings["zero_stage"], gradient_clipping=CLIP)
    engine = build_engine(model, config, OptimizerConfig(lr=LR), total_steps=steps, micro_batch=rows)
    began = [0.0, 0.0]

    def batches() -> Iterator[list[Batch]]:
        for number in range(steps):
            turns.wait(number)
            if workers == 1:
                use_core(number)
            began[:] = time.perf_counter(), time.process_time()
            yield [batch]

    def log(metrics: Any, step: int) -> None:
        if "loss/total" in metrics:
            turns.done(step - 1, time.perf_counter() - began[0], time.process_time() - began[1])

    fit(engine, batches(), stage, start_step=0, validation=[], log=log, save=lambda step: None)


@contextmanager
def training(folder: str, zero_stage: int, rows: int, steps: int, num_workers: int) -> Iterator[None]:
    """Inside, workers under Ray Train take a step when it is their turn."""
    trainer = TorchTrainer(
        ours,
        train_loop_config={"folder": folder, "zero_stage": zero_stage, "rows": rows, "steps": steps},
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="overhead", storage_path=folder),
    )
    task = ray.remote(num_cpus=0)(_fit).remote(trainer)
    yield
    ray.get(task)


def compare(zero_stage: int, rows: int, steps: int) -> dict[str, float]:
    hand, loop = [], []
    with tempfile.TemporaryDirectory(prefix="upvla-overhead-") as folder:
        turns, by_hand = Turns(folder, "bare"), bare(rows)
        with training(folder, zero_stage, rows, steps + 1, num_workers=1):
            for number in range(steps + 1):  # the first of each is warm-up
                turns.give("ours0", number)
                loop.append(turns.answer("ours0", number))
                use_core(number)
                hand.append(next(by_hand))
    found = {}
    for name, index in (("wall", 0), ("cpu", 1)):
        ours_s, bare_s = ([step[index] for step in steps_[1:]] for steps_ in (loop, hand))
        found |= {f"bare_{name}_ms": 1e3 * median(bare_s), f"ours_{name}_ms": 1e3 * median(ours_s)}
        ratio = median(one / other for one, other in zip(ours_s, bare_s, strict=True))
        found[f"overhead_{name}_pct"] = 100.0 * (ratio - 1.0)
    return found


def alone(folder: str, core: int, number: int, rows: int, steps: int) -> None:
    """A process of its own on a core of its own: bare steps, each when it is its turn."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    turns, by_hand = Turns(folder, f"alone{number}"), bare(rows)
    for step in range(steps):
        turns.wait(step)
        turns.done(step, *next(by_hand))


def pair(zero_stage: int, rows: int, steps: int) -> dict[str, float]:
    """Rows a second of two workers together, over those of two pinned processes that share nothing."""
    shares = []
    rates: dict[str, list[float]] = {"alone": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="upvla-overhead-") as folder:
        work = [(folder, core, number, rows, steps + 1) for number, core in enumerate(CORES)]
        singles = [multiprocessing.get_context("spawn").Process(target=alone, args=each) for each in work]
        for process in singles:
            process.start()
        turns = Turns(folder, "judge")
        with training(folder, zero_stage, rows, steps + 1, num_workers=2):
            for number in range(steps + 1):
                for kind in rates:
                    for side in range(2):
                        turns.give(f"{kind}{side}", number)
                    walls = [turns.answer(f"{kind}{side}", number)[0] for side in range(2)]
                    rates[kind].append(sum(rows / wall for wall in walls) if kind == "alone" else 2 * rows / max(walls))
                shares.append(rates["ours"][-1] / rates["alone"][-1])
        for process in singles:
            process.join()
    return {f"{kind}_rows_per_s": median(found[1:]) for kind, found in rates.items()} | {"ratio": median(shares[1:])}


def _fit(trainer: TorchTrainer) -> None:
    trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=128, help="of the global batch; a step should take a second or more"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--no-pair", dest="pair", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    as_in_a_training_job()
    torch.set_num_threads(1)
    here = str(Path(__file__).parent)  # the workers import this file's neighbours
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = {}
    print(f"{'':<8} {'bare ms':>9} {'ours ms':>9} {'more':>7}   {'bare CPU':>9} {'ours CPU':>9} {'more':>7}")
    for zero_stage in options.stages:
        row = compare(zero_stage, options.rows, options.steps)
        found[f"zero{zero_stage}"] = row
        wall, cpu = (
            f"{row[f'bare_{n}_ms']:>9.0f} {row[f'ours_{n}_ms']:>9.0f} {row[f'overhead_{n}_pct']:>6.1f}%"
            for n in ("wall", "cpu")
        )
        print(f"ZeRO {zero_stage:<3} {wall}   {cpu}", flush=True)
    if options.pair:
        found["two_workers"] = pair(2, options.rows, options.steps)
        print("two workers (ZeRO 2) over two pinned processes: {ratio:.3f}".format(**found["two_workers"]))
    print(f"{options.rows} rows, one thread, load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    ray.shutdown()


if __name__ == "__main__":
    main()
