"""One version of a dataset, for reading; the layout is in docs/data-format.md.

    <store>/datasets/<name>/data/<hash>.parquet       steps: encoded images, actions, states; whole recordings
                            index/<hash>.parquet      one row a recording of one shard: where it lies, spans, summary
                            qa/<hash>.parquet         questions about (recording, step)
                            stats/<stats_id>.json     figures over the training split
                            quarantine/<hash>.parquet one row a rejected recording
                            _manifest/v00000001.json  created once each; the highest is the newest version

Everything but manifests is named by its content, so writing it twice, or being killed half-way, changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from upvla.data.objects import read_index, read_summaries
from upvla.data.rowgroups import Held, RowGroupPool
from upvla.data.shards import Rejection
from upvla.data.stats import Statistics, Summary
from upvla.data.versions import Split, assign_splits, dataset_root, load_manifest, read_quarantine
from upvla.errors import Corrupt
from upvla.store import Store
from upvla.types import Manifest, Span

__all__ = ["Dataset", "EpisodeFilter", "EpisodeRow", "QuestionRow", "load_manifest"]


class EpisodeRow(NamedTuple):
    """One recording of a version. Its steps are rows `row0 .. row0 + length` of `shard`."""

    id: str
    source_key: str
    source_token: str
    embodiment: str
    scene: str
    split: Split
    rate_hz: float
    length: int
    shard: str
    row0: int
    spans: tuple[Span, ...]


class EpisodeFilter(BaseModel):
    """Which recordings are meant: those that fit every field that is set. Empty means any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[str, ...] = ()  # source keys, with * and ?
    scenes: tuple[str, ...] = ()
    embodiments: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # recordings that have one of them; of these only such spans are windows
    min_steps: int = 0
    max_steps: int | None = None

    def fits(self, row: EpisodeRow) -> bool:
        return (
            (not self.keys or any(fnmatch(row.source_key, pattern) for pattern in self.keys))
            and (not self.scenes or row.scene in self.scenes)
            and (not self.embodiments or row.embodiment in self.embodiments)
            and (not self.tasks or any(span.task in self.tasks for span in row.spans))
            and self.min_steps <= row.length
            and (self.max_steps is None or row.length <= self.max_steps)
        )

    def takes(self, span: Span) -> bool:
        """Whether windows may come from this span of a recording that fits."""
        return not self.tasks or span.task in self.tasks


class QuestionRow(NamedTuple):
    """A question about one step of recording `episode` (a row of `Dataset.episodes`)."""

    episode: int
    step: int
    topic: str
    question: str
    answer: str
    template_split: Literal["train", "held_out", "both"]
    more: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All rounds of (question, answer)."""
        return ((self.question, self.answer), *self.more)


class Dataset:
    """One version, for reading. Threads may share it; other processes get their own by pickling.

    Up to `pool_mb` of row groups stay in memory. Mixtures visit steps in an order that has some row groups open at a
    time: a pool that holds these reads each once, a smaller one reads a row group for almost every sample.
    """

    def __init__(self, store: Store, manifest: Manifest, *, pool_mb: float = 768):
        self.store, self.manifest, self._pool_mb = store, manifest, pool_mb
        self.root = dataset_root(store, manifest.dataset)
        self._rows = RowGroupPool(self.root, pool_mb)

    def __reduce__(self) -> tuple[Callable[..., Dataset], tuple[Any, ...]]:
        return _reopen, (self.store, self.manifest, self._pool_mb)

    @cached_property
    def episodes(self) -> list[EpisodeRow]:
        """Sorted by id, so that row numbers do not depend on how recordings were packed into shards."""
        found: dict[str, EpisodeRow] = {}
        splits = self.manifest.options["splits"]
        listed = [
            (shard.key, row)
            for shard, ref in zip(self.manifest.shards, self.manifest.index, strict=True)
            for row in read_index(self.root, ref)
        ]
        removed = {row.episode_id for row in self.quarantine}
        ids = sorted({row["episode_id"].hex() for _, row in listed} - removed)
        sides = assign_splits(ids, splits["validation_fraction"], splits["forced"])
        for shard, row in listed:
            identity = row["episode_id"].hex()
            if identity in removed:
                continue
            spans = tuple(Span(**span) for span in row["spans"])
            plain = {name: row[name] for name in EpisodeRow._fields if name in row}
            found.setdefault(
                identity, EpisodeRow(**plain | {"spans": spans}, id=identity, split=sides[identity], shard=shard)
            )
        return [found[identity] for identity in ids]

    @cached_property
    def qa(self) -> list[QuestionRow]:
        number = {episode.id: i for i, episode in enumerate(self.episodes)}
        rows = (row for ref in self.manifest.qa for row in self.root.parquet(ref.key).read().to_pylist())
        found = {
            QuestionRow(
                number[identity],
                **{name: row[name] for name in QuestionRow._fields[1:-1]},
                more=tuple((part["question"], part["answer"]) for part in row.get("more") or ()),
            )
            for row in rows
            if (identity := row["episode_id"].hex()) in number
        }
        return sorted(found)

    def conversation(self, number: int) -> list[QuestionRow]:
        """All questions about the frame of question `number` that are worded for the same split, that one first."""
        asked = self._asked_of[_frame(self.qa[number])]
        first = asked.index(number)
        return [self.qa[i] for i in (*asked[first:], *asked[:first])]

    @cached_property
    def _asked_of(self) -> dict[tuple[int, int, str], list[int]]:
        asked: dict[tuple[int, int, str], list[int]] = {}
        for number, row in enumerate(self.qa):
            asked.setdefault(_frame(row), []).append(number)
        return asked

    @cached_property
    def stats(self) -> Statistics:
        """Over the training split. Figures that are not these recordings' are refused by naming the dimension."""
        key = f"stats/{self.manifest.stats_id}.json"
        stats = Statistics.from_json(self.root.read_json(key))
        if stats.stats_id != self.manifest.stats_id:
            stats.require_equal(self.counted_stats(), ours=f"{self.root.url}/{key}", theirs="the recordings")
            raise Corrupt(f"{self.root.url}/{key} does not match its name")
        return stats

    def counted_stats(self) -> Statistics:
        """The same, from what the index says of every recording."""
        sides = zip(self.episodes, self.summaries(), strict=True)
        return Statistics.merged(summary for row, summary in sides if row.split == "train")

    def summaries(self) -> list[dict[str, Summary]]:
        """What every recording contributes to the statistics, by feature; in the order of `episodes`."""
        found: dict[str, dict[str, Summary]] = {}
        for ref in self.manifest.index:
            found |= read_summaries(self.root, ref, [row["episode_id"].hex() for row in read_index(self.root, ref)])
        return [found[row.id] for row in self.episodes]

    @property
    def quarantine(self) -> list[Rejection]:
        return read_quarantine(self.root, self.manifest)

    @property
    def row_group_bytes(self) -> float:
        """Mean size of a row group."""
        return sum(shard.num_bytes for shard in self.manifest.shards) / max(1, len(self._group_edges) - 1)

    def keep(self, row_groups: float) -> None:
        """Have memory for so many row groups of the mean size, and no more."""
        self._pool_mb = row_groups * self.row_group_bytes / 2**20
        self._rows.resize(self._pool_mb)

    def row_groups_of(self, episodes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Steps `[start, end)` of recordings, i64[N] each, cut where a row group ends: i64[4,M], M >= N parts as (which
        of the N, number of the row group in this version, first step, end)."""
        row0, edges = self._first_rows[episodes], self._group_edges
        low, high = (np.searchsorted(edges, row0 + step, side="right") - 1 for step in (starts, ends - 1))
        counts = high - low + 1
        of = np.repeat(np.arange(len(counts)), counts)
        groups = np.arange(len(of)) + (low - np.cumsum(counts) + counts)[of]
        first = np.maximum(starts[of], edges[groups] - row0[of])
        return np.stack([of, groups, first, np.minimum(ends[of], edges[groups + 1] - row0[of])])

    @cached_property
    def _shard_rows(self) -> dict[str, int]:
        """Shard -> how many rows the shards before it have."""
        before = itertools.accumulate((shard.rows for shard in self.manifest.shards), initial=0)
        return {shard.key: count for shard, count in zip(self.manifest.shards, before, strict=False)}

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """i64[E]: the row at which every recording begins, counted over all shards."""
        return np.array([self._shard_rows[row.shard] + row.row0 for row in self.episodes], np.int64)

    @cached_property
    def _group_edges(self) -> np.ndarray:
        """i64[G + 1]: the row at which every row group begins, counted over all shards, and their end. Indexes say it;
        footers, a file to open each, are asked only where an older upvla wrote the index."""
        edges = list[np.ndarray]()
        for shard, ref in zip(self.manifest.shards, self.manifest.index, strict=True):
            rows = read_index(self.root, ref)
            known = [start for row in rows for start in row.get("row_groups", ())]
            edges.append(np.array(known or self._rows.group_starts(shard.key), np.int64) + self._shard_rows[shard.key])
        return np.concatenate([*edges, [sum(shard.rows for shard in self.manifest.shards)]])

    def read(self, episode: int, steps: Sequence[int], columns: Sequence[str]) -> dict[str, Any]:
        """Steps of one recording: numeric columns as arrays [K] or [K,D], `image_<camera>` as K encoded frames."""
        return self.read_each(episode, dict.fromkeys(columns, steps))

    def read_each(self, episode: int, wanted: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The same where every column has steps of its own; the row group is read once with all of them."""
        return self.hold(episode, wanted).read()

    def hold(self, episode: int, wanted: Mapping[str, Sequence[int]]) -> Held:
        """The same, in memory for as long as the answer is, to be read later."""
        row = self.episodes[episode]
        try:
            return self._rows.hold(row.shard, wanted, row.row0, row.length)
        except IndexError as error:
            raise IndexError(f"{row.source_key}: {error}") from error


def _reopen(store: Store, manifest: Manifest, pool_mb: float) -> Dataset:
    return Dataset(store, manifest, pool_mb=pool_mb)


def _frame(row: QuestionRow) -> tuple[int, int, str]:
    return row.episode, row.step, row.template_split
