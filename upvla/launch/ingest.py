"""Ingest on Ray: one task stages one portion of the recordings; the driver alone commits. And what is ready for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray

from upvla.data.ingest import IngestConfig, Portion, ingest, stage_here, stage_portion
from upvla.data.shards import Staged
from upvla.data.sources import FORMATS, HDF5Source
from upvla.launch.cluster import connected, result_of
from upvla.launch.steps import turn
from upvla.store import Store, open_store


class Landed(NamedTuple):
    """What lies under a prefix: sets that are complete for all one can see, and what may still be written to."""

    sets: dict[str, dict[str, float]]  # folder, "" for the prefix itself -> its objects with their last write
    waiting: dict[str, float]  # folder or file -> its last write


def landed(store: Store, config: IngestConfig, settle_s: float) -> Landed:
    """Which sets nobody has written to for `settle_s` seconds: one that is written to all day keeps no other waiting.

    The files of a set belong together. The prefix itself is one where the format begins there; else each folder
    directly below it where it does. HDF5 files stand alone, each with recordings of its own.
    """
    recent = time.time() - settle_s
    written = store.modified()
    if config.format == HDF5Source.format:
        waiting = {key: last for key, last in written.items() if last > recent}
        return Landed({"": written} if written.keys() - waiting else {}, waiting)
    sets: dict[str, dict[str, float]] = {}
    for folder in _folders(store, config, written):
        sets[folder] = {key: last for key, last in written.items() if key.startswith(folder and f"{folder}/")}
    lasts = {folder: max(objects.values()) for folder, objects in sets.items() if objects}
    quiet = sorted((folder for folder, last in lasts.items() if last <= recent), key=lambda folder: lasts[folder])
    return Landed({folder: sets[folder] for folder in quiet}, {f: last for f, last in lasts.items() if f not in quiet})


def _folders(store: Store, config: IngestConfig, written: Collection[str]) -> list[str]:
    source, split = FORMATS.get(config.format), str(config.options.get("split", ""))

    def begins(folder: str) -> bool:
        place = "/".join(filter(None, (folder, split)))
        return source is None or source.recognises(store.sub(place) if place else store)

    if begins(""):
        return [""]
    below = {key.partition("/")[0] for key in written if "/" in key}
    return [folder for folder in sorted(below) if begins(folder)] or [""]  # what is wrong there, opening it says


def run_ingest(
    store: Store,
    config: IngestConfig,
    source_url: str,
    progress: Callable[[int, int], None] | None = None,
    held: Collection[str] = (),
) -> dict[str, Any]:
    """Add what is new at `source_url` to the dataset; see `upvla.data.ingest.ingest` for what comes back.

    held: files whose recordings are left for another time.
    """
    whole = open_store(source_url).url  # a relative path means another folder to a worker, whose own is Ray's
    return ingest(store, config, whole, fan_out=partial(_in_turn, held=held), progress=progress)


def _in_turn(
    portions: Sequence[Portion], progress: Callable[[int, int], None], held: Collection[str] = ()
) -> list[Staged]:
    """Who ingests the same at the same time comes after the first, and finds its receipts."""
    portions = [part for portion in portions if (part := _without(portion, held)).recordings]
    if not portions:
        return []
    first = portions[0]
    key = {"config": first.config.model_dump(mode="json"), "source": first.source_url}
    with turn(first.store, "ingest", key | {"recordings": [portion.recordings for portion in portions]}):
        return _on_ray(portions, progress)


def _without(portion: Portion, held: Collection[str]) -> Portion:
    kept = [recording for recording in portion.recordings if recording[0].rpartition("/")[0] not in held]
    return portion._replace(recordings=tuple(kept))


def _on_ray(portions: Sequence[Portion], progress: Callable[[int, int], None]) -> list[Staged]:
    if len(portions) < 2:
        return stage_here(portions, progress)  # not worth a cluster
    with connected():
        stage = ray.remote(num_cpus=1, max_retries=3)(stage_portion)  # repeating a portion is harmless
        number = {stage.remote(portion): i for i, portion in enumerate(portions)}
        staged: dict[int, Staged] = {}
        total, done, waiting = sum(len(portion.recordings) for portion in portions), 0, list(number)
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            staged[number[ready]] = result_of(ready)
            done += len(portions[number[ready]].recordings)
            progress(done, total)
        return [staged[i] for i in range(len(portions))]
