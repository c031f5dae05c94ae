"""Making versions: appending staged recordings, removing some, each one atomic and safe against other committers.

A commit forms the next manifest from the newest one and *creates* it; whoever comes second forms theirs again from the
first one's. Nothing that a manifest refers to is ever changed.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from upvla.data.objects import put_table, read_index
from upvla.data.shards import Rejection, Staged
from upvla.data.tally import statistics_of
from upvla.data.versions import (
    assign_splits,
    dataset_root,
    draw,
    format_after,
    hashing_of,
    load_manifest,
    manifest_key,
    newest_manifest,
    read_quarantine,
    remember,
    remembered,
)
from upvla.errors import AlreadyExists, Corrupt, Mismatch, NotFound, StoreError, UpvlaError
from upvla.store import Store, content_hash, open_store, supports_conditional_create
from upvla.types import ActionSpace, Manifest

_COMMIT_ATTEMPTS = 100
_ASKED_AT_ONCE = 8

QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in Rejection._fields])
REMOVED = "removed"
"""Reason of a recording that was taken out on purpose: it stays out until its content changes."""
DAMAGED = "damaged"
"""Reason of a recording whose shard cannot be read any more: its source may bring it back."""
_NOT_BAD = ("duplicate", REMOVED)


def commit(
    store: Store,
    dataset: str,
    staged: Sequence[Staged],
    *,
    validation_fraction: float,
    options: Mapping[str, Any],
    min_accept_ratio: float = 0.0,
    settled: Collection[Rejection] = (),
) -> Manifest:
    """Add staged recordings to the newest version as the next one; atomic, and safe against concurrent committers.

    Recordings that are already there are skipped: committing the same things again returns the version that has them.
    `Corrupt` where fewer than `min_accept_ratio` are good, of all recordings or of the staged ones alone. `settled`
    rows leave the quarantine.
    """

    def append(root: Store, parent: Manifest | None) -> Manifest:
        return _appended(root, dataset, parent, staged, validation_fraction, options, min_accept_ratio, settled)

    return _publish(store, dataset, append, [key for part in staged for key in part.keys])


def remove(
    store: Store,
    dataset: str,
    ids: Collection[str],
    because: str,
    *,
    reason: str = REMOVED,
    unlisted: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Manifest:
    """The next version without these recordings (by id). Older versions keep them; `gc` frees what no version has.
    `unlisted`: indexes that cannot be read, which go with their shards, and what is known of the recordings there."""

    def without(root: Store, parent: Manifest | None) -> Manifest:
        return _reduced(root, parent or load_manifest(store, dataset), ids, reason, because, unlisted)

    return _publish(store, dataset, without)


def _publish(
    store: Store, dataset: str, form: Callable[[Store, Manifest | None], Manifest], staged: Sequence[str] = ()
) -> Manifest:
    """`staged`: keys of what `form` may add, which must be there."""
    root = dataset_root(store, dataset)
    require_conditional_create(store.url)
    for attempt in range(_COMMIT_ATTEMPTS):
        parent, manifest = _formed(store, dataset, form, staged, remembered(root) if attempt == 0 else None)
        if parent and parent.content_id == manifest.content_id:
            return parent
        try:
            token = root.create_json(manifest_key(manifest.version), asdict(manifest))
            remember(root, manifest, token)
            return manifest
        except AlreadyExists:
            time.sleep(min(attempt, 10) * 0.01 * (1 + uuid.uuid4().int % 100 / 100))  # no global random generator
    raise StoreError(f"{root.url}: {_COMMIT_ATTEMPTS} commits in a row were overtaken; run the ingest again")


def _formed(
    store: Store,
    dataset: str,
    form: Callable[[Store, Manifest | None], Manifest],
    staged: Sequence[str],
    likely: Manifest | None,
) -> tuple[Manifest | None, Manifest]:
    """The newest version and the one after it. That is formed on the `likely` one while the store is asked which is the
    newest, and for what was staged, and again if that is another; what `form` says of a version that is not the newest
    is nobody's business."""
    root, manifest = dataset_root(store, dataset), None
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as aside:
        listing = aside.submit(newest_manifest, store, dataset)
        there = aside.map(root.exists, staged)
        if likely is not None:
            with suppress(UpvlaError):
                manifest = form(root, likely)
        parent = listing.result()
        gone = {key for key, found in zip(staged, there, strict=True) if not found}
    if parent:
        gone -= {ref.key for ref in (*parent.shards, *parent.index, *parent.qa)}  # nothing that this commit adds
    if gone:
        raise NotFound(
            f"{root.url}: {min(gone)} is gone, with {len(gone) - 1} more of what was staged: a `gc` took it before "
            "this commit; nothing was committed, run the ingest again, which stages it again"
        )
    if manifest is None or parent is not likely:
        manifest = form(root, parent)
    return parent, manifest


@functools.cache
def require_conditional_create(url: str) -> None:
    """Once a process and store: one that ignores `If-None-Match` would let committers overwrite each other unseen."""
    if not supports_conditional_create(open_store(url)):
        raise StoreError(
            f"{url} does not refuse to create an object that is there (If-None-Match): versions could be lost. "
            "Use one that does: a local folder, S3, SeaweedFS 4.48 or newer, MinIO"
        )


def _appended(
    root: Store,
    dataset: str,
    parent: Manifest | None,
    staged: Sequence[Staged],
    validation_fraction: float,
    options: Mapping[str, Any],
    min_accept_ratio: float,
    settled: Collection[Rejection],
) -> Manifest:
    """The manifest that adds `staged` to `parent`."""
    header = _header(dataset, parent, staged, options, validation_fraction)
    shards, index = (list(parent.shards), list(parent.index)) if parent else ([], [])
    qa, rejected = (list(parent.qa), read_quarantine(root, parent)) if parent else ([], [])
    rejected = [row for row in rejected if row not in settled]
    removed = {row.episode_id for row in rejected if row.reason == REMOVED}
    lost = {row.episode_id for row in rejected if row.reason == DAMAGED}
    rows = {row["episode_id"].hex(): row for ref in reversed(index) for row in reversed(read_index(root, ref))}
    for identity in removed | lost:
        rows.pop(identity, None)
    before, judged_before, num_good = len(rows), set(rejected), 0
    for part in staged:
        rejected += part.rejected
        adds = False
        for shard, listing in zip(part.shards, part.index, strict=True):
            had = len(rows)
            for row in read_index(root, listing):
                if row["episode_id"].hex() in removed:
                    continue
                first = rows.setdefault(row["episode_id"].hex(), row)
                if first["source_key"] == row["source_key"]:
                    num_good += 1
                else:
                    detail = f"the same content as {first['source_key']}"
                    rejected.append(Rejection(row["source_key"], "duplicate", detail, row["source_token"]))
            if len(rows) > had:
                shards.append(shard)
                index.append(listing)
                adds = True
        qa += [ref for ref in part.qa if adds and ref not in qa]
    accepted = {row["source_key"] for row in rows.values()}
    kept = sorted({r for r in rejected if r.reason == REMOVED or (r.key not in accepted and r.episode_id not in rows)})
    quarantine = put_table(root, "quarantine", _quarantine_table(kept)) if kept else None
    new = [row for row in kept if row not in judged_before]
    for which, good, bad in (("", len(rows), kept), (" that came now", num_good, new)):
        num_bad = sum(row.reason not in _NOT_BAD for row in bad)
        if not rows or good < min_accept_ratio * (good + num_bad):
            where = f"; each is listed in {root.url}/{quarantine.key}" if quarantine else ""
            raise Corrupt(
                f"dataset {dataset}: {num_bad} of {good + num_bad} recordings{which} rejected "
                f"({dict(Counter(row.reason for row in bad))}), nothing was committed{where}; repair the source, or "
                f"lower min_accept_ratio ({min_accept_ratio:g})"
            )
    assert header is not None  # there are recordings
    draft = Manifest(
        dataset=dataset,
        version=parent.version + 1 if parent else 1,
        parent=parent.version if parent else None,
        shards=tuple(shards),
        index=tuple(index),
        qa=tuple(qa),
        stats_id="",
        action_space=header.action_space,
        cameras=header.cameras,
        num_episodes=0,
        num_steps=0,
        num_spans=0,
        quarantine=quarantine,
        options={
            "source": dict(options),
            "columns": dict(header.columns),
            "splits": {"validation_fraction": validation_fraction},
        },
        operation={"kind": "append", "added": len(rows) - before, "removed": 0},
    )
    return _completed(root, parent, draft, rows, kept)


def _reduced(
    root: Store,
    parent: Manifest,
    ids: Collection[str],
    reason: str,
    because: str,
    unlisted: Mapping[str, Sequence[str]],
) -> Manifest:
    """The manifest that lacks some of `parent`'s recordings, and the shards that are empty without them."""
    kept = read_quarantine(root, parent)
    before = {row.episode_id for row in kept}
    gone = set(ids).union(*unlisted.values()) - before
    rows: dict[str, dict[str, Any]] = {}
    shards, index = [], []
    for shard, listing in zip(parent.shards, parent.index, strict=True):
        if listing.key in unlisted:  # nobody knows what their source called them
            out_of = gone.intersection(unlisted[listing.key])
            kept += [Rejection(f"{shard.key}/{identity}", reason, because, "", identity) for identity in out_of]
            continue
        found = {row["episode_id"].hex(): row for row in read_index(root, listing)}
        out = [(identity, row) for identity, row in found.items() if identity in gone]
        kept += [Rejection(row["source_key"], reason, because, row["source_token"], identity) for identity, row in out]
        left = found.keys() - gone - before
        rows |= {identity: found[identity] for identity in left if identity not in rows}
        if left:
            shards.append(shard)
            index.append(listing)
    if not rows:
        raise Corrupt(f"dataset {parent.dataset}: that would remove every recording; delete the dataset instead")
    kept = sorted(set(kept))
    draft = replace(
        parent,
        version=parent.version + 1,
        parent=parent.version,
        shards=tuple(shards),
        index=tuple(index),
        quarantine=put_table(root, "quarantine", _quarantine_table(kept)) if kept else None,
        operation={"kind": reason, "added": 0, "removed": parent.num_episodes - len(rows), "because": because},
    )
    return _completed(root, parent, draft, rows, kept)


def _completed(
    root: Store,
    parent: Manifest | None,
    draft: Manifest,
    rows: Mapping[str, Mapping[str, Any]],
    kept: Sequence[Rejection],
) -> Manifest:
    """`draft` with everything that follows from its recordings: counts, splits, statistics, content id."""
    fraction = draft.options["splits"]["validation_fraction"]
    ids = sorted(rows)
    splits = assign_splits(ids, fraction, parent.options["splits"]["forced"] if parent else {})
    stats = statistics_of(root, draft.index, frozenset(i for i in ids if splits[i] == "train"))
    if parent is None or parent.stats_id != stats.stats_id:
        root.write_json(f"stats/{stats.stats_id}.json", stats.to_json())  # named by its content: twice is harmless
    forced = {i: side for i, side in splits.items() if (side == "validation") != (draw(i) < fraction)}
    manifest = replace(
        draft,
        format=format_after(parent),
        stats_id=stats.stats_id,
        num_episodes=len(rows),
        num_steps=sum(row["length"] for row in rows.values()),
        num_spans=sum(len(row["spans"]) for row in rows.values()),
        quarantined=dict(sorted(Counter(row.reason for row in kept).items())),
        options={**draft.options, "splits": {"validation_fraction": fraction, "forced": forced}},
    )
    content = {
        "episodes": [[identity, splits[identity]] for identity in ids],
        "qa": sorted(ref.sha256 for ref in manifest.qa),
        "stats": stats.stats_id,
        "action_space": manifest.action_space.to_json(),
        "cameras": list(manifest.cameras),
        "quarantined": [[row.key, row.reason] for row in kept],
        "options": manifest.options,
    }
    return replace(manifest, content_id=content_hash(content))


def require_same_import(parent: Manifest, options: Mapping[str, Any], validation_fraction: float) -> None:
    """Raise `Mismatch` where recordings that are imported like this cannot follow those of `parent`."""
    imported = {**parent.options["source"], "validation_fraction": parent.options["splits"]["validation_fraction"]}
    for name, value in {**options, "validation_fraction": validation_fraction}.items():
        if imported.get(name) != value:
            raise Mismatch(
                f"dataset {parent.dataset} was imported with {name}={imported.get(name)!r}, not {value!r}; keep it, or "
                "import under another dataset name"
            )


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
        require_same_import(parent, options, fraction)
    for part in staged:
        if part.action_space is None:
            continue
        if part.hashing != hashing_of(parent):
            raise Mismatch(
                f"dataset {dataset} identifies recordings by {hashing_of(parent)}, the new came by {part.hashing}: "
                "an older upvla began it meanwhile; run the ingest again"
            )
        new = _Header(part.action_space, dict(part.columns), part.cameras)
        header = header or new
        header.action_space.require_equal(new.action_space, ours=f"dataset {dataset}", theirs="the new recordings")
        if header != new:
            raise Mismatch(
                f"dataset {dataset} has columns {header.columns} and cameras {header.cameras}, the new recordings "
                f"{new.columns} and {new.cameras}; import them under another dataset name"
            )
    return header


def _quarantine_table(rows: Sequence[Rejection]) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], QUARANTINE_SCHEMA)
