"""The loop on real DeepSpeed engines, one and two processes on gloo."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.faults.rows import told
from tests.train.toy import GLOBAL_BATCH, Workers, batches, toy
from upvla.errors import BadStep, ConfigError, Corrupt, Mismatch, StoreError
from upvla.train import meter as meter_module
from upvla.train.config import StageConfig
from upvla.train.engine import Engine, EngineConfig, OptimizerConfig, build_engine
from upvla.train.guard import Best, Guard
from upvla.train.loop import Ended, fit, validate
from upvla.train.meter import Meter, forward_flops
from upvla.types import Batch

pytestmark = pytest.mark.seam
STEPS = 6
WEIGHTS = {"act": 1.0, "mmu": 0.1}


def stage(**changes: Any) -> StageConfig:
    values = {"name": "toy", "steps": STEPS, "weights": WEIGHTS, "micro_batch": 1, "log_every": 1, "eval_every": 3}
    return StageConfig.model_validate(values | changes)


def engine(
    zero_stage: int, accumulation: int = 1, freeze: tuple[str, ...] = (), width: int = 12, **config: Any
) -> Engine:
    world_size = torch.distributed.get_world_size()
    return build_engine(
        toy(width=width),
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
    with pytest.raises(BadStep, match=r"step 1: .* worker 0: got 1 micro-batches, the engine accumulates 2"):
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


# ------------------------------------------------------------------------------------------------------ bad steps


class _Failing:
    """Global step 3 is bad on the last worker: a number that is not finite, a huge one, or a sample nobody can read.

    An iterator goes on after an error, as the loader does; a generator could not.
    """

    def __init__(self, rank: int, world_size: int, how: str) -> None:
        self._batches, self._how, self._step = batches(rank, world_size, 2), how, 0
        self._spoils = rank == world_size - 1

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        micro_batches, self._step = next(self._batches), self._step + 1
        if self._step != 3 or not self._spoils:
            return micro_batches
        if self._how == "unreadable":
            raise Corrupt("shard 3, row 17: not a JPEG")
        if self._how == "away":
            raise StoreError("s3://bucket/data: connection refused")
        broken = micro_batches[1].actions.copy()
        broken[0] = {"nan": np.nan, "spike": 1e4, "inf gradient": 1e25}[self._how]
        pad = np.zeros(broken.shape[:2], bool)
        return [micro_batches[0], micro_batches[1]._replace(actions=broken, action_is_pad=pad)]


def train_past(how: str, zero_stage: int, policy: dict[str, Any]) -> dict[str, Any]:
    built = engine(zero_stage, accumulation=2)
    config = stage(eval_every=100, save_every=100, guard=policy)
    guard = Guard(config.guard)
    logged: dict[int, dict[str, float]] = {}
    ended = fit(
        built,
        _Failing(built.rank, built.world_size, how),
        config,
        start_step=0,
        validation=[],
        log=lambda metrics, step: logged.setdefault(step, {}).update(metrics),
        save=lambda step: None,
        guard=guard,
    )
    weights = {name: tensor.numpy() for name, tensor in built.full_weights().items()}
    return {"ended": ended, "logged": logged, "bad_steps": guard.bad_steps, "weights": weights}


SKIP = {"on_bad_step": "skip", "spike_factor": 20.0, "spike_window": 4}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_bad_step_is_skipped_recorded_and_leaves_no_trace(two_workers: Workers, zero_stage: int) -> None:
    """However a step is bad, what follows is the same, and finite: nothing of its gradient is left anywhere."""
    found = {how: two_workers.run(train_past, how, zero_stage, SKIP)[0] for how in ("nan", "spike", "unreadable")}
    for how, result in found.items():
        assert result["ended"] == Ended(STEPS, "finished")
        (bad,) = result["bad_steps"]
        assert (bad["step"], bad["action"]) == (3, "skip")
        assert "optimiser was not moved" in bad["reason"]
        assert set(bad["positions"]) >= ({21, 23} if how != "unreadable" else set(range(16, 24))), "positions are named"
        assert [metrics["train/bad_steps"] for _, metrics in sorted(result["logged"].items())[1:]] == [0, 0, 1, 1, 1, 1]
        assert "loss/total" not in result["logged"][3]
        assert result["logged"][4]["train/lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 2 / 5)))
    equal = {
        (how, name): np.array_equal(weight, found["nan"]["weights"][name])
        for how, result in found.items()
        for name, weight in result["weights"].items()
    }
    fault = f"ZeRO {zero_stage}: step 3 is bad in three ways, and skipped"
    told(fault, lost_steps=0, bit_identical=all(equal.values()))
    assert all(equal.values()), equal


def test_without_a_policy_a_bad_gradient_stops_the_run(one_worker: Workers) -> None:
    with pytest.raises(BadStep, match=r"step 3: the gradient norm .* is a spike beside those before.*\[16, 17, 18"):
        one_worker.run(train_past, "spike", 2, SKIP | {"on_bad_step": "stop"})
    with pytest.raises(BadStep, match="not a JPEG"):
        one_worker.run(train_past, "unreadable", 1, {})
    with pytest.raises(BadStep, match="is not finite"):
        one_worker.run(train_past, "nan", 2, {"on_bad_step": "skip", "max_bad_steps": 0})


def test_a_store_that_is_away_is_no_bad_step(one_worker: Workers) -> None:
    """To pass over it would lose samples that are good: the worker ends, and Ray Train starts the group again."""
    with pytest.raises(StoreError, match="connection refused"):
        one_worker.run(train_past, "away", 2, SKIP)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_gradient_that_overflows_under_a_finite_loss_is_a_bad_step(two_workers: Workers, zero_stage: int) -> None:
    """DeepSpeed passes over such a step in silence and holds back the schedule; here it is counted and named."""
    result = two_workers.run(train_past, "inf gradient", zero_stage, {"on_bad_step": "skip"})[0]
    assert [bad["step"] for bad in result["bad_steps"]] == [3]
    assert result["logged"][4]["train/lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 2 / 5)))


def test_a_guard_goes_on_after_a_resume_as_if_nothing_had_happened() -> None:
    config = stage(guard=SKIP | {"spike_window": 3}).guard
    guard = Guard(config)
    for norm in (1.0, 2.0, 3.0, 4.0):
        guard.accepted(norm)
    resumed = Guard(config, guard.state())
    assert [resumed.accepts(norm) for norm in (59.0, 61.0, math.nan)] == [True, False, False]
    assert resumed.state() == guard.state() == {"norms": [2.0, 3.0, 4.0], "bad_steps": []}


# ------------------------------------------------------------------------------- the best validation, leaving, speed


def test_the_best_validation_and_when_to_stop() -> None:
    config = stage(best={"metric": "val_loss/act", "patience": 2}).best
    assert config is not None
    best = Best(config, {})
    values = {0: 0.1, 10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0}
    assert [best.see({"val_loss/act": value}, step) for step, value in values.items()] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (best.step, best.exhausted) == (20, True)
    resumed = Best(config, {step: {"val_loss/act": value} for step, value in values.items() if step <= 30})
    assert (resumed.step, resumed.exhausted) == (20, False)
    diverged = Best(config, {10: {"val_loss/act": 3.0}, 20: {"val_loss/act": None}})
    assert not diverged.see({"val_loss/act": math.nan}, 30)
    assert (diverged.step, diverged.exhausted) == (10, True), "what is not finite, or was not, is not better"
    with pytest.raises(ConfigError, match="val_loss/acts"):
        Best(config.model_copy(update={"metric": "val_loss/acts"}), {1: {"val_loss/act": 1.0}})


def leave_when_asked(asking_rank: int) -> tuple[Any, list[int], list[int]]:
    built, saved, seen = engine(2), [], []

    def asked() -> str:
        return "preempted" if built.rank == asking_rank and len(seen) == 2 else ""

    ended = fit(
        built,
        batches(built.rank, built.world_size),
        stage(save_every=100),
        start_step=0,
        validation=[],
        log=lambda metrics, step: seen.append(step) if "loss/total" in metrics else None,
        save=saved.append,
        asked=asked,
    )
    return ended, saved, seen


def test_all_save_and_leave_at_the_step_at_which_one_was_asked_to(two_workers: Workers) -> None:
    for answer in two_workers.run(leave_when_asked, 1):
        assert answer == (Ended(3, "preempted"), [3], [1, 2, 3])


class _Clock:
    """In the place of `time`: a second passes when we say so."""

    now = 100.0

    def time(self) -> float:
        return self.now

    perf_counter = time


def measured() -> tuple[dict[str, float], float, bool]:
    built = engine(3)
    (batch,) = next(batches(built.rank, built.world_size))
    before = torch.get_rng_state()
    flops = forward_flops(built, batch)
    untouched = torch.equal(before, torch.get_rng_state())
    clock = meter_module.time = _Clock()  # type: ignore[assignment]
    try:
        meter = Meter(tokens=lambda b: int(b.text_len.sum()), flops_per_row=1e6, peak_flops=1e9)
        with meter.paused(stalls=True):
            clock.now += 1
        with meter.waiting():
            clock.now += 3
        clock.now += 1
        meter.count([batch])
        return meter.read(built), flops / len(batch.positions), untouched
    finally:
        meter_module.time = time  # type: ignore[assignment]


def test_speed_is_measured_under_names_that_stay(two_workers: Workers) -> None:
    found, flops_per_row, untouched = two_workers.run(measured)[0]
    assert set(found) == {
        *(f"speed/{n}" for n in ("samples_per_s", "step_s", "data_wait_pct", "checkpoint_stall_pct", "goodput_pct")),
        "speed/tokens_per_s",
        "speed/mfu_pct",
        "memory/peak_gb",
    }
    assert found["speed/step_s"] == 4.0
    assert (found["speed/data_wait_pct"], found["speed/checkpoint_stall_pct"]) == (75.0, 25.0)
    assert found["speed/samples_per_s"] == GLOBAL_BATCH / 4
    assert found["speed/tokens_per_s"] == 5 * GLOBAL_BATCH / 4
    assert found["speed/mfu_pct"] == pytest.approx(GLOBAL_BATCH / 4 / 2 * 1e6 / 1e9 * 100)
    assert found["speed/goodput_pct"] == pytest.approx(80.0)
    layers = 2 * (2 * 12 * 12) + 5 * 2 * (2 * 12 * 12) + 2 * 12 * 6 + 5 * 2 * 12 * 16
    assert flops_per_row == layers
    assert untouched


def test_goodput_counts_what_a_killed_life_had_not_saved_and_the_time_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    first = Meter(began=90.0)  # asked for ten seconds before it trains
    with first.waiting():
        clock.now += 2
    clock.now += 18
    with first.paused(stalls=True):
        clock.now += 1
    state = first.state()
    assert state == {"first_start_unix_s": 90.0, "trained_s": 20.0, "waited_s": 2.0, "stalled_s": 1.0}
    clock.now += 40  # steps that are lost, and the way back
    second = Meter(state, began=155.0)
    clock.now += 29
    assert second.shares() == pytest.approx(
        {"data_wait_pct": 100 * 2 / 49, "checkpoint_stall_pct": 100 / 49, "goodput_pct": 49.0}
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloaded_optimiser_state_gives_the_same_run(two_workers: Workers, zero_stage: int) -> None:
    here, there = (two_workers.run(train, zero_stage, 1, (), offload=place)[0] for place in ("none", "cpu"))
    assert curve(there, "loss/total") == pytest.approx(curve(here, "loss/total"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("async_io")
def test_state_and_weights_on_a_local_disk_give_the_same_run(two_workers: Workers, tmp_path: Path) -> None:
    here, there = (
        two_workers.run(train, 3, width=1024, **place)[0]
        for place in ({}, {"offload": "nvme", "nvme_folder": str(tmp_path)})
    )
    assert list(tmp_path.rglob("*.swp")), "and there they were"
    assert curve(there, "loss/total") == pytest.approx(curve(here, "loss/total"), rel=1e-6)


def export_and_compare(zero_stage: int, ema_decay: float | None) -> tuple[dict[str, float], dict[str, float], float]:
    built = build_engine(
        toy(),
        EngineConfig(num_workers=2, zero_stage=zero_stage),  # type: ignore[arg-type]
        OptimizerConfig(lr=1e-2),
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // 2,
        ema_decay=ema_decay,
    )
    data = batches(built.rank, 2)
    fit(built, data, stage(), start_step=0, validation=[], log=lambda m, s: None, save=lambda s: None)
    held_out = next(batches(built.rank, 2, start_step=1000))
    live = validate(built, held_out)
    weights = built.full_weights()
    exported = toy()
    shared = [weights] if built.rank == 0 else [None]
    torch.distributed.broadcast_object_list(shared, src=0)
    exported.load_state_dict(shared[0])
    again = build_engine(
        exported,
        EngineConfig(num_workers=2, zero_stage=0),
        OptimizerConfig(),
        total_steps=1,
        micro_batch=GLOBAL_BATCH // 2,
    )
    second = again.full_weights()
    difference = max((float((second[n] - w).abs().max()) for n, w in weights.items()), default=0.0)
    return live, validate(again, held_out), difference


@pytest.mark.parametrize(("zero_stage", "ema_decay"), [(1, None), (2, None), (3, None), (3, 0.5)])
def test_what_is_exported_is_the_live_engine(two_workers: Workers, zero_stage: int, ema_decay: float | None) -> None:
    live, exported, difference = two_workers.run(export_and_compare, zero_stage, ema_decay)[0]
    assert exported == live
    assert difference == 0.0
