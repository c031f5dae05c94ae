"""What the optimiser does with which parameter: AdamW with a veto, its groups, its schedule, and what is frozen."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from upvla.errors import ConfigError


class VetoableAdamW(torch.optim.AdamW):
    """AdamW whose `step` does nothing while it is vetoed."""

    vetoed = False

    def step(self, closure: Any = None) -> Any:
        return None if self.vetoed else super().step(closure)


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


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> None:
    names = dict(module.named_parameters())
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            roots = sorted({name.partition(".")[0] for name in names})
            raise ConfigError(f"freeze pattern {pattern!r} names no parameter; top-level modules are {roots}")
        for name in hits:
            names[name].requires_grad_(False)
