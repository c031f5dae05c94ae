"""Versions of a dataset: manifests and tags, and what every version's recordings are split into.

A version is `_manifest/v00000001.json`, created once and never changed; a tag is a name for one, `_tags/<name>.json`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from upvla.data.identity import Hashing
from upvla.data.objects import read_table, refs
from upvla.data.shards import Rejection
from upvla.errors import AlreadyExists, ConfigError, Corrupt, Mismatch, NotFound
from upvla.store import Store
from upvla.types import ActionSpace, Manifest, ShardRef

Split = Literal["train", "validation"]
FORMAT = 3
"""Of manifests: 2 added removed recordings and further rounds of questions, 3 BLAKE3 as the recordings' ids. A dataset
that began before 3 keeps its ids and is never more than 2; 1 is read as it is."""

_BLAKE3_SINCE = 3
_MANIFESTS = "_manifest/v"
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")


def dataset_root(store: Store, dataset: str) -> Store:
    return store.sub(f"datasets/{dataset}")


_newest: dict[str, tuple[int, str, Manifest]] = {}  # root's URL -> version, token, content: what was newest last time


def newest_manifest(store: Store, dataset: str) -> Manifest | None:
    """The listing decides. A manifest that this process has read or made is not read again while its token is the
    same, and versions before it are not listed again."""
    root = dataset_root(store, dataset)
    known, token, manifest = _newest.get(root.url, (0, "", None))
    listed = root.tokens(_MANIFESTS, after=manifest_key(known - 1)) if known > 1 else {}
    listed = listed or root.tokens(_MANIFESTS)
    if not listed:
        return None
    key = max(listed)
    if manifest is None or (key, listed[key]) != (manifest_key(known), token):
        manifest = load_manifest(store, dataset, _version(key))
        remember(root, manifest, listed[key])
    return manifest


def remember(root: Store, manifest: Manifest, token: str) -> None:
    """This process knows what the newest manifest says, as long as its object has this token."""
    _newest[root.url] = (manifest.version, token, manifest)


def remembered(root: Store) -> Manifest | None:
    """What was newest when this process last looked, or None."""
    return _newest[root.url][2] if root.url in _newest else None


def load_manifest(store: Store, dataset: str, version: int | str | None = None) -> Manifest:
    """A version by number or tag, or the newest. `NotFound` where there is none."""
    root = dataset_root(store, dataset)
    if version is None:
        found = newest_manifest(store, dataset)
        if found is None:
            raise NotFound(f"{root.url} holds no dataset; `upvla ingest` makes one")
        return found
    if isinstance(version, str):
        version = int(version) if version.isdigit() else _tagged(store, dataset, version)
    try:
        value = root.read_json(manifest_key(version))
    except NotFound as error:
        raise NotFound(f"{root.url} has no version {version}; {_there_is(store, dataset)}") from error
    try:
        if value.get("format", 1) > FORMAT:
            raise Mismatch(
                f"{root.url}/{manifest_key(version)} is of format {value['format']}, this upvla reads up to {FORMAT}; "
                "upgrade upvla, or read an older version"
            )
        return Manifest(
            **value
            | {name: refs(value[name]) for name in ("shards", "index", "qa")}
            | {
                "action_space": ActionSpace.from_json(value["action_space"]),
                "cameras": tuple(value["cameras"]),
                "quarantine": ShardRef(**value["quarantine"]) if value["quarantine"] else None,
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{root.url}/{manifest_key(version)}: {error!r}; use the version before") from error


def open_version(store: Store, name: str) -> Manifest:
    """`dataset`, `dataset@version` or `dataset@tag`."""
    dataset, _, version = name.partition("@")
    return load_manifest(store, dataset, version or None)


def list_versions(store: Store, dataset: str) -> list[int]:
    """Numbers of the versions that are still there, oldest first."""
    return [_version(key) for key in dataset_root(store, dataset).list(_MANIFESTS)]


def hashing_of(manifest: Manifest | None) -> Hashing:
    """What the ids of this dataset's recordings are, and of those that it will get."""
    return "blake2b" if manifest and manifest.format < _BLAKE3_SINCE else "blake3"


def format_after(manifest: Manifest | None) -> int:
    """Of the version that follows."""
    return FORMAT if hashing_of(manifest) == "blake3" else _BLAKE3_SINCE - 1


def set_tag(store: Store, dataset: str, tag: str, version: int, *, move: bool = False) -> None:
    """Name a version. A tag that means another version is moved only if asked to."""
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"{tag!r} is no tag: a letter, then letters, digits, '.', '_' and '-'")
    root, manifest = dataset_root(store, dataset), load_manifest(store, dataset, version)
    value = {"version": version, "content_id": manifest.content_id}
    try:
        root.create_json(_tag_key(tag), value)
    except AlreadyExists:
        if root.read_json(_tag_key(tag)) == value:
            return
        if not move:
            raise
        root.write_json(_tag_key(tag), value)


def list_tags(store: Store, dataset: str) -> dict[str, int]:
    root = dataset_root(store, dataset)
    return {key[len("_tags/") : -len(".json")]: root.read_json(key)["version"] for key in root.list("_tags/")}


def assign_splits(ids: Sequence[str], fraction: float, forced: Mapping[str, Split]) -> dict[str, Split]:
    """By hash of the id, so that a recording never changes sides; where a side would be empty (and there are two
    recordings), the nearest one is forced onto it, and stays there in later versions."""
    splits: dict[str, Split] = {i: forced.get(i) or ("validation" if draw(i) < fraction else "train") for i in ids}
    order = sorted(ids, key=draw)
    if fraction > 0 and len(ids) > 1:
        if "validation" not in splits.values():
            splits[order[0]] = "validation"
        if "train" not in splits.values():
            splits[order[-1]] = "train"
    return splits


@functools.lru_cache(maxsize=200_000)
def draw(identity: str) -> float:
    """Of a recording's id, uniform in [0, 1)."""
    return int(hashlib.sha256(f"split/{identity}".encode()).hexdigest()[:13], 16) / 16**13


def read_quarantine(root: Store, manifest: Manifest) -> list[Rejection]:
    if manifest.quarantine is None:
        return []
    return [Rejection(**row) for row in read_table(root, manifest.quarantine.key).to_pylist()]


def manifest_key(version: int) -> str:
    return f"{_MANIFESTS}{version:08d}.json"


def _version(key: str) -> int:
    return int(key[-13:-5])


def _tag_key(tag: str) -> str:
    return f"_tags/{tag}.json"


def _tagged(store: Store, dataset: str, tag: str) -> int:
    root = dataset_root(store, dataset)
    try:
        return int(root.read_json(_tag_key(tag))["version"])
    except NotFound as error:
        raise NotFound(f"{root.url} has no version or tag {tag!r}; {_there_is(store, dataset)}") from error


def _there_is(store: Store, dataset: str) -> str:
    versions, tags = list_versions(store, dataset), list_tags(store, dataset)
    if not versions:
        return "it is no dataset, `upvla ingest` makes one"
    return f"tags: {', '.join(tags) or 'none'}; versions: {', '.join(map(str, versions))}"
