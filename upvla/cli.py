"""`upvla ...`: one sub-command a verb; each calls one function and prints what it returned."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from upvla.cli_data import data_app, ingest
from upvla.cli_eval import CalvinPath, LiberoPython, bar, evaluate, places_of
from upvla.cli_model import model_app
from upvla.console import Config, Json, Set, SiteName, open_line, show
from upvla.errors import ConfigError, UpvlaError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Robot episodes in, a policy you can trust out. Start with `upvla demo`.",
)
app.add_typer(data_app, name="data")
app.add_typer(model_app)
app.command()(ingest)
app.command()(evaluate)
weights_app = typer.Typer(no_args_is_help=True, help="Bring in published weights.")
app.add_typer(weights_app, name="weights")

_INTERRUPTED = 130  # how Typer ends on Ctrl-C


def main() -> None:
    """Entry point: errors that we raise on purpose become one sentence and exit code 1."""
    try:
        app(standalone_mode=True)
    except UpvlaError as error:
        print(f"upvla: {error.code}: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("upvla: stopped; what was finished is kept, run the same command again to go on", file=sys.stderr)
        raise


# ------------------------------------------------------------------------------------------------------- the stack


@app.command()
def doctor(
    what: Annotated[str, typer.Argument(help="Empty: this machine; else calvin, libero or metaworld.")] = "",
    path: Annotated[str, typer.Argument(help="CALVIN's checkout, or the Python that holds LIBERO.")] = "",
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Say what is missing and the next move: on this machine and its servers, or for a benchmark. Example: upvla doctor

    For a benchmark: upvla doctor calvin ~/calvin
    """
    rows = _benchmark(what, path) if what else _machine(site)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['state'].upper() if row['state'] != 'ok' else 'ok':<8} {row['what']:<40} {row['detail']}")
            if row["next_move"]:
                print(f"{'':<8} -> {row['next_move']}")
    if any(row["state"] == "broken" for row in rows):
        raise typer.Exit(1)


def _machine(site: str) -> list[dict[str, str]]:
    from upvla import stack
    from upvla.config import SiteConfig, load
    from upvla.stack.doctor import examine

    about = load(f"site/{site}", SiteConfig)
    return [check._asdict() for check in examine(about, stack.load_site(site) if about.stack is not None else None)]


def _benchmark(what: str, path: str) -> list[dict[str, str]]:
    from upvla.rollout.benchmarks import inspect

    states = {True: "ok", False: "broken"}
    found = inspect(what, path)
    return [{"what": f.what, "state": states[bool(f.found)], "detail": f.detail, "next_move": ""} for f in found]


@app.command()
def up(site: SiteName = "local", as_json: Json = False) -> None:
    """Start the local stack (S3, MLflow, Prefect, Ray) and wait until it is healthy. Example: upvla up"""
    from upvla import stack

    config = stack.load_site(site, starting=True)
    stack.up(config, progress=lambda text: print(text, file=sys.stderr))
    status(site, as_json)


@app.command()
def down(site: SiteName = "local", as_json: Json = False) -> None:
    """Stop everything that `upvla up` started. Example: upvla down"""
    from upvla import stack

    config = stack.load_site(site)
    stack.down(config, progress=lambda text: print(text, file=sys.stderr))
    if as_json:
        status(site, as_json)


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
def env(site: SiteName = "local", as_json: Json = False) -> None:
    """Print the stack's addresses and credentials for a shell. Example: eval "$(upvla env)" """
    from upvla import stack

    known = stack.environment(stack.load_site(site))
    if as_json:
        show(known, as_json)
        return
    for name, value in known.items():
        print(f"export {name}={shlex.quote(value)}")


# -------------------------------------------------------------------------------------------------------- the line


@app.command()
def collect(
    env: Annotated[str, typer.Option(help="Another benchmark: calvin, or a suite such as metaworld-mt50.")] = "",
    expert: Annotated[str, typer.Option(help="Plug-in module:function for it; default: the suite's own.")] = "",
    chains: Annotated[int, typer.Option(min=1, help="With --env: its first N chains, or starts a task.")] = 10,
    out: Annotated[str, typer.Option(help="With --env: folder to write.")] = "recordings",
    calvin: CalvinPath = "",
    libero: LiberoPython = "",
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Record scripted experts in the playtable. Example: upvla collect --set data.collect.seed=1

    With --env, in another benchmark: upvla collect --env metaworld-mt10 --chains 5 --out recordings"""
    if env:
        from upvla.launch.benchmarks import collect_suite

        suite = "calvin-a" if env == "calvin" else env
        show(
            collect_suite(
                suite, places_of(site, calvin, libero), out, num=chains, expert=expert, progress=bar("recordings")
            ),
            as_json,
        )
        return
    show(open_line(config, site, set_).collect(), as_json)


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
    from upvla.config import assignments, explained
    from upvla.launch.weights import import_weights
    from upvla.model.config import ModelConfig
    from upvla.model.config import preset as model_preset

    changes = assignments(set_ or [])
    try:
        size = model_preset(preset, **changes)
    except ValidationError as error:
        raise ConfigError(explained(error, ModelConfig, "--set")) from error
    result = import_weights(kind, path, to, size)
    if as_json:
        show(result, as_json)
        return
    print(result.pop("audit"))
    show(result, as_json)


@app.command()
def mix(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Fix the order of all samples of the newest dataset version. Example: upvla mix --json"""
    show(open_line(config, site, set_).mix(), as_json)


@app.command()
def train(config: Config = "pretrain/full", site: SiteName = "local", set_: Set = None, as_json: Json = False) -> None:
    """Train tokenizers and both stages, resuming what was begun. Example: upvla train --set stage2.steps=100

    It takes no trainer's slot: on a shared cluster run a deployment, which waits for its turn."""
    show(open_line(config, site, set_).train_all(), as_json)


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
