"""fit(): the loop. It knows an engine, batches, a log callable and a save callable, and nothing else.

    step:  next micro-batches -> counts of the global batch -> forward, backward -> all finite? -> optimiser step

Every loss is sum / count over the *global* batch: counts are reduced over workers and accumulation before the first
backward, so a loss, and its gradient, do not depend on the number of workers. `step` counts global batches consumed:
one that is skipped counts, too, so the data's order and the schedule stay functions of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from upvla.errors import BadStep, Mismatch, StoreError, UpvlaError
from upvla.train.config import StageConfig
from upvla.train.engine import Engine
from upvla.train.guard import Best, Guard
from upvla.train.meter import Meter
from upvla.types import Batch, Losses

Log = Callable[[Mapping[str, float], int], None]


class Ended(NamedTuple):
    """Where `fit` stopped, and why: `finished`, `early`, or what `asked` said."""

    step: int
    reason: str


def fit(
    engine: Engine,
    batches: Iterator[list[Batch]],
    config: StageConfig,
    *,
    start_step: int,
    validation: Sequence[Batch],
    log: Log,
    save: Callable[[int], None],
    picture: Callable[[int], None] = lambda step: None,
    meter: Meter | None = None,
    guard: Guard | None = None,
    best: Best | None = None,
    asked: Callable[[], str] = lambda: "",
) -> Ended:
    """Train until `config.steps` steps are done, from `start_step`, or until it is time to stop.

    `batches` yields this worker's micro-batches of global step `start_step`, then of the next. `validation` is this
    worker's share of the held-out batches; it is judged before step 0, every `eval_every` steps and at the end.
    `log`, `save` and `picture` are called on every worker (the last two are collective). `asked` gives a reason, on
    any worker and cheaply, when everybody should save and leave. Raises `BadStep` on all workers, before the optimiser
    has moved, when `guard` does not let a bad step pass; the message names the mixture positions.
    """
    meter, guard = meter or Meter(), guard or Guard(config.guard)
    if best is not None and best.exhausted:  # a life that was cut off after its last save had come so far
        return Ended(start_step, "early")
    if start_step == 0:
        with meter.paused():
            log(validate(engine, validation), 0)
    for step in range(start_step + 1, config.steps + 1):
        with meter.waiting():
            micro_batches, unread = _next(batches)
        try:
            found = train_step(engine, micro_batches, config.weights, step, guard, unread, asked())
        except BadStep as bad:
            guard.record(bad)
            found = Step({}, "")
        meter.count(micro_batches)
        last = step == config.steps
        if last or step % config.log_every == 0:
            log(found.metrics | {"train/bad_steps": len(guard.bad_steps)} | meter.read(engine), step)
        better = False
        if last or step % config.eval_every == 0:
            with meter.paused():
                held_out = validate(engine, validation)
                log(held_out, step)
            better = best is not None and best.see(held_out, step)
        if config.picture_every and step % config.picture_every == 0:
            with meter.paused():
                picture(step)
        early = best is not None and best.exhausted
        if last or early or better or found.asked or step % config.save_every == 0:
            with meter.paused(stalls=True):
                save(step)
        if early or (found.asked and not last):
            return Ended(step, "early" if early else found.asked)
    return Ended(config.steps, "finished")


class Step(NamedTuple):
    metrics: dict[str, float]
    asked: str


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    weights: Mapping[str, float],
    step: int,
    guard: Guard,
    unread: str = "",
    asked: str = "",
) -> Step:
    """One optimiser step on one global batch: its losses, gradient norm and learning rate, and what anybody asked."""
    objectives = sorted(name for name, weight in weights.items() if weight > 0)
    sums = _Sums()
    try:
        counts, asked = _global_counts(engine, micro_batches, objectives, step, unread, asked)
        for i, batch in enumerate(micro_batches):
            losses = engine.forward(batch)
            engine.backward(_weighted(losses, weights, counts))
            sums.add(losses)
            if i + 1 < len(micro_batches):
                engine.end_micro_batch()
        means = sums.means(engine)
        _require_finite(engine, means, sums, micro_batches, step)
    except BadStep:
        engine.discard_step()
        raise
    info = engine.step(guard.accepts if guard.judges_norms else None)
    if not info.applied:
        what = "a spike beside those before" if math.isfinite(info.grad_norm) else "not finite"
        positions = _positions(engine, micro_batches)
        raise BadStep(
            f"step {step}: the gradient norm {info.grad_norm:.4g} is {what}, the optimiser was not moved; the global "
            f"batch holds mixture positions {positions}",
            step,
            tuple(positions),
        )
    guard.accepted(info.grad_norm)
    total = sum(weights[name] * means[f"loss/{name}"] for name in objectives if f"loss/{name}" in means)
    return Step(means | {"loss/total": total, "train/grad_norm": info.grad_norm, "train/lr": info.lr}, asked)


def validate(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of every objective and watched value over held-out batches, as `val_loss/*` and `val_watch/*`."""
    sums = _Sums()
    with engine.evaluating():
        for batch in batches:
            sums.add(engine.forward(batch))
    return {f"val_{name}": value for name, value in sums.means(engine).items()}


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


def _next(batches: Iterator[list[Batch]]) -> tuple[list[Batch], str]:
    """This worker's micro-batches, or why they cannot be read: the others must hear of it before they wait.

    A store that is away says nothing about a sample: that ends this worker, and the group starts again.
    """
    try:
        return next(batches), ""
    except StoreError:
        raise
    except UpvlaError as error:
        return [], str(error)


def _global_counts(
    engine: Engine,
    micro_batches: list[Batch],
    objectives: Sequence[str],
    step: int,
    unread: str,
    asked: str,
) -> tuple[dict[str, float], str]:
    """Also where a batch that cannot be read or is refused stops all workers together, instead of leaving the others
    waiting, and where all hear at the same step that one was asked to leave."""
    local = dict.fromkeys(objectives, 0.0)
    refused = unread
    try:
        for batch in micro_batches:
            counts = engine.counts(batch)
            if unknown := sorted(set(objectives) - set(counts)):
                raise Mismatch(f"objective {unknown[0]!r} is weighted but the module counts only {sorted(counts)}")
            local = {name: local[name] + float(counts[name]) for name in objectives}
        if not refused and len(micro_batches) != engine.accumulation:
            raise Mismatch(
                f"got {len(micro_batches)} micro-batches, the engine accumulates {engine.accumulation}; build loader "
                "and engine from the same global_batch, num_workers and micro_batch"
            )
    except Mismatch as error:
        refused = str(error)
    *totals, num_refused, num_asked = engine.sum_over_workers([*local.values(), bool(refused), bool(asked)])
    if num_refused:
        reasons = "; ".join(f"worker {i}: {reason}" for i, reason in enumerate(engine.gather(refused)) if reason)
        positions = tuple(range((step - 1) * engine.global_batch, step * engine.global_batch))
        raise BadStep(f"step {step}: the optimiser was not moved, the batch is refused: {reasons}", step, positions)
    if num_asked:
        asked = next(reason for reason in engine.gather(asked) if reason)
    return dict(zip(objectives, totals, strict=True)), asked


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
    if bad:
        positions = _positions(engine, [micro_batches[i] for i in sums.bad_micro_batches()])
        raise BadStep(
            f"step {step}: {', '.join(bad)} is not finite, the optimiser was not moved; the micro-batches that gave it "
            f"hold mixture positions {positions}",
            step,
            tuple(positions),
        )


def _positions(engine: Engine, micro_batches: Sequence[Batch]) -> list[int]:
    """Mixture positions of all workers' `micro_batches`, sorted. Collective."""
    return sorted(p for worker in engine.gather([int(p) for b in micro_batches for p in b.positions]) for p in worker)
