"""The loop on real DeepSpeed engines, one and two processes on gloo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.toy import GLOBAL_BATCH, Workers, batches, toy
from upvla.errors import BadStep, ConfigError, Mismatch
from upvla.train.engine import Engine, EngineConfig, OptimizerConfig, build_engine
from upvla.train.loop import StageConfig, fit
from upvla.types import Batch

pytestmark = pytest.mark.seam
STEPS = 6
WEIGHTS = {"act": 1.0, "mmu": 0.1}


def stage(**changes: Any) -> StageConfig:
    values = {"name": "toy", "steps": STEPS, "weights": WEIGHTS, "micro_batch": 1, "log_every": 1, "eval_every": 3}
    return StageConfig.model_validate(values | changes)


def engine(zero_stage: int, accumulation: int = 1, freeze: tuple[str, ...] = (), **config: Any) -> Engine:
    world_size = torch.distributed.get_world_size()
    return build_engine(
        toy(),
        EngineConfig(num_workers=world_size, zero_stage=zero_stage, **config),
        OptimizerConfig(lr=1e-2, warmup_steps=1),
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // world_size // accumulation,
        accumulation=accumulation,
        freeze=freeze,
    )


def train(zero_stage: int, accumulation: int = 1, freeze: tuple[str, ...] = (), **config: Any) -> dict[str, Any]:
    built = engine(zero_stage, accumulation, freeze, **config)
    logged: list[tuple[int, dict[str, float]]] = []
    saved: list[int] = []
    fit(
        built,
        batches(built.rank, built.world_size, accumulation),
        stage(save_every=4),
        start_step=0,
        validation=next(batches(built.rank, built.world_size, start_step=1000)),
        log=lambda metrics, step: logged.append((step, dict(metrics))),
        save=saved.append,
    )
    weights = {name: tensor.numpy() for name, tensor in built.full_weights().items()}
    return {"logged": logged, "saved": saved, "weights": weights}


def curve(result: dict[str, Any], name: str) -> dict[int, float]:
    return {step: metrics[name] for step, metrics in result["logged"] if name in metrics}


@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_every_zero_stage_gives_the_same_run(workers: str, request: pytest.FixtureRequest) -> None:
    group: Workers = request.getfixturevalue(workers)
    whole, *sharded = [group.run(train, zero_stage)[0] for zero_stage in (0, 1, 2, 3)]
    for result in sharded:
        for name in ("loss/act", "loss/mmu", "loss/total", "train/grad_norm", "train/lr", "val_loss/act"):
            assert curve(result, name) == pytest.approx(curve(whole, name), abs=1e-6), name
        for name, weight in whole["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=1e-6, err_msg=name)


def test_losses_do_not_depend_on_workers_or_accumulation(one_worker: Workers, two_workers: Workers) -> None:
    """Counts differ between micro-batches (padding, unsupervised words), so means of means would show here."""
    alone = one_worker.run(train, 2)[0]
    for other in (two_workers.run(train, 2)[0], two_workers.run(train, 2, 2)[0], one_worker.run(train, 2, 4)[0]):
        for name in ("loss/act", "loss/mmu", "val_loss/mmu", "train/grad_norm"):
            assert curve(other, name) == pytest.approx(curve(alone, name), rel=1e-5), name
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(other["weights"][name], weight, atol=1e-5, err_msg=name)


def reference_means() -> dict[str, float]:
    with torch.no_grad():
        losses = toy()(Batch(*(torch.from_numpy(a) for a in next(batches(0, 1))[0])))
    return {name: float(term.total / term.count) for name, term in losses.objectives.items()}


def test_first_loss_is_the_plain_mean_over_the_global_batch(two_workers: Workers) -> None:
    logged = dict(two_workers.run(train, 2)[0]["logged"][1:2])[1]
    for name, mean in reference_means().items():
        assert logged[f"loss/{name}"] == pytest.approx(mean, rel=1e-5)
    assert logged["loss/total"] == pytest.approx(sum(WEIGHTS[n] * m for n, m in reference_means().items()), rel=1e-5)


def test_validation_and_saving_happen_when_they_should_and_training_learns(one_worker: Workers) -> None:
    result = one_worker.run(train, 1)[0]
    assert list(curve(result, "val_loss/act")) == [0, 3, 6]
    assert list(curve(result, "loss/act")) == [1, 2, 3, 4, 5, 6]
    assert result["saved"] == [4, 6]
    assert curve(result, "val_loss/act")[6] < curve(result, "val_loss/act")[0]
    speed = [metrics for _, metrics in result["logged"] if "speed/samples_per_s" in metrics]
    assert len(speed) == STEPS
    assert all(metrics["speed/samples_per_s"] > 0 and 0 <= metrics["speed/data_wait_pct"] <= 100 for metrics in speed)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_frozen_parameters_neither_learn_nor_decay(two_workers: Workers, zero_stage: int) -> None:
    before = {name: tensor.numpy() for name, tensor in toy().state_dict().items()}
    after = two_workers.run(train, zero_stage, 1, ("action_head.*", "table.*"))[0]["weights"]
    for name, weight in before.items():
        frozen = name.startswith(("action_head.", "table."))
        assert np.array_equal(after[name], weight) == frozen, name


def test_bf16_stays_close_to_float32(two_workers: Workers) -> None:
    full = curve(two_workers.run(train, 2)[0], "loss/total")
    half = curve(two_workers.run(train, 2, 1, (), precision="bf16")[0], "loss/total")
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


def poisoned(rank: int, world_size: int) -> Iterator[list[Batch]]:
    for step, micro_batches in enumerate(batches(rank, world_size, 2)):
        if step == 2 and rank == world_size - 1:
            broken = micro_batches[1].actions.copy()
            broken[0] = np.nan
            micro_batches[1] = micro_batches[1]._replace(actions=broken, action_is_pad=np.zeros(broken.shape[:2], bool))
        yield micro_batches


def train_poisoned() -> tuple[str, bool]:
    built = engine(2, accumulation=2)
    steps: list[int] = []
    try:
        fit(
            built,
            poisoned(built.rank, built.world_size),
            stage(eval_every=100),
            start_step=0,
            validation=[],
            log=lambda metrics, step: steps.append(step),
            save=steps.append,
        )
    except BadStep as error:
        clean = all(np.isfinite(w.numpy()).all() for w in built.full_weights().values())
        return str(error), clean and steps == [0, 1, 2]
    return "", False


def test_a_loss_that_is_not_finite_stops_every_worker_before_the_step_and_names_the_samples(
    two_workers: Workers,
) -> None:
    messages = two_workers.run(train_poisoned)
    for message, untouched in messages:
        assert "step 3: loss/act is not finite" in message
        assert "[21, 23]" in message  # rank 1 holds 17, 19, 21, 23 of step 3; its second micro-batch was poisoned
        assert untouched


def refused_on_one_worker() -> str:
    built = engine(1)

    def counts(batch: Batch) -> dict[str, float]:
        if built.rank == 1:
            raise Mismatch("actions: row 0 (position 1) is not finite")
        return toy().counts(batch)

    built.counts = counts  # type: ignore[method-assign]
    try:
        fit(built, batches(built.rank, 2), stage(), start_step=0, validation=[], log=lambda m, s: None, save=print)
    except BadStep as error:
        return str(error)
    return ""


def test_a_batch_that_one_worker_refuses_stops_all(two_workers: Workers) -> None:
    messages = two_workers.run(refused_on_one_worker)
    assert messages[0] == messages[1]
    assert "step 1: the optimiser was not moved" in messages[0]
    assert "worker 1: actions: row 0 (position 1) is not finite" in messages[0]


def wrong_accumulation() -> None:
    built = engine(1, accumulation=2)
    fit(built, batches(0, 1, 1), stage(), start_step=0, validation=[], log=lambda m, s: None, save=lambda s: None)


def unknown_objective() -> None:
    built = engine(1)
    config = stage(weights={"vq": 1.0})
    fit(built, batches(0, 1, 1), config, start_step=0, validation=[], log=lambda m, s: None, save=lambda s: None)


def test_mistakes_are_named(one_worker: Workers) -> None:
    with pytest.raises(Mismatch, match="got 1 micro-batches, the engine accumulates 2"):
        one_worker.run(wrong_accumulation)
    with pytest.raises(
        BadStep, match=r"worker 0: objective 'vq' is weighted but the module counts only \['act', 'mmu'\]"
    ):
        one_worker.run(unknown_objective)
    with pytest.raises(
        ConfigError, match=r"'head.\*' names no parameter; top-level modules are \['action_head', 'body'"
    ):
        one_worker.run(train, 1, 1, ("head.*",))


def test_lr_follows_the_schedule(one_worker: Workers) -> None:
    rates = curve(one_worker.run(train, 2)[0], "train/lr")
    assert rates[1] == 0.0
    assert rates[2] == 1e-2
    assert rates[6] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))
