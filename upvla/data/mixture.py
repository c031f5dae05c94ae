"""Weights and a seed -> the order of all samples. A position is one integer; everything else follows from it.

Three steps, each pure and none of them drawing from a generator with a state:
1. A position's draw: inside a global batch positions are shuffled, so that every rank's stride gets every source.
2. A draw's source: a repeating sequence in which each source keeps within one draw of its share, always (Tijdeman's
   chairman assignment), so shares are exact over a period and exact in every batch where they can be.
3. A source's n-th draw: epoch n // size, and in it a permutation of its samples fixed by (seed, source, epoch).
Random numbers are raw Philox words keyed by a hash of their purpose: stable over platforms and numpy versions.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, Mismatch
from upvla.store import Store, content_hash
from upvla.types import MixturePlan, MixtureSource, SampleRef

_Key = TypeVar("_Key")
_MAX_PERIOD = 10_000  # weights are taken as fractions with at most this denominator


class SourceConfig(BaseModel):
    """One source of a mixture: robot windows or questions of a dataset, by default of its newest version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    kind: Literal["robot", "qa"]
    weight: float = Field(gt=0)
    version: int | None = None


class MixtureConfig(BaseModel):
    """What training draws from. `global_batch` counts rows over all ranks and accumulation steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    seed: int = 0
    global_batch: int = Field(gt=0)

    def plan(self, store: Store, split: Literal["train", "validation"] = "train") -> MixturePlan:
        """Pin every source to a version of its dataset. `NotFound` where there is none."""
        pinned = []
        for source in self.sources:
            manifest = load_manifest(store, source.dataset, source.version)
            pinned.append(
                MixtureSource(
                    dataset=source.dataset,
                    version=manifest.version,
                    content_id=manifest.content_id,
                    kind=source.kind,
                    weight=source.weight,
                    split=split,
                )
            )
        return make_plan(pinned, self.seed, self.global_batch)


def make_plan(sources: Sequence[MixtureSource], seed: int, global_batch: int) -> MixturePlan:
    """Raises `ConfigError` where the order would not be defined."""
    if not sources or global_batch < 1:
        raise ConfigError(f"a mixture needs a source and a global batch of at least 1, not {global_batch}")
    for source in sources:
        if not source.weight > 0:
            raise ConfigError(f"mixture source {source.dataset}/{source.kind}: weight {source.weight} is not positive")
    plan = MixturePlan(tuple(sources), seed, global_batch)
    return replace(plan, plan_id=content_hash(asdict(plan)))


def plan_from_json(value: Mapping[str, Any]) -> MixturePlan:
    """The inverse of `dataclasses.asdict`; refuses a plan whose content does not match its id."""
    sources = tuple(MixtureSource(**source) for source in value["sources"])
    plan = make_plan(sources, value["seed"], value["global_batch"])
    if plan.plan_id != value["plan_id"]:
        raise Mismatch(f"mixture plan {value['plan_id']} was changed after it was made; make it again")
    return plan


class Mixture:
    """A plan over open datasets. `sample_at` is a pure function of the position; threads may share it."""

    def __init__(self, plan: MixturePlan, datasets: Mapping[str, Dataset]):
        self.plan, self.datasets = plan, dict(datasets)
        self._samples: list[_RobotSamples | _QuestionSamples] = []
        for source in plan.sources:
            dataset = self.datasets.get(source.dataset)
            if dataset is None:
                raise ConfigError(f"the mixture needs dataset {source.dataset!r}; given: {sorted(self.datasets)}")
            if dataset.manifest.content_id != source.content_id:
                raise Mismatch(
                    f"mixture {plan.plan_id} was made for content {source.content_id} of {source.dataset} v"
                    f"{source.version}, opened is {dataset.manifest.content_id} v{dataset.manifest.version}"
                )
            samples = _RobotSamples(dataset, source) if source.kind == "robot" else _QuestionSamples(dataset, source)
            if not len(samples):
                raise ConfigError(
                    f"{source.dataset} v{source.version} has no {source.kind} samples in its {source.split} split; "
                    "ingest more recordings or drop the source"
                )
            self._samples.append(samples)
        self._turns, self._ranks, self._shares = _chairman(tuple(source.weight for source in plan.sources))
        self._slots = _Cache(self._slots_of, size=64)
        self._orders = _Cache(self._order_of, size=2 * len(plan.sources))

    def __len__(self) -> int:
        """Positions until every source has been seen at least once."""
        return max(-(-len(s) * len(self._turns) // share) for s, share in zip(self._samples, self._shares, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source, in the plan's order."""
        return tuple(map(len, self._samples))

    def share(self, start: int, end: int) -> dict[str, float]:
        """What fraction of the positions `[start, end)` each source, named dataset/kind, really has."""
        counts = np.bincount([self.sample_at(p).source for p in range(start, end)], minlength=len(self.plan.sources))
        names = [f"{source.dataset}/{source.kind}" for source in self.plan.sources]
        return {name: float(count) / (end - start) for name, count in zip(names, counts, strict=True)}

    def sample_at(self, position: int) -> SampleRef:
        batch, slot = divmod(position, self.plan.global_batch)
        draw = batch * self.plan.global_batch + int(self._slots[batch][slot])
        period, turn = divmod(draw, len(self._turns))
        source = int(self._turns[turn])
        nth = period * self._shares[source] + int(self._ranks[turn])
        epoch, place = divmod(nth, len(self._samples[source]))
        return self._samples[source].at(source, int(self._orders[source, epoch][place]))

    def _slots_of(self, batch: int) -> np.ndarray:
        return _permutation(self.plan.global_batch, self.plan.seed, "slots", batch)

    def _order_of(self, key: tuple[int, int]) -> np.ndarray:
        number, epoch = key
        source = self.plan.sources[number]
        name = f"{number}/{source.dataset}/{source.kind}/{source.split}"
        return _permutation(len(self._samples[number]), self.plan.seed, name, epoch)


class _RobotSamples:
    """Every (span, step) of one split, numbered in the order of the episode index."""

    def __init__(self, dataset: Dataset, source: MixtureSource):
        spans = [
            (row, i, span.start, span.end)
            for row, episode in enumerate(dataset.episodes)
            if episode.split == source.split
            for i, span in enumerate(episode.spans)
        ]
        self._spans = np.array(spans, np.int64).reshape(-1, 4)
        self._ends = np.cumsum(self._spans[:, 3] - self._spans[:, 2])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def at(self, source: int, number: int) -> SampleRef:
        where = int(np.searchsorted(self._ends, number, side="right"))
        row, span, _, end = self._spans[where].tolist()
        return SampleRef(source, "robot", row, end - int(self._ends[where]) + number, span, -1)


class _QuestionSamples:
    """Questions about one split's recordings: training wordings for training, held-out ones for validation."""

    def __init__(self, dataset: Dataset, source: MixtureSource):
        wording = "train" if source.split == "train" else "held_out"
        self._rows = [
            (i, row.episode, row.step)
            for i, row in enumerate(dataset.qa)
            if row.template_split in (wording, "both") and dataset.episodes[row.episode].split == source.split
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, source: int, number: int) -> SampleRef:
        row, episode, step = self._rows[number]
        return SampleRef(source, "qa", episode, step, -1, row)


class _Cache(Generic[_Key]):
    """The last few results of a pure function; threads that miss together compute together, to the same result."""

    def __init__(self, compute: Callable[[_Key], np.ndarray], size: int):
        self._compute, self._size = compute, size
        self._values: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, key: _Key) -> np.ndarray:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._compute(key)
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


@functools.lru_cache(maxsize=16)
def _chairman(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """(source of every draw of one period, how many draws of that source came before it, draws a source a period).

    Of the sources that would otherwise fall behind by a whole draw the one with the nearest deadline is taken; no
    source is ever further than one draw from its share. R. Tijdeman, "The chairman assignment problem", 1980.
    """
    fractions = [Fraction(weight).limit_denominator(_MAX_PERIOD) for weight in weights]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    period = functools.reduce(lambda a, b: a * b // np.gcd(a, b), (int(share.denominator) for share in shares))
    if period > _MAX_PERIOD:
        rounded = [max(1, round(share * _MAX_PERIOD)) for share in shares]
        period = sum(rounded)
        shares = [Fraction(count, period) for count in rounded]
    counts = [int(share * period) for share in shares]
    done, turns, ranks = [0] * len(counts), [], []
    slack = Fraction(1, max(1, 2 * len(counts) - 2))
    for draw in range(1, period + 1):
        due = [i for i, share in enumerate(shares) if share * draw - done[i] >= slack and done[i] < counts[i]]
        chosen = min(due, key=lambda i: ((1 - slack + done[i]) / shares[i], i))
        turns.append(chosen)
        ranks.append(done[chosen])
        done[chosen] += 1
    return np.array(turns), np.array(ranks), tuple(counts)


def _permutation(size: int, seed: int, *purpose: str | int) -> np.ndarray:
    """i64[size], a function of the arguments alone."""
    key = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "big")).random_raw(size)
    return np.argsort(words, kind="stable")
