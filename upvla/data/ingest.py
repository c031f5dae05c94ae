"""From recordings at a URL to a version of a dataset: what to read, in which portions, and what came of it.

Each portion is a pure function of its recordings, so portions may run anywhere, twice, or be killed; `commit` is the
only step that shows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from upvla.data.commit import DAMAGED, commit, require_conditional_create, require_same_import
from upvla.data.identity import Hashing
from upvla.data.pieces import Pieces
from upvla.data.quality import UNEXPECTED, QualityLimits, check, unexpected
from upvla.data.report import render_report
from upvla.data.shards import Layout, Rejection, Staged, stage
from upvla.data.sources import asked, open_source
from upvla.data.table import Dataset
from upvla.data.versions import dataset_root, hashing_of, newest_manifest, read_quarantine
from upvla.errors import BadEpisode, NotFound
from upvla.store import Store, content_hash, open_store
from upvla.types import Episode, EpisodeSource, KnowsLengths, Manifest

log = logging.getLogger(__name__)

_LONG_STEPS = 512  # a recording of so many steps counts as one, and a longer one as several
_PICTURES = 64  # recordings of a single step that count as one

Progress = Callable[[int, int], None]  # recordings done, recordings in all


class IngestConfig(BaseModel):
    """How recordings become a dataset. `options` are the format's own (`upvla/data/sources`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str  # a name of `upvla.data.sources.FORMATS`, or "package.module:Class"
    dataset: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    options: dict[str, JsonValue] = {}
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    min_accept_ratio: float = Field(default=0.5, ge=0, le=1)  # of the dataset, and of what one ingest brings
    qa_per_episode: int = Field(default=16, ge=0)
    recordings_per_task: int = Field(default=32, gt=0)  # as `portions_of` counts
    quality: QualityLimits = QualityLimits()
    layout: Layout = Layout()

    def recorded(self) -> dict[str, Any]:
        """What later versions of the same dataset must agree on."""
        return self.model_dump(mode="json", include={"format", "options", "qa_per_episode", "quality"})


class Portion(NamedTuple):
    """Recordings that one worker stages: (key, source token) each. Everything in it can be pickled."""

    store: Store
    config: IngestConfig
    source_url: str
    recordings: tuple[tuple[str, str], ...]
    run: str  # portions of one ingest read through one open source a process
    hashing: Hashing = "blake3"  # as the dataset's recordings are identified


FanOut = Callable[[Sequence[Portion], Progress], Sequence[Staged]]  # results in the order of the portions


def ingest(
    store: Store,
    config: IngestConfig,
    source_url: str,
    *,
    fan_out: FanOut | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Add what is new at `source_url` to the dataset; nothing new, no work and the same version.

    Returns {version, content_id, recordings, segments, steps, quarantined {reason: n}, notes, report, seconds}; notes
    are the source's own, such as errata of a public set that were recognised.
    """
    started = time.monotonic()
    report = progress or (lambda done, total: None)
    run = uuid.uuid4().hex
    require_conditional_create(store.url)  # before hours of staging, not after
    source = _source(run, config, source_url)
    parent = newest_manifest(store, config.dataset)
    if parent:
        require_same_import(parent, config.recorded(), config.validation_fraction)  # `commit` says so too, but late
    known = _known(store, parent)
    with asked(source_url):
        keys = source.keys()
        fresh = [recording for recording in ((key, source.token(key)) for key in keys) if recording not in known]
        parts = list(portions_of(source, fresh, config.recordings_per_task))
    if not keys:
        raise NotFound(f"{source_url} holds no recordings; record some, or correct the URL")
    portions = [Portion(store, config, source_url, tuple(part), run, hashing_of(parent)) for part in parts]
    manifest = commit(
        store,
        config.dataset,
        (fan_out or stage_here)(portions, report),
        validation_fraction=config.validation_fraction,
        options=config.recorded(),
        min_accept_ratio=config.min_accept_ratio,
        settled=_settled(store, parent, source_url, set(keys)),
    )
    return {
        "version": manifest.version,
        "content_id": manifest.content_id,
        "recordings": manifest.num_episodes,
        "segments": manifest.num_spans,
        "steps": manifest.num_steps,
        "quarantined": dict(manifest.quarantined),
        "notes": dict(source.notes),
        "report": _write_report(store, manifest),
        "seconds": round(time.monotonic() - started, 3),
    }


def portions_of(
    source: EpisodeSource, recordings: Iterable[tuple[str, str]], size: int
) -> Iterator[list[tuple[str, str]]]:
    """Neighbouring (key, token) in portions that cost about the same: `size` recordings, but fewer where they are long
    and many where they are pictures. A source that does not know its lengths is taken to have usual ones."""
    portion, counted = list[tuple[str, str]](), 0.0
    for key, token in recordings:
        steps = source.num_steps(key) if isinstance(source, KnowsLengths) else _LONG_STEPS
        share = max(1.0, steps / _LONG_STEPS) if steps > 1 else 1 / _PICTURES
        if portion and counted + share > size:
            yield portion
            portion, counted = [], 0.0
        portion.append((key, token))
        counted += share
    if portion:
        yield portion


def stage_here(portions: Sequence[Portion], progress: Progress) -> list[Staged]:
    """Stage in this process, one after the other; progress is told a recording at a time."""
    done, total = itertools.count(1), sum(len(portion.recordings) for portion in portions)
    return [stage_portion(portion, lambda: progress(next(done), total)) for portion in portions]


def stage_portion(portion: Portion, told: Callable[[], None] = lambda: None) -> Staged:
    """Read, judge and write one portion. A receipt makes repeating a finished one cheap, pieces an unfinished one."""
    root = dataset_root(portion.store, portion.config.dataset)
    meaning = portion.config.model_dump(mode="json", exclude={"validation_fraction", "min_accept_ratio"})
    receipt = f"staging/{content_hash([meaning, portion.hashing, portion.recordings])}.json"
    found = _receipt(root, receipt)
    if found is not None:
        for _ in portion.recordings:
            told()
        return found
    config, pieces = portion.config, Pieces(root, meaning)
    judged = _judged(portion, pieces, told)
    staged = stage(
        root,
        judged,
        qa_per_episode=config.qa_per_episode,
        layout=config.layout,
        hashing=portion.hashing,
        encoded=pieces.add,
    )
    root.write_json(receipt, staged.to_json())
    pieces.clear()
    return staged


def _receipt(root: Store, key: str) -> Staged | None:
    """What was staged before, if all of it is still there. The receipt is written again first: `gc` spares for a week
    what a receipt stands for, however old it is itself."""
    with suppress(NotFound):
        staged = Staged.from_json(root.read_json(key))
        root.write_json(key, staged.to_json())
        if all(map(root.exists, staged.keys)):
            return staged
    return None


@functools.lru_cache(maxsize=1)
def _cached_source(run: str, config_json: str, url: str) -> EpisodeSource:
    config = IngestConfig.model_validate_json(config_json)
    return open_source(config.format, url, **config.options)


def _source(run: str, config: IngestConfig, url: str) -> EpisodeSource:
    """Opening a source may cost reading its whole description, so a process does it once a run."""
    return _cached_source(run, config.model_dump_json(), url)


def _judged(portion: Portion, pieces: Pieces, told: Callable[[], None]) -> Iterator[tuple[Episode, str] | Rejection]:
    source = _source(portion.run, portion.config, portion.source_url)
    for key, token in portion.recordings:
        episode = pieces.find(key, token)
        try:
            if episode is None:
                episode = source.read(key)
                check(episode, portion.config.quality)
        except BadEpisode as error:
            yield _rejection(key, error, token)
        except UNEXPECTED as error:
            log.info("%s of %s", key, portion.source_url, exc_info=True)
            yield _rejection(key, unexpected(key, error), token)
        else:
            yield episode, token
        told()


def _rejection(key: str, error: BadEpisode, token: str) -> Rejection:
    """In text that the table can hold: what is wrong may be the name itself."""
    key, detail = (text.encode(errors="backslashreplace").decode() for text in (key, error.detail))
    return Rejection(key, error.reason, detail, token)


def _known(store: Store, manifest: Manifest | None) -> set[tuple[str, str]]:
    """(key, token) of every recording that the newest version has accepted or rejected."""
    if manifest is None:
        return set()
    dataset = Dataset(store, manifest)
    accepted = {(episode.source_key, episode.source_token) for episode in dataset.episodes}
    return accepted | {(row.key, row.token) for row in dataset.quarantine if row.reason != DAMAGED}


def _settled(store: Store, parent: Manifest | None, source_url: str, keys: set[str]) -> list[Rejection]:
    """What stands in quarantine for a file that could not be opened, where the source now lists what is in the file.
    Another source may have a file of that name, so the row must tell of this one's."""
    if parent is None:
        return []
    files = {key.rpartition("/")[0] for key in keys} - {""}
    rows = [(row, row.key.rpartition("/")[0]) for row in read_quarantine(dataset_root(store, parent.dataset), parent)]
    gone = [(row, file) for row, file in rows if file in files and row.key not in keys and not row.episode_id]
    url = open_store(source_url).url if gone else ""
    places = (url, url.rpartition("/")[0])  # a folder, or the file alone
    return [row for row, file in gone if row.detail.startswith(tuple(f"{place}/{file}: " for place in places))]


def _write_report(store: Store, manifest: Manifest) -> str:
    root = dataset_root(store, manifest.dataset)
    key = f"reports/v{manifest.version:08d}-{manifest.content_id}.html"
    if not root.exists(key):
        root.write(key, render_report(Dataset(store, manifest)).encode())
    return f"{root.url}/{key}"
