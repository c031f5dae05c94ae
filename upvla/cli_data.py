"""`upvla ingest` and `upvla data ...`: recordings into versions of a dataset, and looking after them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from upvla.console import Config, Json, Set, SiteName, count_bar, open_line, open_root, show
from upvla.errors import ConfigError, Corrupt
from upvla.store import open_store

data_app = typer.Typer(no_args_is_help=True, help="Look into data sets, and look after them.")

Root = Annotated[str | None, typer.Option(help="Folder or s3:// URL that holds the data sets; default: the site's.")]
Name = Annotated[str, typer.Argument(help="dataset, dataset@version or dataset@tag.")]


def ingest(
    source: Annotated[
        str | None, typer.Option(help="Folder or URL of recordings; default: what `collect` wrote.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="calvin, lerobot, rlds, hdf5, llava, package.module:Class; auto looks what is there."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the dataset.")] = None,
    root: Root = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the format, e.g. span_end=inclusive; values are YAML (repeatable).")
    ] = None,
    options: Annotated[Path | None, typer.Option(help="YAML file of the format's options.")] = None,
    validation_fraction: float | None = None,
    min_accept_ratio: float | None = None,
    recordings_per_task: Annotated[
        int | None, typer.Option(help="Size of a portion: what one task does (default 32).")
    ] = None,
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Turn recordings into a new dataset version; again, and nothing happens.

    Example: upvla ingest --format calvin --source task_D_D/training --dataset calvin --root data
    """
    limits = {
        "validation_fraction": validation_fraction,
        "min_accept_ratio": min_accept_ratio,
        "recordings_per_task": recordings_per_task,
    }
    if format is None and dataset is None and root is None:
        if option or options or any(value is not None for value in limits.values()):
            raise ConfigError(
                "ingest: these options go with --dataset; the line's own are --set data.ingest.NAME=VALUE"
            )
        line = open_line(config, site, set_)
        show(line.ingest(source or line.collect()["source_url"]), as_json)
        return
    if source is None or dataset is None:
        raise ConfigError("an ingest needs --source and --dataset (and --format, --root)")
    if set_:
        raise ConfigError("ingest: --set belongs to the line's own dataset; leave it out beside --dataset")
    from upvla.config import explained
    from upvla.data.ingest import IngestConfig
    from upvla.data.sources import detect_format
    from upvla.launch.ingest import run_ingest

    try:
        settings = IngestConfig(
            format=detect_format(source) if format in (None, "auto") else str(format),
            dataset=dataset,
            options=_options(options, option or []),
            **{name: value for name, value in limits.items() if value is not None},  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise ConfigError(explained(error, IngestConfig, "the options of `upvla ingest`")) from error
    progress, bar = count_bar("recordings")
    with bar:
        result = run_ingest(open_root(root, site), settings, source, progress)
    show({"dataset": dataset, **result}, as_json)


def _options(file: Path | None, pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        if file is not None:
            listed = yaml.safe_load(file.read_text()) or {}
            if not isinstance(listed, dict):
                raise ConfigError(
                    f"--options {file} holds a {type(listed).__name__}, not a mapping: write `name: value`"
                )
            found |= listed
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"--option {pair!r}: write it as name=value")
            found[name] = yaml.safe_load(value)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"options of the format: {error}") from error
    return found


@data_app.command("ls")
def data_ls(root: Root = None, site: SiteName = "local", as_json: Json = False) -> None:
    """List data sets and their versions. Example: upvla data ls --root data"""
    from upvla.data.upkeep import history, list_datasets

    store = open_root(root, site)
    rows = [row for name in list_datasets(store) for row in history(store, name)]
    if not rows:
        print(f"upvla: {store.url} holds no data sets; `upvla ingest` makes one, or correct --root", file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        tags = f"  [{', '.join(row['tags'])}]" if row["tags"] else ""
        print("{dataset}@{version}  {recordings} recordings, {segments} segments, {steps} steps".format(**row) + tags)


@data_app.command("show")
def data_show(name: Name, root: Root = None, site: SiteName = "local", as_json: Json = False) -> None:
    """Show one version: counts, identities, quarantine, lineage. Example: upvla data show playtable@1"""
    from upvla.data.table import Dataset
    from upvla.data.upkeep import describe, history
    from upvla.data.versions import open_version

    store = open_root(root, site)
    manifest = open_version(store, name)
    rejected = [row._asdict() for row in Dataset(store, manifest).quarantine]
    lineage = [{"version": r["version"], **r["operation"]} for r in history(store, manifest.dataset)]
    lineage = [row for row in lineage if row["version"] <= manifest.version]
    show(describe(manifest) | {"lineage": lineage, "quarantine": rejected}, as_json)


@data_app.command("diff")
def data_diff(before: Name, after: Name, root: Root = None, site: SiteName = "local", as_json: Json = False) -> None:
    """What a version has that another has not. Example: upvla data diff playtable@1 playtable@2"""
    from upvla.data.upkeep import diff

    show(diff(open_root(root, site), before, after), as_json)


@data_app.command("verify")
def data_verify(name: Name, root: Root = None, site: SiteName = "local", as_json: Json = False) -> None:
    """Re-read and re-hash every object of a version; exit code 1 if one is damaged. Example: upvla data verify mine"""
    from upvla.data.upkeep import verify
    from upvla.data.versions import open_version

    store = open_root(root, site)
    manifest = open_version(store, name)
    damages = verify(store, manifest)
    found = [{"key": d.key, "what": d.what, "recordings": len(d.episodes)} for d in damages]
    show({"dataset": manifest.dataset, "version": manifest.version, "damaged": found}, as_json)
    if damages:
        sys.exit(1)


@data_app.command("repair")
def data_repair(dataset: str, root: Root = None, site: SiteName = "local", as_json: Json = False) -> None:
    """A new version without what cannot be read; a new ingest brings it back. Example: upvla data repair mine"""
    from upvla.data.upkeep import repair

    manifest, damages = repair(open_root(root, site), dataset)
    lost = {identity for damage in damages for identity in damage.episodes}
    show({"version": manifest.version, "damaged": [d.key for d in damages], "recordings_lost": len(lost)}, as_json)


@data_app.command("remove")
def data_remove(
    dataset: Annotated[str, typer.Argument(help="dataset, or its newest version as dataset@version.")],
    because: Annotated[str, typer.Option(help="Why; it is kept in the lineage.")],
    where: Annotated[
        list[str], typer.Option(help="keys=, scenes=, embodiments=, tasks= (comma-separated), min_steps=, max_steps=")
    ],
    root: Root = None,
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """A new version without the recordings that fit. Example: upvla data remove mine --where scenes=B --because dark"""
    from upvla.config import explained
    from upvla.data.table import EpisodeFilter
    from upvla.data.upkeep import describe, remove_where

    fields: dict[str, Any] = {name: text for name, _, text in (pair.partition("=") for pair in where)}
    lists = {name: tuple(text.split(",")) for name, text in fields.items() if not name.endswith("_steps")}
    try:
        chosen = EpisodeFilter.model_validate(fields | lists)
    except ValidationError as error:
        raise ConfigError(explained(error, EpisodeFilter, "--where")) from error
    show(describe(remove_where(open_root(root, site), dataset, chosen, because)), as_json)


@data_app.command("tag")
def data_tag(
    name: Name, tag: str, move: bool = False, root: Root = None, site: SiteName = "local", as_json: Json = False
) -> None:
    """Name a version. Example: upvla data tag mine@3 golden"""
    from upvla.data.versions import open_version, set_tag

    store = open_root(root, site)
    manifest = open_version(store, name)
    set_tag(store, manifest.dataset, tag, manifest.version, move=move)
    show({"dataset": manifest.dataset, "version": manifest.version, "tag": tag}, as_json)


@data_app.command("stats")
def data_stats(
    name: Annotated[str, typer.Argument(help="dataset[@version]; or `check`, then the dataset.")],
    checked: Annotated[str, typer.Argument(help="The dataset, after `check`.")] = "",
    root: Root = None,
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Mean, deviation, range and quantiles; `check` exits with 1 if training on them would go wrong.

    Example: upvla data stats check playtable
    """
    from upvla.data.table import Dataset
    from upvla.data.versions import open_version

    check = name == "check"
    if check != bool(checked):
        raise ConfigError("`upvla data stats` takes one dataset, and `upvla data stats check` one after the word")
    store = open_root(root, site)
    stats = Dataset(store, open_version(store, checked if check else name)).stats
    if not check:
        show({"stats_id": stats.stats_id, **stats.to_json()}, as_json)
        return
    findings = stats.check()
    show({"stats_id": stats.stats_id, "findings": [finding._asdict() for finding in findings]}, as_json)
    if any(finding.fatal for finding in findings):
        raise Corrupt(f"statistics {stats.stats_id} of {checked} would spoil training; see the findings above")


@data_app.command("gc")
def data_gc(
    dataset: str,
    keep_versions: Annotated[int | None, typer.Option(help="Expire older versions that have no tag.")] = None,
    grace_hours: Annotated[
        float, typer.Option(help="Spare objects younger than this: an ingest may be at work.")
    ] = 168,
    dry_run: bool = False,
    root: Root = None,
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Delete what no version refers to. Example: upvla data gc playtable --keep-versions 5 --dry-run"""
    from upvla.data.upkeep import collect_garbage

    store = open_root(root, site)
    grace_s = grace_hours * 3600
    show(collect_garbage(store, dataset, keep_versions=keep_versions, grace_s=grace_s, dry_run=dry_run), as_json)


@data_app.command("export")
def data_export(
    name: Name,
    to: Annotated[str, typer.Option(help="An empty folder or URL.")],
    format: Annotated[str, typer.Option(help="lerobot-v3")] = "lerobot-v3",
    root: Root = None,
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Write a version as a LeRobot data set. Example: upvla data export playtable@2 --format lerobot-v3 --to out"""
    from upvla.data.export import export_lerobot
    from upvla.data.table import Dataset
    from upvla.data.versions import open_version

    if format != "lerobot-v3":
        raise ConfigError(f"no export format {format!r}; there is: lerobot-v3")
    store = open_root(root, site)
    progress, bar = count_bar("recordings")
    with bar:
        result = export_lerobot(Dataset(store, open_version(store, name)), open_store(to), progress)
    show(result | {"url": to}, as_json)


@data_app.command("report")
def data_report(
    name: Name,
    out: Path = Path("report.html"),
    root: Root = None,
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Write the page that a person looks at before training. Example: upvla data report playtable --out report.html"""
    from upvla.data.report import render_report
    from upvla.data.table import Dataset
    from upvla.data.versions import open_version

    store = open_root(root, site)
    dataset = Dataset(store, open_version(store, name))
    page = render_report(dataset)
    try:
        out.write_text(page)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; name a file in a folder that exists") from error
    counts = Counter(row.split for row in dataset.episodes)
    show({"page": str(out), "train": counts["train"], "validation": counts["validation"]}, as_json)
