"""Mean, deviation, range and quantiles of every dimension, from mergeable summaries of single recordings.

Moments are merged after Chan, Golub and LeVeque in float64, which survives columns whose mean dwarfs their deviation.
Quantiles come from histograms with logarithmic buckets (1 % relative error): integer counts, so no merge order can
change them. A dimension that hardly moves is `constant`.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from upvla.errors import Corrupt, Mismatch
from upvla.store import content_hash

_GROWTH = np.log(1.02)  # bucket k > 0 holds magnitudes around _SMALLEST * 1.02**k, bucket 0 everything smaller
_SMALLEST = 1e-6
_STRIDE = 1 << 14  # keys of one dimension's buckets; float32 has 5,170 of each sign
QUANTILES = (0.01, 0.99)
_HELD = 64  # summaries whose buckets are added at a time
_NO_BUCKETS = np.empty((0, 2), np.int64)
_SPARSE = 50.0  # times the distance of the quantiles: beyond that they say nothing about the range


@dataclass(frozen=True)
class Summary:
    """What one recording contributes for one feature of D dimensions."""

    count: int
    mean: np.ndarray  # f64[D]
    m2: np.ndarray  # f64[D] sum of squared distances from the mean
    low: np.ndarray  # f64[D]
    high: np.ndarray  # f64[D]
    buckets: np.ndarray  # i64[N,2] (key, count), key = (dimension + 1/2) * _STRIDE + signed bucket

    @staticmethod
    def of(values: np.ndarray) -> Summary:
        """f32[T,D] -> its summary."""
        wide = values.astype(np.float64)
        mean = wide.mean(0)
        bucket = np.rint(np.log(np.maximum(np.abs(wide), _SMALLEST) / _SMALLEST) / _GROWTH) * np.sign(wide)
        keys = bucket.astype(np.int64) + np.arange(values.shape[1]) * _STRIDE + _STRIDE // 2
        m2 = ((wide - mean) ** 2).sum(0)
        buckets = np.stack(np.unique(keys, return_counts=True), axis=1)
        return Summary(len(wide), mean, m2, wide.min(0), wide.max(0), buckets)

    def histograms(self) -> list[np.ndarray]:
        """i64[n,2] (bucket, count) of every dimension, in order of their values."""
        edges = np.searchsorted(self.buckets[:, 0], np.arange(len(self.mean) + 1) * _STRIDE)
        signed = self.buckets - (_STRIDE // 2, 0)
        return [signed[a:b] - (dim * _STRIDE, 0) for dim, (a, b) in enumerate(itertools.pairwise(edges))]

    def to_json(self) -> dict[str, Any]:
        """Buckets as base64 of little-endian int32 pairs: as lists they would cost 6 % of an ingest."""
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "m2", "low", "high")}
        buckets = base64.b64encode(self.buckets.astype("<i4").tobytes()).decode()
        return {"count": self.count, **arrays, "buckets": buckets}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Summary:
        mean, m2, low, high = (np.array(value[name], np.float64) for name in ("mean", "m2", "low", "high"))
        found = value["buckets"]
        if isinstance(found, str):
            buckets = np.frombuffer(base64.b64decode(found), "<i4").reshape(-1, 2).astype(np.int64)
        else:  # datasets of format 1: [[bucket, count], ...] a dimension
            buckets = np.array([*itertools.chain.from_iterable(found)], np.int64).reshape(-1, 2)
            buckets[:, 0] += np.repeat(np.arange(len(mean)), list(map(len, found))) * _STRIDE + _STRIDE // 2
        return Summary(int(value["count"]), mean, m2, low, high, buckets)


class _Fold:
    """Summaries of one feature as they come. Buckets, nearly all that there is of one, are integer counts and are added
    up soon; the last bits of everything else depend on the order, so that waits until it is known."""

    def __init__(self) -> None:
        self._parts: list[tuple[Any, Summary]] = []
        self._buckets: list[np.ndarray] = []

    def add(self, place: Any, part: Summary) -> None:
        self._parts.append((place, replace(part, buckets=_NO_BUCKETS)))
        self._buckets.append(part.buckets)
        if len(self._buckets) == _HELD:
            self._buckets = [_added(np.concatenate(self._buckets))]

    def folded(self) -> Folded:
        places, parts = zip(*sorted(self._parts, key=lambda placed: placed[0]), strict=True)
        rows = {name: np.stack([getattr(part, name) for part in parts]) for name in ("mean", "m2", "low", "high")}
        counts = np.array([[part.count] for part in parts], np.float64)
        return Folded(np.array(places), counts, **rows, buckets=_added(np.concatenate(self._buckets)))

    def merged(self) -> Summary:
        """Of all the steps that the parts are of."""
        return self.folded().merged()


class Folded(NamedTuple):
    """One feature's summaries over N recordings: moments a recording, in the order of the recordings' places, which are
    unique; buckets added up."""

    places: np.ndarray  # [N] sorted
    counts: np.ndarray  # f64[N,1], as are the others f64[N,D]
    mean: np.ndarray
    m2: np.ndarray
    low: np.ndarray
    high: np.ndarray
    buckets: np.ndarray  # i64[M,2] (key, count)

    def plus(self, other: Folded) -> Folded:
        """With the recordings of `other`, none of which is here: to the last bit as if folded together."""
        at = np.searchsorted(self.places, other.places)
        rows = (np.insert(mine, at, its, axis=0) for mine, its in zip(self[:-1], other[:-1], strict=True))
        return Folded._make([*rows, _added(np.concatenate([self.buckets, other.buckets]))])

    def minus(self, other: Folded) -> Folded:
        """Without the recordings of `other`, all of which are here."""
        at = np.searchsorted(self.places, other.places)
        rows = (np.delete(mine, at, axis=0) for mine in self[:-1])
        left = _added(np.concatenate([self.buckets, other.buckets * (1, -1)]))
        return Folded._make([*rows, left[left[:, 1] > 0]])

    def merged(self) -> Summary:
        """Of all the steps that the recordings have."""
        total = self.counts.sum()
        mean = (self.mean * self.counts).sum(0) / total
        m2 = self.m2.sum(0) + ((self.mean - mean) ** 2 * self.counts).sum(0)
        return Summary(int(total), mean, m2, self.low.min(0), self.high.max(0), self.buckets)


def folded(summaries: Iterable[tuple[Any, Mapping[str, Summary]]]) -> dict[str, Folded]:
    """Summaries that come in any order, each after what it is sorted by, a feature at a time; no more than a few of
    them are held."""
    parts: dict[str, _Fold] = {}
    for place, summary in summaries:
        for name, part in summary.items():
            parts.setdefault(name, _Fold()).add(place, part)
    return {name: part.folded() for name, part in parts.items()}


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
        return {name: dict(vars(feature)) for name, feature in sorted(self.features.items())}

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

    def require_usable(self, name: str) -> None:
        """Raise `Mismatch` with the fatal findings of `check`: nothing should be trained on such figures."""
        fatal = [f"{found.feature} dimension {found.dim} {found.what}" for found in self.check() if found.fatal]
        if fatal:
            raise Mismatch(
                f"statistics of {name} would spoil training: {'; '.join(fatal)}; see `upvla data stats "
                "check`, and repair or filter the recordings"
            )

    @staticmethod
    def from_json(value: Mapping[str, Mapping[str, Any]]) -> Statistics:
        def whole(feature: Mapping[str, Any]) -> FeatureStats:
            dims = {name: tuple(values) for name, values in feature.items() if name != "count"}
            return FeatureStats(count=feature["count"], **dims)

        try:
            return Statistics({name: whole(feature) for name, feature in value.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"statistics lack or misstate {error}; take those that came with the data") from error

    @staticmethod
    def merged(summaries: Iterable[Mapping[str, Summary]]) -> Statistics:
        """Of many recordings' summaries, {feature: Summary} each, in the order given."""
        return Statistics.folded(enumerate(summaries))

    @staticmethod
    def folded(summaries: Iterable[tuple[Any, Mapping[str, Summary]]]) -> Statistics:
        """Of summaries that come in any order, each after what it is sorted by: to the last bit those of that order,
        without holding more than a few of them."""
        return Statistics.of(folded(summaries))

    @staticmethod
    def of(features: Mapping[str, Folded]) -> Statistics:
        return Statistics({name: _figures(feature.merged()) for name, feature in features.items()})


class Finding(NamedTuple):
    """Something about one dimension that a person should know, or that stops training."""

    feature: str
    dim: int
    fatal: bool
    what: str


def _findings(name: str, feature: FeatureStats) -> Iterable[Finding]:
    for dim in range(len(feature.mean)):
        figures = [getattr(feature, figure)[dim] for figure in ("mean", "std", "low", "high", "q01", "q99")]
        mean, std, low, high, q01, q99 = figures
        slack = 1e-6 * max(abs(low), abs(high))  # what rounding may do
        if not np.isfinite(figures).all():
            yield Finding(name, dim, True, f"has figures that are not finite: {figures}")
        elif not (low <= q01 <= q99 <= high and low - slack <= mean <= high + slack and std >= 0):
            yield Finding(name, dim, True, f"has figures that contradict each other: {figures}")
        elif feature.constant[dim]:
            yield Finding(name, dim, False, f"is always {low:g}")
        elif (reach := max(high - q99, q01 - low)) > _SPARSE * (q99 - q01):
            what = f"is sparse: 98 % lie within {q99 - q01:g}, some {reach:g} beyond"
            yield Finding(name, dim, False, what)


def _figures(summary: Summary) -> FeatureStats:
    std = np.sqrt(summary.m2 / summary.count)
    scale = np.maximum(np.abs(summary.low), np.abs(summary.high))
    constant = std <= 1e-6 * np.maximum(scale, 1e-6)
    columns = list(zip(summary.histograms(), summary.low.tolist(), summary.high.tolist(), strict=True))
    q01, q99 = ([_quantile(histogram, q, low, high) for histogram, low, high in columns] for q in QUANTILES)
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


def _added(buckets: np.ndarray) -> np.ndarray:
    """i64[N,2] (key, count) -> i64[M,2], a row a key, sorted. Few rows are sorted, many are counted: both are exact."""
    keys, counts = buckets.T
    if len(keys) < keys[-1] // 16:
        present, place = np.unique(keys, return_inverse=True)
        return np.stack([present, np.bincount(place, weights=counts).astype(np.int64)], axis=1)
    histogram = np.bincount(keys, weights=counts).astype(np.int64)
    present = np.flatnonzero(histogram)
    return np.stack([present, histogram[present]], axis=1)


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """To seven digits, so that the last bits of another machine's arithmetic do not change the identity."""
    return tuple(float(f"{value:.7g}") for value in values)


def _quantile(histogram: np.ndarray, q: float, low: float, high: float) -> float:
    """The middle of the bucket in which the quantile lies, held within the range that was seen."""
    up_to = np.cumsum(histogram[:, 1])
    bucket = int(histogram[np.searchsorted(up_to, q * (up_to[-1] - 1), side="right"), 0])
    value = 0.0 if bucket == 0 else np.sign(bucket) * _SMALLEST * np.exp(abs(bucket) * _GROWTH)
    return float(min(max(value, low), high))
