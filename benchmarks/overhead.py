"""What Ray, DeepSpeed and our loop cost on top of a bare PyTorch loop, a step.

    python benchmarks/overhead.py [--rows 128] [--steps 20] [--stages 0 1 2 3] [--no-pair] [--json [FILE]]

The same `tiny` policy, the same batch, the same AdamW, one thread each. The bare loop is what one would write by
hand: forward, backward, clip, step. Ours is `upvla.train.loop.fit` on the DeepSpeed engine in a Ray Train worker. Both
live in processes of their own and take turns, one step at a time, so that the machine's noise falls on both; the ratio
is the median of the ratios of neighbouring steps. A step's number says on which core both take it: two cores of a
shared machine are not equally fast. ZeRO 0 to 3 with one worker: nothing is exchanged, all of it is overhead.
All of it has the memory allocator's settings of a training job (`upvla.launch.train.ALLOCATOR`).
CPU seconds of the step's own process are shown beside the wall clock: other work on the machine hardly changes those.
The last columns are the milliseconds that forward, backward, the optimiser and all the rest take more (or fewer).

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from _allocator import as_in_a_training_job
from _figures import give, parse
from model_step import make_batch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from upvla.model.config import preset
from upvla.model.upvla import UPVLA
from upvla.types import Batch

Spent = dict[str, float]  # seconds
PARTS = ("forward", "backward", "step")
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

    def done(self, number: int, spent: Spent) -> None:
        path = self._folder / f"{self._side}-{number}.json"
        path.with_suffix(".part").write_text(json.dumps(spent))
        path.with_suffix(".part").rename(path)

    def answer(self, side: str, number: int) -> Spent:
        path = self._folder / f"{side}-{number}.json"
        while not path.exists():
            time.sleep(_POLL_S)
        return dict(json.loads(path.read_text()))


class Clock:
    """Seconds of one step: by the wall, of this process, and of the parts that are timed."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._wall, self._cpu, self._parts = time.perf_counter(), time.process_time(), dict.fromkeys(PARTS, 0.0)

    def end(self) -> Spent:
        wall = time.perf_counter() - self._wall
        rest = wall - sum(self._parts.values())
        return {"wall": wall, "cpu": time.process_time() - self._cpu, **self._parts, "rest": rest}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self._parts[part] += time.perf_counter() - began

        return run


def use_core(number: int) -> None:
    """The calling thread, which is the one that computes, takes step `number` on this core, whichever side it is."""
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})


def data(rows: int) -> tuple[UPVLA, Batch]:
    torch.manual_seed(0)
    config = preset("tiny")
    batch, _ = make_batch(config, rows - rows // 4, rows // 4)
    return UPVLA(config).train(), batch


def bare(rows: int) -> Iterator[Spent]:
    """One hand-written step after another."""
    model, batch = data(rows)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    clock = Clock()

    def forward() -> torch.Tensor:
        terms = model(batch).objectives
        return torch.stack([WEIGHTS[name] * term.total / term.count for name, term in terms.items()]).sum()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    while True:
        clock.begin()
        loss = clock.timed("forward", forward)()
        clock.timed("backward", loss.backward)()
        clock.timed("step", step)()
        loss.item()
        yield clock.end()


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
    clock = Clock()
    for part in PARTS:
        setattr(engine, part, clock.timed(part, getattr(engine, part)))

    def batches() -> Iterator[list[Batch]]:
        for number in range(steps):
            turns.wait(number)
            if workers == 1:
                use_core(number)
            clock.begin()
            yield [batch]

    def log(metrics: Any, step: int) -> None:
        if "loss/total" in metrics:
            turns.done(step - 1, clock.end())

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
    hand, loop = list[Spent](), list[Spent]()
    with tempfile.TemporaryDirectory(prefix="upvla-overhead-") as folder:
        turns, by_hand = Turns(folder, "bare"), bare(rows)
        with training(folder, zero_stage, rows, steps + 1, num_workers=1):
            for number in range(steps + 1):  # the first of each is warm-up
                turns.give("ours0", number)
                loop.append(turns.answer("ours0", number))
                use_core(number)
                hand.append(next(by_hand))
    pairs = list(zip(loop[1:], hand[1:], strict=True))
    found = {}
    for name in ("wall", "cpu"):
        found |= {
            f"{side}_{name}_ms": 1e3 * median(p[i][name] for p in pairs) for i, side in enumerate(("ours", "bare"))
        }
        found[f"overhead_{name}_pct"] = 100.0 * (median(ours_[name] / bare_[name] for ours_, bare_ in pairs) - 1.0)
    more = {name: median(ours_[name] - bare_[name] for ours_, bare_ in pairs) for name in (*PARTS, "rest")}
    return found | {f"more_{name}_ms": 1e3 * seconds for name, seconds in more.items()}


def alone(folder: str, core: int, number: int, rows: int, steps: int) -> None:
    """A process of its own on a core of its own: bare steps, each when it is its turn."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    turns, by_hand = Turns(folder, f"alone{number}"), bare(rows)
    for step in range(steps):
        turns.wait(step)
        turns.done(step, next(by_hand))


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
                    walls = [turns.answer(f"{kind}{side}", number)["wall"] for side in range(2)]
                    rates[kind].append(sum(rows / wall for wall in walls) if kind == "alone" else 2 * rows / max(walls))
                shares.append(rates["ours"][-1] / rates["alone"][-1])
        for process in singles:
            process.join()
    return {f"{kind}_rows_per_s": median(found[1:]) for kind, found in rates.items()} | {"ratio": median(shares[1:])}


def _fit(trainer: TorchTrainer) -> None:
    trainer.fit()


def main() -> None:
    as_in_a_training_job()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=128, help="of the global batch; a step should take a second or more"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--no-pair", dest="pair", action="store_false")
    options = parse(parser)
    os.environ.setdefault("RAY_worker_niceness", "0")  # as on the stack: Ray's own 15 would yield to everything else
    torch.set_num_threads(1)
    here = str(Path(__file__).parent)  # the workers import this file's neighbours
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = {}
    parts = (*PARTS, "rest")
    heads = "".join(f"{f'+{name}':>10}" for name in parts)
    print(f"{'':<8} {'bare ms':>9} {'ours ms':>9} {'more':>7}   {'bare CPU':>9} {'ours CPU':>9} {'more':>7}{heads}")
    for zero_stage in options.stages:
        row = compare(zero_stage, options.rows, options.steps)
        found[f"zero{zero_stage}"] = row
        wall, cpu = (
            f"{row[f'bare_{n}_ms']:>9.0f} {row[f'ours_{n}_ms']:>9.0f} {row[f'overhead_{n}_pct']:>6.1f}%"
            for n in ("wall", "cpu")
        )
        print(
            f"ZeRO {zero_stage:<3} {wall}   {cpu}" + "".join(f"{row[f'more_{p}_ms']:>10.1f}" for p in parts), flush=True
        )
    if options.pair:
        found["two_workers"] = pair(2, options.rows, options.steps)
        print("two workers (ZeRO 2) over two pinned processes: {ratio:.3f}".format(**found["two_workers"]))
    print(f"{options.rows} rows, one thread, load {os.getloadavg()[0]:.1f}")
    give(options, found)
    ray.shutdown()


if __name__ == "__main__":
    main()
