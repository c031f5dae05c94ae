"""Where recordings come from: one module a format, chosen by its declared name or by what lies at the URL, never by how
a path looks.

A format of your own is a class with `keys()`, `token(key)` and `read(key) -> Episode` (`examples/my_robot.py`), named
as "package.module:Class" wherever a format's name is asked for. `num_steps(key)`, where it is cheap, evens out what one
task of an ingest does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from upvla.data.sources.calvin import CalvinSource
from upvla.data.sources.hdf5 import HDF5Source
from upvla.data.sources.lerobot import LeRobotSource
from upvla.data.sources.llava import LlavaSource
from upvla.data.sources.rlds import RLDSSource
from upvla.errors import ConfigError, Corrupt, UpvlaError
from upvla.store import open_store
from upvla.types import EpisodeSource

FORMATS = {source.format: source for source in (CalvinSource, LeRobotSource, RLDSSource, HDF5Source, LlavaSource)}


def open_source(format: str, url: str, **options: Any) -> EpisodeSource:
    """The recordings at `url` (a folder, `s3://`, or any fsspec URL). Options are the format's own."""
    factory: Any = FORMATS.get(format) or _imported(format)
    try:
        inspect.signature(factory).bind(url, **options)
    except TypeError as error:
        known = [name for name in inspect.signature(factory).parameters if name != "url"]
        raise ConfigError(f"options of format {format!r}: {error}; there is: {', '.join(known)}") from error
    with asked(url):
        source: EpisodeSource = factory(url, **options)
    return source


@contextmanager
def asked(url: str) -> Iterator[None]:
    """Around what a source is asked about itself, before any recording is read: whatever its description makes go
    wrong that no format has a better word for is said of the source."""
    try:
        yield
    except (UpvlaError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise Corrupt(
            f"{url} cannot be listed, its description holds what no reader expects: {type(error).__name__}: "
            f"{error!s:.500}; repair the description, or fetch it again"
        ) from error


def detect_format(url: str) -> str:
    """The one format whose files lie at `url`. `ConfigError` where none or several fit."""
    with asked(url):
        found = [name for name, source in FORMATS.items() if source.recognises(open_store(url))]
    if len(found) != 1:
        raise ConfigError(
            f"{url} {'fits ' + ' and '.join(found) if found else 'holds no format that is known'}; "
            f"declare one of: {', '.join(FORMATS)}"
        )
    return found[0]


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"no format {name!r}; there is: {', '.join(FORMATS)}, or your own as 'package.module:Class'")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format {name!r} cannot be imported: {error}") from error
