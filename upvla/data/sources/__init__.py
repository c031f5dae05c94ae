"""Where recordings come from: one module a format, chosen by its declared name or by what lies at the URL, never by how
a path looks.

A format of your own is a class with `keys()`, `token(key)` and `read(key) -> Episode` (`examples/my_robot.py`), named
as "package.module:Class" wherever a format's name is asked for: a module that is installed or lies in the working
directory. `num_steps(key)`, where it is cheap, evens out what one task of an ingest does.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upvla.data.sources.calvin import CalvinSource
from upvla.data.sources.hdf5 import HDF5Source
from upvla.data.sources.lerobot import LeRobotSource
from upvla.data.sources.llava import LlavaSource
from upvla.data.sources.rlds import RLDSSource
from upvla.errors import ConfigError, Corrupt, UpvlaError
from upvla.store import Store, open_store
from upvla.types import EpisodeSource

FORMATS = {source.format: source for source in (CalvinSource, LeRobotSource, RLDSSource, HDF5Source, LlavaSource)}
_FOLDERS_TRIED = 8  # below a URL at which no format lies


def open_source(format: str, url: str, **options: Any) -> EpisodeSource:
    """The recordings at `url` (a folder, `s3://`, or any fsspec URL). Options are the format's own."""
    factory: Any = FORMATS.get(format) or _imported(format)
    known = [name for name in inspect.signature(factory).parameters if name != "url"]
    try:
        inspect.signature(factory).bind(url, **options)
    except TypeError as error:
        raise _misdeclared(format, options, known, error) from error
    with asked(url):
        try:
            source: EpisodeSource = factory(url, **options)
        except (TypeError, ValueError) as error:
            if not options:
                raise
            raise _misdeclared(format, options, known, error) from error
    return source


def _misdeclared(format: str, options: dict[str, Any], known: list[str], error: Exception) -> ConfigError:
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return ConfigError(
        f"options of format {format!r}{f' ({given})' if given else ''}: {error}; there is: {', '.join(known)}"
    )


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
    store = open_store(url)
    with asked(url):
        found = _fitting(store)
    if len(found) == 1:
        return found[0]
    what = f"fits {' and '.join(found)}" if found else "holds no format that is known"
    hint = "" if found else _hint(store)
    raise ConfigError(f"{url} {what}; declare one of: {', '.join(FORMATS)}{hint}")


def _fitting(store: Store) -> list[str]:
    return [name for name, source in FORMATS.items() if source.recognises(store)]


def _hint(store: Store) -> str:
    """What to say of a URL at which no format lies: that there is nothing, or which of its folders are meant."""
    keys = store.list()
    if not keys:
        return "; or correct the URL: no file lies below it"
    folders = sorted({key.partition("/")[0] for key in keys if "/" in key})[:_FOLDERS_TRIED]
    fits = {f"{store.url}/{folder}": _fitting(store.sub(folder)) for folder in folders}
    inner = [f"{place} ({' or '.join(found)})" for place, found in fits.items() if found]
    return f"; or name a folder in it: {', '.join(inner)}" if inner else ""


def _imported(name: str) -> Any:
    """A console script's path lacks the working directory, where one's own module lies; it comes last, so that nothing
    there hides what is installed. Ray gives its workers the driver's working directory itself."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"no format {name!r}; there is: {', '.join(FORMATS)}, or your own as 'package.module:Class'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # it is somebody's code: it may raise anything
        raise ConfigError(f"format {name!r} cannot be imported: {_import_problem(error, module)}") from error
    if not callable(found):
        raise ConfigError(f"format {name!r} is a {type(found).__name__}, not a class with keys(), token() and read()")
    return found


def _import_problem(error: Exception, module: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"{error}; start in the folder that holds it ({Path.cwd()} is looked in), or install it"
    if isinstance(error, AttributeError) and error.obj is sys.modules.get(module):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
