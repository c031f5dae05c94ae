"""UPVLA under DeepSpeed: workers whose micro-batches hold other kinds of rows stay in step, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.model.conftest import mini_batch, mini_model, take
from tests.train.toy import Workers
from upvla.train.config import EngineConfig, OptimizerConfig
from upvla.train.engine import build_engine

STEPS = 3


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.close()


def train(stage: int) -> list[float]:
    """Losses of a few steps; one worker has only robot rows, the other questions and one robot row."""
    model = mini_model()
    batch = mini_batch(model.config, rows=4, questions=3)
    optimizer = OptimizerConfig(lr=1e-3)
    engine = build_engine(
        model, EngineConfig(zero_stage=stage, num_workers=2), optimizer, total_steps=STEPS, micro_batch=4
    )
    mine = take(batch, slice(0, 3), slice(0, 0)) if engine.rank == 0 else take(batch, slice(3, 4), slice(0, 3))
    counts = engine.counts(mine)
    count = dict(zip(counts, engine.sum_over_workers(list(counts.values())), strict=True))
    found = []
    for _ in range(STEPS):
        losses = engine.forward(mine)
        loss = torch.stack([term.total / count[name] for name, term in losses.objectives.items()]).sum()
        engine.backward(loss)
        engine.step()
        found.append(engine.sum_over_workers([float(loss.detach())])[0])
    return found


@pytest.mark.seam
def test_every_zero_stage_learns_alike_when_workers_hold_other_kinds_of_rows(two_workers: Workers) -> None:
    reference = two_workers.run(train, 0)[0]
    assert reference[-1] < reference[0]
    for stage in (2, 3):
        assert two_workers.run(train, stage)[0] == pytest.approx(reference, rel=1e-5)
