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

    num_workers: int = Field(default=1, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: products in bfloat16 (autocast); weights, gradients and moments stay float32"
    )
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 clips nothing")
    use_gpu: bool = False
    max_failures: int = Field(
        default=3, ge=-1, description="worker failures that are retried from the last resume point"
    )


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
    micro_batch: int = Field(gt=0, description="rows a worker pushes through the model at once")
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze: tuple[str, ...] = ()
    log_every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    eval_batches: int = Field(
        default=4, gt=0, description="global batches of held-out samples, the same ones every time"
    )
    save_every: int = Field(default=200, gt=0)

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


def accumulation_steps(global_batch: int, num_workers: int, micro_batch: int) -> int:
    """Micro-batches a worker runs before the optimiser steps. Raises `ConfigError` when the numbers do not divide."""
    if global_batch % (num_workers * micro_batch):
        raise ConfigError(
            f"global_batch={global_batch} is not a multiple of num_workers={num_workers} x micro_batch={micro_batch}; "
            f"choose a micro_batch that divides {global_batch // num_workers}"
            if global_batch % num_workers == 0
            else f"global_batch={global_batch} does not divide among num_workers={num_workers}; choose a divisor of it"
        )
    return global_batch // (num_workers * micro_batch)
