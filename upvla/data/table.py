"""Recordings as an immutable, versioned Parquet table. Creating a manifest is the commit; docs/data-format.md.

    <store>/datasets/<name>/data/<hash>.parquet       steps: encoded images, actions, states; whole recordings
                            index/<hash>.parquet      one row a recording of one shard: where it lies, spans, summary
                            qa/<hash>.parquet         questions about (recording, step)
                            stats/<stats_id>.json     figures over the training split
                            quarantine/<hash>.parquet one row a rejected recording
                            _manifest/v00000001.json  created once each; the highest is the newest version

Everything but manifests is named by its content, so writing it twice, or being killed half-way, changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from upvla.data.rowgroups import RowGroupPool
from upvla.data.shards import INDEX_SCHEMA, Rejection, Staged, put_table, refs
from upvla.data.stats import Statistics, Summary
from upvla.errors import AlreadyExists, Corrupt, Mismatch, NotFound, StoreError
from upvla.store import Store, content_hash
from upvla.types import ActionSpace, Manifest, ShardRef, Span

Split = Literal["train", "validation"]

_COMMIT_ATTEMPTS = 40

QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "reason", "detail", "token")])


def dataset_root(store: Store, dataset: str) -> Store:
    return store.sub(f"datasets/{dataset}")


# --------------------------------------------------------------------------------------------------------- committing


def commit(
    store: Store,
    dataset: str,
    staged: Sequence[Staged],
    *,
    validation_fraction: float,
    options: Mapping[str, Any],
    min_accept_ratio: float = 0.0,
) -> Manifest:
    """Add staged recordings to the newest version as the next one; atomic, and safe against concurrent committers.

    Recordings that are already there are skipped: committing the same things again returns the version that has them.
    """
    root = dataset_root(store, dataset)
    for attempt in range(_COMMIT_ATTEMPTS):
        parent = newest_manifest(store, dataset)
        manifest = _rebase(root, dataset, parent, staged, validation_fraction, options, min_accept_ratio)
        if parent and parent.content_id == manifest.content_id:
            return parent
        try:
            root.create_json(_manifest_key(manifest.version), asdict(manifest))
            return manifest
        except AlreadyExists:
            time.sleep(min(attempt, 10) * 0.01 * (1 + uuid.uuid4().int % 100 / 100))  # no global random generator
    raise StoreError(f"{root.url}: {_COMMIT_ATTEMPTS} commits in a row were overtaken; run the ingest again")


def newest_manifest(store: Store, dataset: str) -> Manifest | None:
    keys = dataset_root(store, dataset).list("_manifest/v")
    return load_manifest(store, dataset, int(keys[-1][-13:-5])) if keys else None


def load_manifest(store: Store, dataset: str, version: int | None = None) -> Manifest:
    """The given version, or the newest. `NotFound` where there is none."""
    root = dataset_root(store, dataset)
    if version is None:
        found = newest_manifest(store, dataset)
        if found is None:
            raise NotFound(f"{root.url} holds no dataset; `upvla ingest` makes one")
        return found
    value = root.read_json(_manifest_key(version))
    try:
        return Manifest(
            **value
            | {name: refs(value[name]) for name in ("shards", "index", "qa")}
            | {
                "action_space": ActionSpace.from_json(value["action_space"]),
                "cameras": tuple(value["cameras"]),
                "quarantine": ShardRef(**value["quarantine"]) if value["quarantine"] else None,
            }
        )
    except (KeyError, TypeError) as error:
        raise Corrupt(f"{root.url}/{_manifest_key(version)}: {error!r}; use the version before") from error


def _rebase(
    root: Store,
    dataset: str,
    parent: Manifest | None,
    staged: Sequence[Staged],
    validation_fraction: float,
    options: Mapping[str, Any],
    min_accept_ratio: float,
) -> Manifest:
    """The manifest that adds `staged` to `parent`."""
    shards, index = (list(parent.shards), list(parent.index)) if parent else ([], [])
    qa, rejected = (list(parent.qa), read_quarantine(root, parent)) if parent else ([], [])
    rows = {row["episode_id"].hex(): row for ref in reversed(index) for row in reversed(_read_index(root, ref))}
    header = _header(dataset, parent, staged, options, validation_fraction)
    for part in staged:
        rejected += part.rejected
        adds = False
        for shard, listing in zip(part.shards, part.index, strict=True):
            before = len(rows)
            for row in _read_index(root, listing):
                first = rows.setdefault(row["episode_id"].hex(), row)
                if first["source_key"] != row["source_key"]:
                    detail = f"the same content as {first['source_key']}"
                    rejected.append(Rejection(row["source_key"], "duplicate", detail, row["source_token"]))
            if len(rows) > before:
                shards.append(shard)
                index.append(listing)
                adds = True
        qa += [ref for ref in part.qa if adds and ref not in qa]
    accepted = {row["source_key"] for row in rows.values()}
    kept = sorted({row for row in rejected if row.key not in accepted})
    quarantine = put_table(root, "quarantine", _quarantine_table(kept)) if kept else None
    bad = sum(row.reason != "duplicate" for row in kept)
    if not rows or header is None or len(rows) < min_accept_ratio * (len(rows) + bad):
        where = f"; each is listed in {root.url}/{quarantine.key}" if quarantine else ""
        raise Corrupt(
            f"dataset {dataset}: {bad} of {len(rows) + bad} recordings rejected "
            f"({dict(Counter(row.reason for row in kept))}), nothing was committed{where}; repair the source, or lower "
            f"min_accept_ratio ({min_accept_ratio:g})"
        )
    ids = sorted(rows)
    splits = _assign_splits(ids, validation_fraction, parent.options["splits"]["forced"] if parent else {})
    training = (rows[identity] for identity in ids if splits[identity] == "train")
    stats = Statistics.merged(
        {name: Summary.from_json(part) for name, part in json.loads(row["summary"]).items()} for row in training
    )
    if not root.exists(f"stats/{stats.stats_id}.json"):
        root.write_json(f"stats/{stats.stats_id}.json", stats.to_json())
    forced = {i: side for i, side in splits.items() if (side == "validation") != (_draw(i) < validation_fraction)}
    manifest = Manifest(
        dataset=dataset,
        version=parent.version + 1 if parent else 1,
        parent=parent.version if parent else None,
        shards=tuple(shards),
        index=tuple(index),
        qa=tuple(qa),
        stats_id=stats.stats_id,
        action_space=header.action_space,
        cameras=header.cameras,
        num_episodes=len(rows),
        num_steps=sum(row["length"] for row in rows.values()),
        num_spans=sum(len(row["spans"]) for row in rows.values()),
        quarantined=dict(sorted(Counter(row.reason for row in kept).items())),
        quarantine=quarantine,
        options={
            "source": dict(options),
            "columns": dict(header.columns),
            "splits": {"validation_fraction": validation_fraction, "forced": forced},
        },
    )
    content = {
        "episodes": [[identity, splits[identity]] for identity in ids],
        "qa": sorted(ref.sha256 for ref in qa),
        "stats": stats.stats_id,
        "action_space": manifest.action_space.to_json(),
        "cameras": list(manifest.cameras),
        "quarantined": [[row.key, row.reason] for row in kept],
        "options": manifest.options,
    }
    return replace(manifest, content_id=content_hash(content))


class _Header(NamedTuple):
    """What all recordings of one dataset share."""

    action_space: ActionSpace
    columns: Mapping[str, int]
    cameras: tuple[str, ...]


def _header(
    dataset: str, parent: Manifest | None, staged: Sequence[Staged], options: Mapping[str, Any], fraction: float
) -> _Header | None:
    """Raise `Mismatch` where the new recordings cannot belong to the old ones, or to each other."""
    header = None
    if parent:
        header = _Header(parent.action_space, parent.options["columns"], parent.cameras)
        imported = {**parent.options["source"], "validation_fraction": parent.options["splits"]["validation_fraction"]}
        for name, value in {**options, "validation_fraction": fraction}.items():
            if imported.get(name) != value:
                raise Mismatch(
                    f"dataset {dataset} was imported with {name}={imported.get(name)!r}, not {value!r}; keep it, or "
                    "import under another dataset name"
                )
    for part in staged:
        if part.action_space is None:
            continue
        new = _Header(part.action_space, dict(part.columns), part.cameras)
        header = header or new
        header.action_space.require_equal(new.action_space, ours=f"dataset {dataset}", theirs="the new recordings")
        if header != new:
            raise Mismatch(
                f"dataset {dataset} has columns {header.columns} and cameras {header.cameras}, the new recordings "
                f"{new.columns} and {new.cameras}; import them under another dataset name"
            )
    return header


def _assign_splits(ids: Sequence[str], fraction: float, forced: Mapping[str, Split]) -> dict[str, Split]:
    """By hash of the id, so that a recording never changes sides; where a side would be empty (and there are two
    recordings), the nearest one is forced onto it, and stays there in later versions."""
    splits: dict[str, Split] = {i: forced.get(i) or ("validation" if _draw(i) < fraction else "train") for i in ids}
    order = sorted(ids, key=_draw)
    if fraction > 0 and len(ids) > 1:
        if "validation" not in splits.values():
            splits[order[0]] = "validation"
        if "train" not in splits.values():
            splits[order[-1]] = "train"
    return splits


def _draw(identity: str) -> float:
    return int(hashlib.sha256(f"split/{identity}".encode()).hexdigest()[:13], 16) / 16**13


def _read_index(root: Store, ref: ShardRef, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    return root.parquet(ref.key).read(columns=list(columns) if columns else None).to_pylist()


def read_quarantine(root: Store, manifest: Manifest) -> list[Rejection]:
    if manifest.quarantine is None:
        return []
    return [Rejection(**row) for row in root.parquet(manifest.quarantine.key).read().to_pylist()]


def _quarantine_table(rows: Sequence[Rejection]) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], QUARANTINE_SCHEMA)


def _manifest_key(version: int) -> str:
    return f"_manifest/v{version:08d}.json"


# ------------------------------------------------------------------------------------------------------------ reading


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

    Up to `pool_mb` of row groups stay in memory. Mixtures visit steps in any order, so a pool that holds the dataset
    reads it once; a smaller one reads a row group for almost every sample.
    """

    def __init__(self, store: Store, manifest: Manifest, *, pool_mb: int = 768):
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
        columns = [name for name in INDEX_SCHEMA.names if name != "summary"]
        listed = [
            (shard.key, row)
            for shard, ref in zip(self.manifest.shards, self.manifest.index, strict=True)
            for row in _read_index(self.root, ref, columns)
        ]
        ids = sorted({row["episode_id"].hex() for _, row in listed})
        sides = _assign_splits(ids, splits["validation_fraction"], splits["forced"])
        for shard, row in listed:
            identity = row["episode_id"].hex()
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

    @cached_property
    def stats(self) -> Statistics:
        """Over the training split."""
        stats = Statistics.from_json(self.root.read_json(f"stats/{self.manifest.stats_id}.json"))
        if stats.stats_id != self.manifest.stats_id:
            raise Corrupt(f"{self.root.url}/stats/{self.manifest.stats_id}.json does not match its name")
        return stats

    @property
    def quarantine(self) -> list[Rejection]:
        return read_quarantine(self.root, self.manifest)

    def read(self, episode: int, steps: Sequence[int], columns: Sequence[str]) -> dict[str, Any]:
        """Steps of one recording: numeric columns as arrays [K] or [K,D], `image_<camera>` as K encoded frames."""
        row = self.episodes[episode]
        if not all(0 <= step < row.length for step in steps):
            raise IndexError(f"steps {list(steps)} of {row.source_key}, which has {row.length}")
        return self._rows.take(row.shard, [row.row0 + step for step in steps], tuple(columns))


def _reopen(store: Store, manifest: Manifest, pool_mb: int) -> Dataset:
    return Dataset(store, manifest, pool_mb=pool_mb)
