"""Mean, deviation, range and quantiles of every dimension, from mergeable summaries of single recordings.

Moments follow Chan, Golub and LeVeque's pairwise update in float64, which survives columns whose mean dwarfs their
deviation. Quantiles come from histograms with logarithmic buckets (1 % relative error): integer counts, so no merge
order can change them. A dimension that hardly moves is `constant` and never divided by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from upvla.errors import Mismatch
from upvla.store import content_hash

_GROWTH = np.log(1.02)  # bucket k > 0 holds magnitudes around _SMALLEST * 1.02**k, bucket 0 everything smaller
_SMALLEST = 1e-6
QUANTILES = (0.01, 0.99)
_SPARSE = 50.0  # times the distance of the quantiles: beyond that they say nothing about the range


@dataclass(frozen=True)
class Summary:
    """What one recording contributes for one feature of D dimensions."""

    count: int
    mean: np.ndarray  # f64[D]
    m2: np.ndarray  # f64[D] sum of squared distances from the mean
    low: np.ndarray  # f64[D]
    high: np.ndarray  # f64[D]
    buckets: tuple[Counter[int], ...]  # D histograms; negative values have negative buckets

    @staticmethod
    def of(values: np.ndarray) -> Summary:
        """f32[T,D] -> its summary."""
        wide = values.astype(np.float64)
        mean = wide.mean(0)
        magnitude = np.maximum(np.abs(wide), _SMALLEST)
        bucket = np.rint(np.log(magnitude / _SMALLEST) / _GROWTH).astype(np.int64) * np.sign(wide).astype(np.int64)
        buckets = []
        for column in bucket.T:
            keys, counts = np.unique(column, return_counts=True)
            buckets.append(Counter(dict(zip(keys.tolist(), counts.tolist(), strict=True))))
        m2 = ((wide - mean) ** 2).sum(0)
        return Summary(len(wide), mean, m2, wide.min(0), wide.max(0), tuple(buckets))

    def merge(self, other: Summary) -> Summary:
        count = self.count + other.count
        delta = other.mean - self.mean
        return Summary(
            count,
            self.mean + delta * other.count / count,
            self.m2 + other.m2 + delta**2 * self.count * other.count / count,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
        )

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "m2", "low", "high")}
        return {"count": self.count, **arrays, "buckets": [sorted(b.items()) for b in self.buckets]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Summary:
        mean, m2, low, high = (np.array(value[name], np.float64) for name in ("mean", "m2", "low", "high"))
        buckets = tuple(Counter({int(k): int(n) for k, n in b}) for b in value["buckets"])
        return Summary(int(value["count"]), mean, m2, low, high, buckets)


@dataclass(frozen=True)
class FeatureStats:
    """One feature's figures, a value a dimension."""

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    constant: tuple[bool, ...]


@dataclass(frozen=True)
class Statistics:
    """Figures of every feature over a set of recordings; `stats_id` is the hash of all of them."""

    features: Mapping[str, FeatureStats]

    @property
    def stats_id(self) -> str:
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {name: asdict(feature) for name, feature in sorted(self.features.items())}

    def require_equal(self, other: Statistics, *, ours: str, theirs: str) -> None:
        """Raise `Mismatch`, naming the first feature, dimension and figure that differ."""
        mine, its = self.to_json(), other.to_json()
        for name in sorted(mine.keys() | its.keys()):
            if name not in mine or name not in its:
                raise Mismatch(f"statistics: {name!r} is only in {ours if name in mine else theirs}")
            for figure in ("mean", "std", "low", "high", "q01", "q99", "constant", "count"):
                a, b = (np.atleast_1d(value[name][figure]).tolist() for value in (mine, its))
                if len(a) != len(b):
                    raise Mismatch(f"statistics: {name} has {len(a)} dimensions in {ours}, {len(b)} in {theirs}")
                for dim, (x, y) in enumerate(zip(a, b, strict=True)):
                    if x != y:
                        raise Mismatch(
                            f"statistics: {name} dimension {dim} differs in {figure}: {ours} has {x!r}, {theirs} {y!r}"
                        )

    def check(self) -> list[Finding]:
        """What would make training on these figures go wrong; `fatal` ones stop it."""
        return [finding for name, feature in sorted(self.features.items()) for finding in _findings(name, feature)]

    @staticmethod
    def from_json(value: Mapping[str, Mapping[str, Any]]) -> Statistics:
        def whole(feature: Mapping[str, Any]) -> FeatureStats:
            dims = {name: tuple(values) for name, values in feature.items() if name != "count"}
            return FeatureStats(count=feature["count"], **dims)

        return Statistics({name: whole(feature) for name, feature in value.items()})

    @staticmethod
    def merged(summaries: Iterable[Mapping[str, Summary]]) -> Statistics:
        """Of many recordings' summaries, {feature: Summary} each, in the order given."""
        total: dict[str, Summary] = {}
        for summary in summaries:
            for name, part in summary.items():
                total[name] = total[name].merge(part) if name in total else part
        return Statistics({name: _figures(summary) for name, summary in total.items()})


class Finding(NamedTuple):
    """Something about one dimension that a person should know, or that stops training."""

    feature: str
    dim: int
    fatal: bool
    what: str


def _findings(name: str, feature: FeatureStats) -> Iterable[Finding]:
    for dim in range(len(feature.mean)):
        figures = [getattr(feature, figure)[dim] for figure in ("mean", "std", "low", "high", "q01", "q99")]
        low, high, q01, q99 = figures[2:]
        if not np.isfinite(figures).all():
            yield Finding(name, dim, True, f"figures are not finite: {figures}")
        elif feature.constant[dim]:
            yield Finding(name, dim, False, f"is always {low:g}: it passes through unchanged")
        elif (reach := max(high - q99, q01 - low)) > _SPARSE * (q99 - q01):
            yield Finding(
                name,
                dim,
                False,
                f"is sparse: 98 % lie within {q99 - q01:g}, single values {reach:g} beyond; the whole "
                "range is the scale",
            )


class Normalizer:
    """`normalise` and `unnormalise` of one feature; constant dimensions pass through unchanged.

    "mean_std": (x - mean) / std. "quantile": q01..q99 onto -1..1, or the whole range where nearly all values are
    one and the rest lies far off: dividing by such a q99 - q01 would make steps of thousands.
    """

    def __init__(self, feature: FeatureStats, mode: Literal["mean_std", "quantile"]):
        if mode == "mean_std":
            centre, scale = np.array(feature.mean), np.array(feature.std)
        else:
            low, high = np.array(feature.q01), np.array(feature.q99)
            least, most = np.array(feature.low), np.array(feature.high)
            sparse = np.maximum(most - high, low - least) > _SPARSE * (high - low)
            low, high = np.where(sparse, least, low), np.where(sparse, most, high)
            centre, scale = (low + high) / 2, (high - low) / 2
        passes = np.array(feature.constant) | (scale <= 0)
        self._centre, self._scale = np.where(passes, 0.0, centre), np.where(passes, 1.0, scale)

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """f[...,D] -> f32[...,D]"""
        return ((self._of_width(values) - self._centre) / self._scale).astype(np.float32)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        return (self._of_width(values) * self._scale + self._centre).astype(np.float32)

    def _of_width(self, values: np.ndarray) -> np.ndarray:
        if values.shape[-1] != len(self._centre):
            raise Mismatch(f"statistics are of {len(self._centre)} dimensions, the values have {values.shape[-1]}")
        return values


def _figures(summary: Summary) -> FeatureStats:
    std = np.sqrt(summary.m2 / summary.count)
    scale = np.maximum(np.abs(summary.low), np.abs(summary.high))
    constant = std <= 1e-6 * np.maximum(scale, 1e-6)
    q01, q99 = ([_quantile(buckets, q, low, high) for buckets, low, high in _columns(summary)] for q in QUANTILES)
    return FeatureStats(
        count=summary.count,
        mean=_rounded(summary.mean),
        std=_rounded(std),
        low=_rounded(summary.low),
        high=_rounded(summary.high),
        q01=_rounded(q01),
        q99=_rounded(q99),
        constant=tuple(bool(value) for value in constant),
    )


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """To seven digits, so that the last bits of another machine's arithmetic do not change the identity."""
    return tuple(float(f"{value:.7g}") for value in values)


def _columns(summary: Summary) -> Iterable[tuple[Counter[int], float, float]]:
    return zip(summary.buckets, summary.low.tolist(), summary.high.tolist(), strict=True)


def _quantile(buckets: Counter[int], q: float, low: float, high: float) -> float:
    """The middle of the bucket in which the quantile lies, held within the range that was seen."""
    remaining = q * (sum(buckets.values()) - 1)
    for bucket in sorted(buckets):
        remaining -= buckets[bucket]
        if remaining < 0:
            break
    value = 0.0 if bucket == 0 else np.sign(bucket) * _SMALLEST * np.exp(abs(bucket) * _GROWTH)
    return float(min(max(value, low), high))
