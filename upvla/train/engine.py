"""The DeepSpeed engine behind a small interface: forward, backward, step, save, load, and the full weights.

Only this file, `zero.py` and `disk.py` know DeepSpeed. Process groups are the launcher's business (Ray Train starts
them); here is one engine a process, ZeRO 0-3, on gloo or NCCL, with the same numbers: gradients arrive averaged over
workers, and `Engine.backward` undoes that, because every loss is already a sum over the *global* batch divided by its
count.

The optimiser is torch's AdamW with one addition, a veto: DeepSpeed runs its whole step (reduces, clips, clears), the
weights and moments stay. So a step can be refused under every ZeRO stage without touching DeepSpeed's insides.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import nn

from upvla.errors import ConfigError, Corrupt
from upvla.train import disk, group
from upvla.train.config import EngineConfig, OptimizerConfig
from upvla.train.ema import Ema, Shards, shard_of, shard_size
from upvla.train.optimizer import VetoableAdamW, decay_groups, freeze_parameters, lr_factor
from upvla.train.zero import SWAPPED, TAG, build_ops, deepspeed_json, import_deepspeed, swapped_of
from upvla.types import Batch, Losses

if TYPE_CHECKING:
    from collections.abc import Iterator

    import deepspeed

__all__ = ["Engine", "EngineConfig", "OptimizerConfig", "StepInfo", "build_engine"]

_EMA = "average_{:05d}.pt"


class StepInfo(NamedTuple):
    """What the optimiser did: global gradient norm before clipping, and the learning rate it used.

    `applied` is False when it did not move, because the norm is not finite or was not accepted.
    """

    grad_norm: float
    lr: float
    applied: bool


class Engine:
    """One worker's share of a training engine. All methods except the properties are collective: call on every rank."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        adamw: VetoableAdamW,
        config: EngineConfig,
        accumulation: int,
        ema_decay: float | None = None,
    ) -> None:
        self._engine, self._adamw, self._config = engine, adamw, config
        self._objectives = engine.module
        self._backwards = 0  # since the optimiser was last called
        self._stepped = False
        self._set_timeouts(config.patience_s)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.zero_stage = int(engine.zero_optimization_stage())
        self.accumulation = accumulation
        self.global_batch = int(engine.train_batch_size())
        self.ema = Ema(self._shards, self._spread, ema_decay) if ema_decay is not None else None

    # ------------------------------------------------------------------------------------------------- learning

    def forward(self, batch: Batch) -> Losses:
        """Sums and counts of this worker's rows. `batch` may hold numpy arrays; they move to the device."""
        return self._engine(self._on_device(batch))

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many supervised elements each objective will find in `batch`, without running the model."""
        return self._objectives.counts(self._on_device(batch))

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, this worker's part of a sum over all workers and accumulation steps."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        self._backwards += 1

    def end_micro_batch(self) -> None:
        """After every backward but the last of a global step."""
        self._engine.step()

    def step(self, accepts: Callable[[float], bool] | None = None) -> StepInfo:
        """Clip, update the weights, advance the schedule. Call once a global step, after its last backward.

        The optimiser does not move when the global gradient norm is not finite, or `accepts` says no to it; the
        schedule and the caller's count of steps go on all the same. Judging costs one more norm.
        """
        lr = float(self._engine.get_lr()[0])
        judged = accepts is not None or self.zero_stage == 0  # which reports no norm, and would apply any
        norm = self._grad_norm() if judged else None
        self._adamw.vetoed = norm is not None and not (math.isfinite(norm) and (accepts is None or accepts(norm)))
        self._engine.step()
        applied = self._engine.was_step_applied() and not self._adamw.vetoed
        self._end_of_step(applied)
        return StepInfo(float(self._engine.get_global_grad_norm()) if norm is None else norm, lr, applied)

    def discard_step(self) -> None:
        """End a global step without moving anything but the schedule, wherever in it the caller has stopped."""
        if self._backwards == self.accumulation:
            self._adamw.vetoed = True
            self._engine.step()
            self._end_of_step(applied=False)
        elif self._backwards == 0:
            self.skip_schedule(1)
        else:
            raise RuntimeError(f"{self._backwards} of {self.accumulation} backward passes: finish the step first")

    def skip_schedule(self, steps: int) -> None:
        """The learning rate of as many steps later: of steps that are not taken."""
        for _ in range(steps):
            self._engine.lr_scheduler.step()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside neither keep graphs nor use dropout; they see the averaged weights where those are."""
        self._engine.eval()
        try:
            with torch.no_grad(), self._weights_to_show():
                yield
        finally:
            self._engine.train()

    def call(self, method: str, *inputs: torch.Tensor) -> Any:
        """What `method` of the module gives, on inputs on `device`: each worker its own, everybody at the same time.

        It runs as a forward pass, because ZeRO 3 counts layers, and fetches their weights, from where one begins.
        """
        self._objectives.forward = getattr(self._objectives, method)
        try:
            return self._objectives(*inputs)
        finally:
            del self._objectives.forward

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    # ------------------------------------------------------------------------------------------- among the workers

    def sum_over_workers(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value` in rank order, on every worker (small Python objects; also a barrier)."""
        return group.gather(value)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, workers wait for each other as long as they did before the first step: for what depends on disks."""
        self._set_timeouts(self._config.patience_s)
        try:
            yield
        finally:
            self._set_timeouts(self._config.stall_timeout_s if self._stepped else self._config.patience_s)

    # ---------------------------------------------------------------------------------------------------- weights

    @property
    def shard_bytes(self) -> int:
        """About what `save` writes on this worker: float32 weights, their master copy, two moments, an average."""
        parameters = list(self._engine.module.parameters())
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        learnt = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        weights = whole // self.world_size if self.zero_stage == 3 else whole if self.rank == 0 else 0
        states = 3 * learnt // self.world_size if self.zero_stage > 0 else 2 * learnt if self.rank == 0 else 0
        return 4 * (weights + states + (learnt // self.world_size if self.ema is not None else 0))

    def save(self, folder: Path) -> None:
        """Write this worker's shards of weights, averages, moments and schedule into its own `folder`."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self._on_disk:
            shutil.rmtree(folder / TAG / SWAPPED)
            disk.save(self._engine.optimizer, folder, self.rank)
        if self.ema is not None:
            torch.save(self.ema.average, folder / _EMA.format(self.rank))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; `folder` holds the shards of all workers. Verify their hashes first: it unpickles.

        An engine built with `universal=True` reads what `to_universal` made of such a folder.
        """
        disk.require_same_place(folder, self._on_disk)
        decays = [param_group["weight_decay"] for param_group in self._adamw.param_groups]
        if self._on_disk:
            swapped_of(self.rank, folder).mkdir(parents=True, exist_ok=True)
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise Corrupt(f"DeepSpeed found no checkpoint under {folder}: the shard set is incomplete")
        if self._on_disk:
            disk.load(self._engine.optimizer, folder, self.rank)
        # A converted ZeRO 3 set gives every group the decay of the first, and all of them one and the same step counter
        for param_group, decay in zip(self._adamw.param_groups, decays, strict=True):
            param_group["weight_decay"] = decay
        for state in self._adamw.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        if self.ema is not None:
            saved = sorted(folder.glob("average_*.pt"))
            self.ema.load([torch.load(path, weights_only=True) for path in saved], self.rank, self.world_size)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The whole module's float32 state on rank 0, gathered tensor by tensor; empty on the other ranks.

        With an average, these are the averaged weights.
        """
        from deepspeed import zero

        state: dict[str, torch.Tensor] = {}
        with self._weights_to_show():
            for name, tensor in self._engine.module.state_dict(keep_vars=True).items():
                sharded = [tensor] if hasattr(tensor, "ds_id") else []
                with zero.GatheredParameters(sharded):
                    if self.rank == 0:
                        copy = tensor.detach().to("cpu", copy=True)
                        state[name] = copy.float() if copy.is_floating_point() else copy
        return state

    # --------------------------------------------------------------------------------------------------- private

    @property
    def _on_disk(self) -> bool:
        return self._config.offload == "nvme"

    def _end_of_step(self, applied: bool) -> None:
        if not self._engine.was_step_applied():  # DeepSpeed refused by itself, and left the schedule where it was
            self._engine.lr_scheduler.step()
        self._adamw.vetoed, self._backwards = False, 0
        if applied and self.ema is not None:
            self.ema.update()
        if not self._stepped:  # from here on every worker does the same as before, so one that is late has stalled
            self._stepped = True
            self._set_timeouts(self._config.stall_timeout_s)

    def _set_timeouts(self, timeout_s: float) -> None:
        """DeepSpeed's traffic has a group of its own, which torch would let wait for half an hour."""
        group.wait_at_most(timeout_s, self._engine.data_parallel_group)

    def _on_device(self, batch: Batch) -> Batch:
        device = self._engine.device
        return Batch(*(torch.from_numpy(a).to(device) if isinstance(a, np.ndarray) else a.to(device) for a in batch))

    def _grad_norm(self) -> float:
        """Of the whole gradient, before clipping and before the optimiser has seen it. Not finite for NaN and inf."""
        if self.zero_stage == 0:  # gradients are whole and already averaged on every worker
            found = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(found))
        if self.zero_stage < 3:
            norm = float(self._engine.optimizer.scaled_global_norm())
            return norm if norm >= 0 else math.nan  # -1 is DeepSpeed's word for "not finite"
        from deepspeed.utils import safe_get_local_grad

        shards = (safe_get_local_grad(p) for p in self._engine.module.parameters() if p.requires_grad)
        square = sum(float(shard.double().square().sum()) for shard in shards if shard is not None)
        return math.sqrt(total) if math.isfinite(total := self.sum_over_workers([square])[0]) else math.nan

    def _weights_to_show(self) -> Any:
        return nullcontext() if self.ema is None else self.ema.swapped()

    def _shards(self) -> dict[str, torch.Tensor]:
        """Views of this worker's parts of all trainable parameters, flat and without ZeRO 3's padding."""
        parts = {}
        for name, p in self._engine.module.named_parameters():
            if p.requires_grad:
                if hasattr(p, "ds_tensor"):
                    start = shard_size(p.ds_numel, self.world_size) * self.rank
                    parts[name] = p.ds_tensor.data.view(-1)[: max(0, p.ds_numel - start)]
                else:
                    parts[name] = shard_of(p.data.view(-1), self.rank, self.world_size)
        return parts

    def _spread(self, shards: Shards) -> None:
        """Write every worker's parts into everybody's module."""
        from deepspeed import zero

        for name, p in self._engine.module.named_parameters():
            if name not in shards:
                continue
            sharded = hasattr(p, "ds_tensor")
            numel = p.ds_numel if sharded else p.numel()
            mine = torch.zeros(shard_size(numel, self.world_size), dtype=shards[name].dtype, device=shards[name].device)
            mine[: len(shards[name])] = shards[name]
            whole = [torch.empty_like(mine) for _ in range(self.world_size)]
            torch.distributed.all_gather(whole, mine)
            with zero.GatheredParameters([p] if sharded else [], modifier_rank=0):
                if not sharded or self.rank == 0:
                    p.data.copy_(torch.cat(whole)[:numel].view(p.shape))


def build_engine(
    module: nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    total_steps: int,
    micro_batch: int,
    accumulation: int = 1,
    freeze: Sequence[str] = (),
    ema_decay: float | None = None,
    universal: bool = False,
) -> Engine:
    """Wrap `module` (`forward(Batch) -> Losses`, `counts(Batch)`) for this worker of an initialised process group.

    Weights of rank 0 are broadcast. With `universal`, the engine's `load` reads converted sets (`to_universal`).
    Raises `ConfigError` when no process group is there, or a freeze pattern names no parameter.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError("no process group: start training through upvla.launch.train (or init_process_group first)")
    deepspeed = import_deepspeed(config.use_gpu)
    build_ops(config.use_gpu)
    freeze_parameters(module, freeze)
    groups, fused = decay_groups(module, optimizer.weight_decay), config.use_gpu and config.offload == "none"
    adamw = VetoableAdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: lr_factor(step, optimizer.warmup_steps, total_steps, optimizer.schedule)
    )
    settings = deepspeed_json(module, config, micro_batch=micro_batch, accumulation=accumulation)
    if config.offload == "nvme":  # as `initialize` would do, but that keeps them in bfloat16 on CPUs without float16
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, remote_device="nvme")
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        lr_scheduler=schedule,
        dist_init_required=False,
        config=settings | {"checkpoint": {"load_universal": universal}},
    )
    return Engine(engine, adamw, config, accumulation, ema_decay)
