"""What can be set about training. Pure values: importing this costs no torch and no DeepSpeed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from upvla.errors import ConfigError


class OptimizerConfig(BaseModel):
    """AdamW, linear warm-up from 0, then half a cosine to 0 at the stage's last step (or constant)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(
        default=0.01, ge=0, description="for matrices only: no norm, bias, embedding or latent decays"
    )
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"


class EngineConfig(BaseModel):
    """How the work is spread and in which numbers; the DeepSpeed JSON is derived from this, never written by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: int | tuple[int, int] = Field(
        default=1, description="a number, or [least, most]: then as many as the cluster has room for and the data allow"
    )
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: products in bfloat16 (autocast); weights, gradients and moments stay float32"
    )
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 clips nothing")
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where optimiser state rests: cpu needs zero_stage >= 1, nvme 3 (and then weights go, too)"
    )
    nvme_folder: str = Field(default="", description="a folder on a local fast disk, for offload: nvme")
    use_gpu: bool = False
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a worker; default: what its node has room for, and then a run that goes on where "
        "nodes have other CPUs is the same but for rounding",
    )
    peak_tflops: float | None = Field(
        default=None, gt=0, description="what a worker's device can do, for MFU; default: known GPUs, CPUs are measured"
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="worker failures in a row, without a new resume point, that are retried; -1: always again",
    )
    stall_timeout_s: int = Field(
        default=50, gt=0, description="a worker that says nothing for so long is given up, and the group starts again"
    )
    start_timeout_s: int = Field(
        default=900,
        gt=0,
        description="how long workers wait for one that lives and is merely slower: until the first step has been "
        "taken (imports, compiling, weights) and while shards go to the local disk",
    )

    @property
    def worker_range(self) -> tuple[int, int]:
        """(least, most) workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def patience_s(self) -> int:
        """The longest that one worker ever waits for another."""
        return max(self.start_timeout_s, self.stall_timeout_s)

    @model_validator(mode="after")
    def _workers_and_offload(self) -> EngineConfig:
        least, most = self.worker_range
        if not 1 <= least <= most:
            raise ValueError(f"num_workers={self.num_workers}: write a positive number, or [least, most]")
        needs = {"none": 0, "cpu": 1, "nvme": 3}[self.offload]
        if self.zero_stage < needs:
            raise ValueError(f"offload={self.offload} needs zero_stage >= {needs}, it is {self.zero_stage}")
        if (self.offload == "nvme") != bool(self.nvme_folder):
            raise ValueError("offload=nvme and nvme_folder go together: set both, or neither")
        if self.offload == "nvme" and least != most:
            raise ValueError(f"offload=nvme goes on with as many workers as began: no range, num_workers={most}")
        return self


class GuardConfig(BaseModel):
    """What happens at a step whose loss or gradient is not finite, or whose gradient is a spike.

    The optimiser never moves on such a step, and its mixture positions are recorded. `stop` ends the run; `skip` goes
    on with the next batch; `rollback` goes on with the next batch from the weights of the last resume point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    spike_factor: float | None = Field(
        default=None, gt=1, description="a gradient norm above this times the median of the last ones is a spike"
    )
    spike_window: int = Field(default=64, gt=1, description="accepted steps that the median is taken over")
    max_bad_steps: int = Field(default=10, ge=0, description="one more than these stops the run, whatever the policy")
    explained: tuple[int, ...] = Field(
        default=(), description="bad steps that somebody has looked at; any other keeps the model out of the registry"
    )


class BestConfig(BaseModel):
    """Export the weights of the best validation instead of the last ones; with `patience`, stop early."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = Field(description="lower is better, such as `val_loss/act`")
    patience: int | None = Field(default=None, gt=0, description="validations without a better one before the stop")


class StageConfig(BaseModel):
    """One stage of training: what is learnt, for how long, and when it is looked at and saved.

    `weights` name the objectives that are optimised. An objective left out (or 0) is not even added, but a module that
    only it reaches still has parameters that the optimiser decays: `freeze` them (patterns over parameter names, e.g.
    `action_head.*`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    steps: int = Field(gt=0)
    weights: dict[str, float]
    micro_batch: int = Field(
        gt=0, description="most rows that a worker pushes through the model at once; a number that divides its share"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze: tuple[str, ...] = ()
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="validate and export a moving average of the weights"
    )
    best: BestConfig | None = None
    guard: GuardConfig = GuardConfig()
    log_every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    eval_batches: int = Field(
        default=4, gt=0, description="global batches of held-out samples, the same ones every time"
    )
    save_every: int = Field(default=200, gt=0)
    keep_last: int = Field(default=2, gt=0, description="resume points that are kept")
    keep_every: int | None = Field(default=None, gt=0, description="those of every so many steps are kept for good")
    picture_every: int | None = Field(
        default=None, gt=0, description="steps between pictures of predicted beside real frames"
    )

    @model_validator(mode="after")
    def _weights_and_warmup(self) -> StageConfig:
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError(f"stage {self.name!r}: no objective has a positive weight; set one in 'weights'")
        if negative := [name for name, weight in self.weights.items() if weight < 0]:
            raise ValueError(f"stage {self.name!r}: objective {negative[0]!r} has a negative weight")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"stage {self.name!r}: warmup_steps={self.optimizer.warmup_steps} leaves none of steps={self.steps}; "
                "lower 'optimizer.warmup_steps' or raise 'steps'"
            )
        return self

    def identity(self) -> dict[str, object]:
        """What decides the weights that come out, as JSON: not how often the run is looked at, saved or kept, nor what
        one does about a bad step that has stopped it."""
        watching = {"log_every", "eval_every", "eval_batches", "save_every", "micro_batch"}
        watching |= {"keep_last", "keep_every", "picture_every", "guard", "best", "ema_decay"}
        value: dict[str, object] = self.model_dump(mode="json", exclude=watching)
        judged = self.guard.model_dump(mode="json", include={"spike_factor", "spike_window"}, exclude_defaults=True)
        chosen = {"guard": judged or None, "ema_decay": self.ema_decay}
        if self.best is not None:  # then the times of validation decide which weights are the best
            chosen["best"] = self.best.model_dump(mode="json") | {
                "eval_every": self.eval_every,
                "eval_batches": self.eval_batches,
            }
        return value | {name: setting for name, setting in chosen.items() if setting is not None}


def micro_batch_of(global_batch: int, num_workers: int, most: int) -> int:
    """Rows that each of `num_workers` pushes through the model at once: the largest number up to `most` that its share
    of a global batch divides into. Raises `ConfigError` when there is no such share."""
    share, rest = divmod(global_batch, num_workers)
    if rest:
        raise ConfigError(
            f"global_batch={global_batch} does not divide among num_workers={num_workers}; choose a divisor of it"
        )
    return next(rows for rows in range(min(most, share), 0, -1) if share % rows == 0)


def world_sizes(global_batch: int, lanes: int, engine: EngineConfig) -> list[int]:
    """Numbers of workers, ascending, that the config allows and that both the data's order and the batch divide among.

    Raises `ConfigError` that names the sizes that would do when there is none.
    """
    least, most = engine.worker_range
    fitting = [n for n in range(1, lanes + 1) if lanes % n == 0 and global_batch % n == 0]
    if allowed := [n for n in fitting if least <= n <= most]:
        return allowed
    raise ConfigError(
        f"num_workers={engine.num_workers}: global_batch={global_batch} over {lanes} lanes can be dealt to {fitting} "
        "workers; choose one of them"
    )
