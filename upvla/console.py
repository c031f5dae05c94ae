"""What the commands share: their common options, printing a result, opening a line or a store."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from tqdm import tqdm

from upvla.store import Store, open_store

Config = Annotated[str, typer.Option(help="Run configuration under configs/, without .yaml.")]
SiteName = Annotated[
    str, typer.Option("--site", envvar="UPVLA_SITE", help="Site file under configs/site/: where things are.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. --set stage1.steps=10 (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, sort_keys=True))
        return
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        print(f"{key:<{width}}  {json.dumps(value) if isinstance(value, dict | list) else value}")


def open_line(config: str, site: str, overrides: list[str] | None) -> Any:
    """The line of a site; a local site's running stack fills in addresses and credentials."""
    from upvla import stack
    from upvla.config import SiteConfig, load

    if load(f"site/{site}", SiteConfig).stack is not None:
        os.environ.update(stack.environment(stack.load_site(site)))
    from upvla.launch.pretrain import open_pretraining  # imports Ray, which reads the environment only once

    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}", disable=not sys.stderr.isatty(), leave=False)

    def progress(share: float, text: str) -> None:
        bar.set_description_str(text[:100])
        if share >= 0:
            bar.n = round(100 * share)
        bar.refresh()

    return open_pretraining(config, site, overrides or [], progress)


def open_root(root: str | None, site: str) -> Store:
    """The store at a URL, else the site's own."""
    if root:
        return open_store(root)
    store: Store = open_line("pretrain/full", site, None).store
    return store


def count_bar(unit: str) -> tuple[Any, tqdm[Any]]:
    """(callback of done and total, the bar that it moves)."""
    bar = tqdm(unit=unit, disable=not sys.stderr.isatty(), leave=False)

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    return progress, bar
