"""`upvla ...`: one sub-command a verb; each calls one function and prints what it returned."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Annotated, Any

import typer
from tqdm import tqdm

from upvla.errors import UpvlaError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Robot episodes in, a policy you can trust out. Start with `upvla demo`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look into data sets.")
app.add_typer(data_app, name="data")
weights_app = typer.Typer(no_args_is_help=True, help="Bring in published weights.")
app.add_typer(weights_app, name="weights")

Config = Annotated[str, typer.Option(help="Run configuration under configs/, without .yaml.")]
SiteName = Annotated[str, typer.Option("--site", help="Site file under configs/site/: where things are.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. --set stage1.steps=10 (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """Entry point: errors that we raise on purpose become one sentence and exit code 1."""
    try:
        app(standalone_mode=True)
    except UpvlaError as error:
        print(f"upvla: {error.code}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("upvla: stopped; what was finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, sort_keys=True))
        return
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        print(f"{key:<{width}}  {json.dumps(value) if isinstance(value, dict | list) else value}")


def _open(config: str, site: str, overrides: list[str] | None) -> Any:
    """The line of a site; a local site's running stack fills in addresses and credentials."""
    from upvla import stack
    from upvla.config import SiteConfig, load
    from upvla.launch.pretrain import open_pretraining

    if load(f"site/{site}", SiteConfig).stack is not None:
        os.environ.update(stack.environment(stack.load_site(site)))
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}", disable=not sys.stderr.isatty(), leave=False)

    def progress(share: float, text: str) -> None:
        bar.set_description_str(text[:100])
        if share >= 0:
            bar.n = round(100 * share)
        bar.refresh()

    return open_pretraining(config, site, overrides or [], progress)


# ------------------------------------------------------------------------------------------------------- the stack


@app.command()
def up(site: SiteName = "local", as_json: Json = False) -> None:
    """Start the local stack (S3, MLflow, Prefect, Ray) and wait until it is healthy. Example: upvla up"""
    from upvla import stack

    config = stack.load_site(site)
    stack.up(config, progress=lambda text: print(text, file=sys.stderr))
    status(site, as_json)


@app.command()
def down(site: SiteName = "local") -> None:
    """Stop everything that `upvla up` started. Example: upvla down"""
    from upvla import stack

    stack.down(stack.load_site(site))


@app.command()
def status(site: SiteName = "local", as_json: Json = False) -> None:
    """Say what runs, where, and where its log is. Example: upvla status --json"""
    from upvla import stack

    parts = stack.status(stack.load_site(site))
    if as_json:
        print(json.dumps(parts, indent=2))
        return
    for part in parts:
        print(f"{part['name']:<16} {'healthy' if part['healthy'] else 'DOWN':<8} {part['address']:<32} {part['log']}")


@app.command()
def env(site: SiteName = "local") -> None:
    """Print the stack's addresses and credentials for a shell. Example: eval "$(upvla env)" """
    from upvla import stack

    for name, value in stack.environment(stack.load_site(site)).items():
        print(f"export {name}={shlex.quote(value)}")


# -------------------------------------------------------------------------------------------------------- the line


@app.command()
def collect(
    config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False
) -> None:
    """Record scripted experts in the playtable. Example: upvla collect --set data.collect.seed=1"""
    _show(_open(config, site, set_).collect(), as_json)


@app.command()
def ingest(
    source: Annotated[
        str | None, typer.Option(help="Folder or URL of recordings; default: what `collect` wrote.")
    ] = None,
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Turn recordings into a new dataset version. Example: upvla ingest --source my_recordings/training"""
    line = _open(config, site, set_)
    _show(line.ingest(source or line.collect()["source_url"]), as_json)


@data_app.command("ls")
def data_ls(site: SiteName = "local", as_json: Json = False) -> None:
    """List data sets and their versions. Example: upvla data ls"""
    from upvla.launch.line import list_datasets

    listing = list_datasets(_open("pretrain/full", site, None).store)
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    for row in listing:
        print("{dataset}@{version}  {recordings} recordings, {segments} segments, {steps} steps".format(**row))


@data_app.command("show")
def data_show(name: str, site: SiteName = "local", as_json: Json = False) -> None:
    """Show one version: counts, statistics id, quarantine. Example: upvla data show playtable@1"""
    from upvla.launch.line import show_dataset

    _show(show_dataset(_open("pretrain/full", site, None).store, name), as_json)


@weights_app.command("import")
def weights_import(
    kind: Annotated[str, typer.Argument(help="showo, upvla, phi, magvit or clip.")],
    path: Annotated[str, typer.Argument(help="Local folder or file, or hub:owner/name where there is a network.")],
    to: Annotated[str, typer.Option(help="URL to write the audited weights to, for `init` of a run configuration.")],
    preset: Annotated[str, typer.Option(help="Size of the model that they must fit.")] = "base",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Another size, e.g. --set backbone.blocks=2 (repeatable).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Audit published weights and store them. Example: upvla weights import showo ./show-o --to ~/weights/showo"""
    from upvla.config import assignments
    from upvla.launch.weights import import_weights
    from upvla.model.config import preset as model_preset

    result = import_weights(kind, path, to, model_preset(preset, **assignments(set_ or [])))
    if as_json:
        _show(result, as_json)
        return
    print(result.pop("audit"))
    _show(result, as_json)


@app.command()
def mix(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Fix the order of all samples of the newest dataset version. Example: upvla mix --json"""
    _show(_open(config, site, set_).mix(), as_json)


@app.command()
def train(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Train tokenizers and both stages, resuming what was begun. Example: upvla train --set stage2.steps=100"""
    _show(_open(config, site, set_).train_all(), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint URL, or a registered name such as upvla-tiny@champion.")],
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Closed-loop scores with intervals, beside random and still. Example: upvla evaluate upvla-tiny@champion"""
    line = _open(config, site, set_)
    _show(line.evaluate(line.checkpoint_url(model)), as_json)


@app.command()
def demo(
    size: Annotated[
        str, typer.Option(help="full: about 20 minutes; ci: a few minutes, learns nothing useful.")
    ] = "full",
    site: SiteName = "local",
) -> None:
    """Stack, deployments and the whole line, then one table. Example: upvla demo --size ci"""
    from upvla.demo import run_demo

    run_demo(size, site)


if __name__ == "__main__":
    main()
