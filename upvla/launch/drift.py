"""How far data has moved from the statistics that a model was trained with, and keeps when it is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from upvla.data.stats import Statistics


class Drift(NamedTuple):
    """One dimension: `shift` of the mean in the parent's standard deviations, `spread` as ratio of the deviations."""

    feature: str
    dim: int
    shift: float
    spread: float
    outside: bool  # values beyond the parent's range: it has not been trained on such

    @property
    def size(self) -> float:
        return max(abs(self.shift), abs(math.log(self.spread)) if self.spread > 0 else 0.0)


def drift(parent: Mapping[str, Any], now: Statistics) -> list[Drift]:
    """Every dimension that both know, the furthest first. `parent` is a checkpoint's statistics as JSON."""
    found = []
    then = Statistics.from_json(parent)
    for name in sorted(then.features.keys() & now.features.keys()):
        a, b = then.features[name], now.features[name]
        for dim in range(min(len(a.mean), len(b.mean))):
            std = a.std[dim] if a.std[dim] > 0 else 1.0
            outside = b.low[dim] < a.low[dim] or b.high[dim] > a.high[dim]
            found.append(Drift(name, dim, (b.mean[dim] - a.mean[dim]) / std, b.std[dim] / std, outside))
    return sorted(found, key=lambda one: one.size, reverse=True)


def as_metrics(found: list[Drift]) -> dict[str, float]:
    """What a curve over many nights shows: the worst shift, and how many dimensions left their range."""
    return {
        "drift/worst_shift": max((abs(one.shift) for one in found), default=0.0),
        "drift/dims_outside": float(sum(one.outside for one in found)),
    }
