"""`upvla ...`: one sub-command a verb; each calls one function and prints what it returned."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from upvla.cli_data import data_app, ingest
from upvla.console import Config, Json, Set, SiteName, open_line, show
from upvla.errors import UpvlaError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Robot episodes in, a policy you can trust out. Start with `upvla demo`.",
)
app.add_typer(data_app, name="data")
app.command()(ingest)


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


# -------------------------------------------------------------------------------------------------------- the line


@app.command()
def collect(
    config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False
) -> None:
    """Record scripted experts in the playtable. Example: upvla collect --set data.collect.seed=1"""
    show(open_line(config, site, set_).collect(), as_json)


@app.command()
def mix(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Fix the order of all samples of the newest dataset version. Example: upvla mix --json"""
    show(open_line(config, site, set_).mix(), as_json)


@app.command()
def train(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Train tokenizers and both stages, resuming what was begun. Example: upvla train --set stage2.steps=100"""
    show(open_line(config, site, set_).train_all(), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint URL, or a registered name such as upvla-tiny@champion.")],
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Closed-loop scores with intervals, beside random and still. Example: upvla evaluate upvla-tiny@champion"""
    line = open_line(config, site, set_)
    show(line.evaluate(line.checkpoint_url(model)), as_json)


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
