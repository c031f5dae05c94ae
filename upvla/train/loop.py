"""fit(): the loop. It knows an engine, batches, a log callable and a save callable, and nothing else.

    step:  next micro-batches -> counts of the global batch -> forward, backward -> all finite? -> optimiser step

Every loss is sum / count over the *global* batch: counts are reduced over workers and accumulation before the first
backward, so a loss, and its gradient, do not depend on the number of workers. `step` counts finished optimiser steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from upvla.errors import BadStep, Mismatch
from upvla.train.config import StageConfig
from upvla.train.engine import Engine
from upvla.types import Batch, Losses

__all__ = ["Meter", "StageConfig", "fit", "validate"]

Log = Callable[[Mapping[str, float], int], None]


def fit(
    engine: Engine,
    batches: Iterator[list[Batch]],
    config: StageConfig,
    *,
    start_step: int,
    validation: Sequence[Batch],
    log: Log,
    save: Callable[[int], None],
) -> None:
    """Train until `config.steps` optimiser steps are done, from `start_step`.

    `batches` yields this worker's micro-batches of global step `start_step`, then of the next. `validation` is this
    worker's share of the held-out batches; it is judged before step 0, every `eval_every` steps and at the end.
    `log` and `save` are called on every worker (`save` is collective). Raises `BadStep` on all workers, before the
    optimiser has moved, when a loss is not finite; the message names the mixture positions.
    """
    meter = Meter()
    if start_step == 0:
        log(validate(engine, validation), 0)
    for step in range(start_step + 1, config.steps + 1):
        with meter.waiting():
            micro_batches = next(batches)
        metrics = train_step(engine, micro_batches, config.weights, step)
        meter.count(micro_batches)
        last = step == config.steps
        if last or step % config.log_every == 0:
            log(metrics | meter.read(engine), step)
        if last or step % config.eval_every == 0:
            log(validate(engine, validation), step)
            meter.restart()
        if last or step % config.save_every == 0:
            save(step)
            meter.restart()


def train_step(engine: Engine, micro_batches: list[Batch], weights: Mapping[str, float], step: int) -> dict[str, float]:
    """One optimiser step on one global batch; returns its losses, gradient norm and learning rate."""
    if len(micro_batches) != engine.accumulation:
        raise Mismatch(
            f"step {step}: got {len(micro_batches)} micro-batches, the engine accumulates {engine.accumulation}; "
            "build loader and engine from the same global_batch, num_workers and micro_batch"
        )
    objectives = sorted(name for name, weight in weights.items() if weight > 0)
    counts = _global_counts(engine, micro_batches, objectives, step)
    sums = _Sums()
    for i, batch in enumerate(micro_batches):
        losses = engine.forward(batch)
        engine.backward(_weighted(losses, weights, counts))
        sums.add(losses)
        if i + 1 < len(micro_batches):
            engine.end_micro_batch()
    means = sums.means(engine)
    _require_finite(engine, means, sums, micro_batches, step)
    info = engine.step()
    total = sum(weights[name] * means[f"loss/{name}"] for name in objectives if f"loss/{name}" in means)
    return means | {"loss/total": total, "train/grad_norm": info.grad_norm, "train/lr": info.lr}


def validate(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of every objective and watched value over held-out batches, as `val_loss/*` and `val_watch/*`."""
    sums = _Sums()
    with engine.evaluating():
        for batch in batches:
            sums.add(engine.forward(batch))
    return {f"val_{name}": value for name, value in sums.means(engine).items()}


class Meter:
    """Throughput between two readings: rows a second, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, so that validation and saving do not count as training time."""
        self._began = time.perf_counter()
        self._waited = 0.0
        self._rows = 0
        self._steps = 0

    def waiting(self) -> _Waiting:
        return _Waiting(self)

    def count(self, micro_batches: list[Batch]) -> None:
        self._rows += sum(len(batch.positions) for batch in micro_batches)
        self._steps += 1

    def read(self, engine: Engine) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        rows, waited, wall = engine.sum_over_workers([self._rows, self._waited, elapsed])
        steps = max(self._steps, 1)
        self.restart()
        return {
            "speed/samples_per_s": rows / (wall / engine.world_size),
            "speed/step_s": wall / engine.world_size / steps,
            "speed/data_wait_pct": 100.0 * waited / wall,
        }


class _Waiting:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter._waited += time.perf_counter() - self._began


class _Sums:
    """Running (total, count) of every term on this worker, as detached tensors: nothing waits for the device."""

    def __init__(self) -> None:
        self._terms: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, losses: Losses) -> None:
        for prefix, terms in (("loss/", losses.objectives), ("watch/", losses.watched)):
            for name, term in terms.items():
                pair = (torch.as_tensor(term.total).detach(), torch.as_tensor(term.count).detach())
                self._terms.setdefault(prefix + name, []).append(pair)

    def means(self, engine: Engine) -> dict[str, float]:
        """Over all workers; a term that no row of the global batch supervises is left out."""
        names = sorted(self._terms)
        flat = [float(sum(float(pair[i]) for pair in self._terms[name])) for name in names for i in (0, 1)]
        reduced = engine.sum_over_workers(flat)
        return {name: reduced[2 * i] / reduced[2 * i + 1] for i, name in enumerate(names) if reduced[2 * i + 1] != 0}

    def bad_micro_batches(self) -> list[int]:
        """Which of this worker's micro-batches gave a term that is not finite."""
        length = max((len(pairs) for pairs in self._terms.values()), default=0)
        return [
            i
            for i in range(length)
            if any(not math.isfinite(float(p[i][0])) for name, p in self._terms.items() if name.startswith("loss/"))
        ]


def _global_counts(
    engine: Engine, micro_batches: list[Batch], objectives: Sequence[str], step: int
) -> dict[str, float]:
    """Also where a batch that the module refuses stops all workers together, instead of leaving the others waiting."""
    local = dict.fromkeys(objectives, 0.0)
    refused = ""
    try:
        for batch in micro_batches:
            counts = engine.counts(batch)
            if unknown := sorted(set(objectives) - set(counts)):
                raise Mismatch(f"objective {unknown[0]!r} is weighted but the module counts only {sorted(counts)}")
            local = {name: local[name] + float(counts[name]) for name in objectives}
    except Mismatch as error:
        refused = f"worker {engine.rank}: {error}"
    totals = engine.sum_over_workers([*local.values(), float(bool(refused))])
    if totals[-1]:
        reasons = "; ".join(reason for reason in engine.gather(refused) if reason)
        raise BadStep(f"step {step}: the optimiser was not moved, the batch is refused: {reasons}")
    return dict(zip(objectives, totals, strict=False))


def _weighted(losses: Losses, weights: Mapping[str, float], counts: Mapping[str, float]) -> torch.Tensor:
    """This micro-batch's part of the loss. An objective without rows adds 0 times its total, to keep one graph."""
    parts = [
        losses.objectives[name].total * (weights[name] / count if count > 0 else 0.0) for name, count in counts.items()
    ]
    return torch.stack(parts).sum()


def _require_finite(
    engine: Engine, means: Mapping[str, float], sums: _Sums, micro_batches: list[Batch], step: int
) -> None:
    bad = sorted(name for name, value in means.items() if name.startswith("loss/") and not math.isfinite(value))
    if not bad:
        return
    mine = [int(p) for i in sums.bad_micro_batches() for p in micro_batches[i].positions]
    positions = sorted(p for worker in engine.gather(mine) for p in worker)
    raise BadStep(
        f"step {step}: {', '.join(bad)} is not finite, the optimiser was not moved; the micro-batches that gave it "
        f"hold mixture positions {positions}. Look at these samples, or lower optimizer.lr and resume"
    )
