"""Where recordings come from: one module a format, chosen by its declared name, never by how a path looks."""

from __future__ import annotations

from typing import Any

from upvla.data.sources.calvin import CalvinSource
from upvla.errors import ConfigError
from upvla.types import EpisodeSource

FORMATS = {source.format: source for source in (CalvinSource,)}


def open_source(format: str, url: str, **options: Any) -> EpisodeSource:
    """The recordings at `url` (a folder, `s3://`, or any fsspec URL). Options are the format's own."""
    if format not in FORMATS:
        raise ConfigError(f"no format {format!r}; there is: {', '.join(sorted(FORMATS))}")
    try:
        return FORMATS[format](url, **options)
    except TypeError as error:
        raise ConfigError(f"options of format {format!r}: {error}") from error
