"""The DeepSpeed engine behind a small interface: forward, backward, step, save, load, and the full weights.

Only this file knows DeepSpeed. Process groups are the launcher's business (Ray Train starts them); here is one
engine a process, ZeRO 0-3, on gloo or NCCL, with the same numbers: gradients arrive averaged over workers, and
`Engine.backward` undoes that, because every loss is already a sum over the *global* batch divided by its count.
"""

from __future__ import annotations

import fcntl
import fnmatch
import logging
import math
import os
import sysconfig
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import nn

from upvla.errors import ConfigError, Corrupt
from upvla.train.config import EngineConfig, OptimizerConfig
from upvla.types import Batch, Losses

if TYPE_CHECKING:
    from collections.abc import Iterator

    import deepspeed

__all__ = [
    "Engine",
    "EngineConfig",
    "OptimizerConfig",
    "StepInfo",
    "build_engine",
    "build_ops",
    "decay_groups",
    "lr_factor",
]

_TAG = "engine"
_BUCKET_STEP = 1024  # elements; ZeRO wants buckets aligned
_BUCKET_MAX = 50_000_000


class StepInfo(NamedTuple):
    """What the optimiser did: global gradient norm before clipping, and the learning rate it used."""

    grad_norm: float
    lr: float


class Engine:
    """One worker's share of a training engine. All methods except the properties are collective: call on every rank."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, accumulation: int) -> None:
        self._engine = engine
        self._objectives = engine.module
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.accumulation = accumulation

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

    def end_micro_batch(self) -> None:
        """After every backward but the last of a global step."""
        self._engine.step()

    def step(self) -> StepInfo:
        """Clip, update the weights, advance the schedule. Call once a global step, after its last backward."""
        lr = float(self._engine.get_lr()[0])
        norm = self._unsharded_grad_norm() if self._engine.zero_optimization_stage() == 0 else None
        self._engine.step()
        return StepInfo(float(self._engine.get_global_grad_norm()) if norm is None else norm, lr)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside neither keep graphs nor use dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    # ------------------------------------------------------------------------------------------- among the workers

    def sum_over_workers(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value` in rank order, on every worker (small Python objects; also a barrier)."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    # ---------------------------------------------------------------------------------------------------- weights

    def save(self, folder: Path) -> None:
        """Write this worker's shards of weights, moments and schedule into its own `folder`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; `folder` holds the shards of all workers. Verify their hashes first: it unpickles."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise Corrupt(f"DeepSpeed found no checkpoint under {folder}: the shard set is incomplete")

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The whole module's float32 state on rank 0, gathered tensor by tensor; empty on the other ranks."""
        from deepspeed import zero

        state: dict[str, torch.Tensor] = {}
        for name, tensor in self._engine.module.state_dict(keep_vars=True).items():
            sharded = [tensor] if hasattr(tensor, "ds_id") else []
            with zero.GatheredParameters(sharded):
                if self.rank == 0:
                    copy = tensor.detach().to("cpu", copy=True)
                    state[name] = copy.float() if copy.is_floating_point() else copy
        return state

    # --------------------------------------------------------------------------------------------------- private

    def _on_device(self, batch: Batch) -> Batch:
        device = self._engine.device
        return Batch(*(torch.from_numpy(a).to(device) if isinstance(a, np.ndarray) else a.to(device) for a in batch))

    def _unsharded_grad_norm(self) -> float:
        """Under ZeRO 0 the engine reports no norm; gradients are whole and already averaged on every worker."""
        return float(
            torch.nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        )


def build_engine(
    module: nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    total_steps: int,
    micro_batch: int,
    accumulation: int = 1,
    freeze: Sequence[str] = (),
) -> Engine:
    """Wrap `module` (`forward(Batch) -> Losses`, `counts(Batch)`) for this worker of an initialised process group.

    Weights of rank 0 are broadcast. Raises `ConfigError` when no process group is there, or a freeze pattern names no
    parameter.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError("no process group: start training through upvla.launch.train (or init_process_group first)")
    deepspeed = _import_deepspeed(config.use_gpu)
    build_ops(config.use_gpu)
    _freeze(module, freeze)
    adamw = torch.optim.AdamW(
        decay_groups(module, optimizer.weight_decay), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: lr_factor(step, optimizer.warmup_steps, total_steps, optimizer.schedule)
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        lr_scheduler=schedule,
        dist_init_required=False,
        config=deepspeed_json(module, config, micro_batch=micro_batch, accumulation=accumulation),
    )
    return Engine(engine, accumulation)


def build_ops(use_gpu: bool = False) -> None:
    """Compile what DeepSpeed compiles at its first use, half a minute on two cores, so that no run waits for it.

    It is kept under TORCH_EXTENSIONS_DIR; where it is there already this takes a second. Torch marks a build in
    progress by a file that outlives a killed builder, and everyone after it would wait for ever: our own lock ends
    with its owner, and who holds it removes a mark left behind.
    """
    deepspeed = _import_deepspeed(use_gpu)
    if use_gpu:
        return
    from torch.utils.cpp_extension import _get_build_directory

    scripts = sysconfig.get_path("scripts")  # our own ninja: another version takes what this one built for stale
    if os.environ.get("PATH", "").split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", os.defpath)))
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "upvla.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def deepspeed_json(module: nn.Module, config: EngineConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Every value that matters is stated, since DeepSpeed's defaults move between releases."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    bucket = min(-(-trainable // _BUCKET_STEP) * _BUCKET_STEP, _BUCKET_MAX)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: exact resume on CPU, no compiled CPUAdam
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": config.use_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are reduced in float32, whatever the world size
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def lr_factor(step: int, warmup_steps: int, total_steps: int, schedule: str = "cosine") -> float:
    """Share of the base rate used by optimiser step number `step` (from 0): step 0 of a warm-up has rate 0."""
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two AdamW groups: matrices of layers decay, everything else does not.

    Not decayed: whatever has fewer than two axes (norm gains, biases), embedding tables (also where a head shares
    one), and free parameters such as latents or positions, told by not being called `weight`.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and name.rpartition(".")[2].endswith("weight") and id(parameter) not in tables
        (decay if matrix else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _import_deepspeed(use_gpu: bool) -> ModuleType:
    """Late, because importing it takes seconds, reads the environment and configures logging."""
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # one line a collective otherwise: DeepSpeed 0.19 calls names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


def _freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    names = dict(module.named_parameters())
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            roots = sorted({name.partition(".")[0] for name in names})
            raise ConfigError(f"freeze pattern {pattern!r} names no parameter; top-level modules are {roots}")
        for name in hits:
            names[name].requires_grad_(False)
