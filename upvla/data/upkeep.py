"""Looking after a dataset: what changed between versions, whether every byte is as it was written, what can go."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from upvla.data.commit import DAMAGED, remove
from upvla.data.objects import read_index
from upvla.data.rowgroups import starts_of
from upvla.data.shards import Staged
from upvla.data.table import Dataset, EpisodeFilter
from upvla.data.versions import (
    dataset_root,
    list_tags,
    list_versions,
    load_manifest,
    manifest_key,
    open_version,
)
from upvla.errors import ConfigError, NotFound
from upvla.store import Store
from upvla.types import Manifest, ShardRef

GRACE_S = 7 * 24 * 3600.0
"""Objects younger than this may belong to an ingest that has not committed yet."""


class Damage(NamedTuple):
    """An object of a version that is not what its manifest says, and the recordings that it takes along."""

    key: str
    what: str
    episodes: tuple[str, ...]


def list_datasets(store: Store) -> list[str]:
    return sorted({key.split("/")[1] for key in store.list("datasets/") if "/_manifest/v" in key})


def history(store: Store, dataset: str) -> list[dict[str, Any]]:
    """A row a version, oldest first: parent, how it came about, counts, tags."""
    tags: dict[int, list[str]] = {}
    for tag, version in list_tags(store, dataset).items():
        tags.setdefault(version, []).append(tag)
    rows = []
    for version in list_versions(store, dataset):
        manifest = load_manifest(store, dataset, version)
        rows.append(describe(manifest) | {"operation": dict(manifest.operation), "tags": tags.get(version, [])})
    return rows


def describe(manifest: Manifest) -> dict[str, Any]:
    """Counts and identities of one version, as JSON."""
    return {
        "dataset": manifest.dataset,
        "version": manifest.version,
        "parent": manifest.parent,
        "recordings": manifest.num_episodes,
        "segments": manifest.num_spans,
        "steps": manifest.num_steps,
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "content_id": manifest.content_id,
        "stats_id": manifest.stats_id,
        "action_space": manifest.action_space.name,
        "cameras": list(manifest.cameras),
        "quarantined": dict(manifest.quarantined),
    }


def diff(store: Store, before: str, after: str) -> dict[str, Any]:
    """What `after` (dataset@version or @tag) has that `before` has not, and the other way round, by source key."""
    old, new = (Dataset(store, open_version(store, name)) for name in (before, after))
    rows = [{row.id: row for row in dataset.episodes} for dataset in (old, new)]
    added, removed = (
        [rows[have][i] for i in sorted(rows[have].keys() - rows[lack].keys())] for have, lack in ((1, 0), (0, 1))
    )
    quarantine = [Counter(row.reason for row in dataset.quarantine) for dataset in (old, new)]
    reasons = sorted(quarantine[0].keys() | quarantine[1].keys())
    return {
        "added": [row.source_key for row in added],
        "removed": [row.source_key for row in removed],
        "steps": sum(row.length for row in added) - sum(row.length for row in removed),
        "segments": sum(len(row.spans) for row in added) - sum(len(row.spans) for row in removed),
        "quarantined": {
            r: quarantine[1][r] - quarantine[0][r] for r in reasons if quarantine[1][r] != quarantine[0][r]
        },
        "same_statistics": old.manifest.stats_id == new.manifest.stats_id,
    }


def remove_where(store: Store, dataset: str, where: EpisodeFilter, because: str) -> Manifest:
    """The next version without the recordings that fit. `ConfigError` for a filter that fits everything or nothing, and
    where `dataset` names a version (`name@version`) that another one follows."""
    if where == EpisodeFilter():
        raise ConfigError(f"dataset {dataset}: the filter is empty and would remove everything; set one of its fields")
    named = open_version(store, dataset)
    dataset, newest = named.dataset, load_manifest(store, named.dataset)
    if named.version != newest.version:
        raise ConfigError(
            f"dataset {dataset}: v{named.version} is not the newest, v{newest.version}, from which recordings go; "
            f"say {dataset} or {dataset}@{newest.version}"
        )
    found = Dataset(store, newest)
    ids = [row.id for row in found.episodes if where.fits(row)]
    if not ids:
        raise ConfigError(
            f"dataset {dataset} v{found.manifest.version}: no recording fits the filter, nothing was done"
        )
    return remove(store, dataset, ids, because)


# -------------------------------------------------------------------------------------------------- every byte


def verify(store: Store, manifest: Manifest) -> list[Damage]:
    """Re-read and re-hash every object of a version, and compare indexes with footers. Empty: all is well."""
    root = dataset_root(store, manifest.dataset)
    damages = []
    for shard, listing in zip(manifest.shards, manifest.index, strict=True):
        unlisted = _problem(root, listing)
        rows = [] if unlisted else read_index(root, listing)
        problem = _problem(root, shard) or _disagreement(root, shard, rows)
        ids = tuple(row["episode_id"].hex() for row in rows) if rows or problem else _ids_in(root, shard)
        if unlisted:
            damages.append(Damage(listing.key, unlisted, ids))
        if problem:
            damages.append(Damage(shard.key, problem, ids))
    others = [*manifest.qa, *([manifest.quarantine] if manifest.quarantine else [])]
    damages += [Damage(ref.key, problem, ()) for ref in others if (problem := _problem(root, ref))]
    try:
        Dataset(store, manifest).stats  # noqa: B018  # raises where its name is not its content
    except Exception as error:
        damages.append(Damage(f"stats/{manifest.stats_id}.json", str(error), ()))
    return damages


def repair(store: Store, dataset: str) -> tuple[Manifest, list[Damage]]:
    """The next version without what cannot be read; what went is in quarantine as `damaged`, and ingesting its source
    again brings it back. A shard and its index are lost together; statistics are counted again. Only the newest version
    is repaired. Damaged objects are deleted, so that they can be written again under their names; so are the receipts
    that vouch for them."""
    manifest = load_manifest(store, dataset)
    damages = verify(store, manifest)
    lost = sorted({identity for damage in damages for identity in damage.episodes})
    listings, shards = ({ref.key for ref in refs} for refs in (manifest.index, manifest.shards))
    unlisted = {damage.key: damage.episodes for damage in damages if damage.key in listings}
    figures = f"stats/{manifest.stats_id}.json"
    beyond = [damage.key for damage in damages if damage.key not in listings | shards | {figures}]
    if beyond:
        raise NotFound(
            f"dataset {dataset} v{manifest.version}: {', '.join(beyond)} cannot be rebuilt from the rest; go back to "
            "an older version, or ingest the source into a new dataset"
        )
    root, repaired = dataset_root(store, dataset), manifest
    if lost or unlisted:
        because = "; ".join(f"{damage.key}: {damage.what}" for damage in damages)
        repaired = remove(store, dataset, lost, because, reason=DAMAGED, unlisted=unlisted)
        for key in [*(damage.key for damage in damages), *root.list("staging/")]:
            root.delete(key)
    if any(damage.key == figures for damage in damages):
        counted = Dataset(store, repaired).counted_stats()
        if counted.stats_id != repaired.stats_id:
            raise NotFound(
                f"dataset {dataset} v{repaired.version}: its index does not give the statistics that it was committed "
                "with; go back to an older version, or ingest the source into a new dataset"
            )
        root.write_json(f"stats/{counted.stats_id}.json", counted.to_json())
    return repaired, damages


def _problem(root: Store, ref: ShardRef) -> str:
    try:
        data = root.read(ref.key)
    except NotFound:
        return "it is gone"
    if len(data) != ref.num_bytes:
        return f"it has {len(data)} bytes, the manifest says {ref.num_bytes}"
    return "" if hashlib.sha256(data).hexdigest() == ref.sha256 else "its bytes have changed"


def _ids_in(root: Store, shard: ShardRef) -> tuple[str, ...]:
    column = root.parquet(shard.key).read(["episode_id"])["episode_id"]
    return tuple(sorted(identity.hex() for identity in column.unique().to_pylist()))


def _disagreement(root: Store, shard: ShardRef, rows: Sequence[dict[str, Any]]) -> str:
    try:
        footer = root.parquet(shard.key).metadata
    except (pa.ArrowInvalid, OSError) as error:
        return str(error)
    total, ends = footer.num_rows, [row["row0"] + row["length"] for row in rows]
    if total != shard.rows or (rows and max(ends) != total):
        return f"it has {total} rows, the manifest says {shard.rows}, the index ends at {max(ends, default=0)}"
    begun = [start for row in rows for start in row.get("row_groups", ())]
    if begun and begun != starts_of(footer):
        return f"its row groups do not begin where the index says, at {begun[:3]}..."
    return ""


# ---------------------------------------------------------------------------------------------------- what can go


def collect_garbage(
    store: Store, dataset: str, *, keep_versions: int | None = None, grace_s: float = GRACE_S, dry_run: bool = False
) -> dict[str, Any]:
    """Delete what no version refers to and is older than `grace_s`. With `keep_versions`, older versions without a tag
    go first. Time is the store's own, so a machine whose clock is wrong cannot delete too much.

    Returns {"versions": expired, "objects": deleted keys and unfinished writes, "bytes_kept"}.
    """
    if keep_versions is not None and keep_versions < 1:
        raise ConfigError(f"keep_versions is {keep_versions}; the newest version always stays")
    root, versions = dataset_root(store, dataset), list_versions(store, dataset)
    if not versions and not root.list():  # nothing is written either where nothing is
        load_manifest(store, dataset)
    tagged = set(list_tags(store, dataset).values())
    expired = [v for v in versions[: -keep_versions or None] if v not in tagged] if keep_versions else []
    kept = [load_manifest(store, dataset, version) for version in versions if version not in expired]
    marker = f"staging/.now-{uuid.uuid4().hex}"
    root.write(marker, b"")
    written = root.modified()
    now = written.pop(marker)
    root.delete(marker)
    used = _referenced(kept) | {manifest_key(manifest.version) for manifest in kept}
    for key in [key for key, when in written.items() if key.startswith("staging/") and now - when < grace_s]:
        if not key.startswith("staging/.now-"):
            staged = Staged.from_json(root.read_json(key))  # an ingest may still commit what it vouches for
            used.update(staged.keys)
    dead = [
        key
        for key, when in written.items()
        if not _is_used(key, used) and (now - when >= grace_s or key in {manifest_key(v) for v in expired})
    ]
    dead.sort(key=lambda key: not key.startswith("_manifest/"))  # a version is gone before the first of its objects is
    for key in dead if not dry_run else ():
        root.delete(key)
    cut = [name for name, when in root.unfinished().items() if now - when >= grace_s]
    for name in cut if not dry_run else ():
        root.abandon(name)
    return {
        "versions": expired,
        "objects": [*dead, *cut],
        "bytes_kept": sum(s.num_bytes for s in {s for m in kept for s in m.shards}),
    }


def _referenced(manifests: Collection[Manifest]) -> set[str]:
    keys: set[str] = set()
    for manifest in manifests:
        keys |= {ref.key for ref in (*manifest.shards, *manifest.index, *manifest.qa)}
        keys |= {f"stats/{manifest.stats_id}.json", f"reports/v{manifest.version:08d}-{manifest.content_id}.html"}
        keys |= {manifest.quarantine.key} if manifest.quarantine else set()
    return keys


def _is_used(key: str, used: set[str]) -> bool:
    """Sidecars live as long as their shard; tags as long as somebody keeps them."""
    if key.startswith("derived/"):
        return f"data/{key.rpartition('/')[2]}" in used
    return key in used or key.startswith("_tags/")
