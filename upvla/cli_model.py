"""The verbs of a model's life: `finetune stop export predict promote serve`, and `deploy` for its flows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from upvla.console import Json, Set, SiteName, open_line, show
from upvla.errors import ConfigError, UpvlaError

model_app = typer.Typer()

Model = Annotated[str, typer.Argument(help="models:/NAME@ALIAS, NAME@ALIAS, NAME@VERSION, or the URL of a checkpoint.")]
Nightly = Annotated[str, typer.Option("--config", help="Fine-tuning configuration under configs/, without .yaml.")]


def _finetuning(config: str, site: str, overrides: list[str] | None) -> Any:
    open_line("pretrain/full", site, None)  # sets the running stack's addresses before Ray is imported
    from upvla.launch.finetune import open_finetuning

    return open_finetuning(config, site, overrides or [])


@model_app.command()
def finetune(
    config: Nightly = "finetune/nightly", site: SiteName = "local", set_: Set = None, as_json: Json = False
) -> None:
    """Fine-tune the champion on the newest data, keeping its statistics; prints the checkpoint's URL and the drift.

    Example: upvla finetune --set stage.steps=500

    It takes no trainer's slot: on a shared cluster run the deployment `finetune/nightly`, which waits for its turn.
    """
    line = _finetuning(config, site, set_)
    champion = line.champion()
    plan = line.mix()
    drift = line.drift(plan, champion)
    line.encode(plan, champion)
    model = line.train(plan, champion)
    show({**model, "parent": champion["url"], "drift": drift["metrics"]}, as_json)


@model_app.command()
def stop(
    job: Annotated[str, typer.Argument(help="Job id as the log names it, STAGE-KEY-ATTEMPT; default: all.")] = "",
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Ask what trains to save and leave after its present step; started again, it goes on there.

    Example: upvla stop stage2-3f2c9a01b7d4e586-1
    """
    line = open_line("pretrain/full", site, None)
    from upvla.launch.jobs import Jobs
    from upvla.launch.train import stop_training

    if not line.site.ray_jobs_url:
        raise ConfigError(f"site {site!r} has no Ray job server: what trains in a terminal is stopped there, by Ctrl-C")
    show({"asked": stop_training(line.store, Jobs(line.site.ray_jobs_url), job)}, as_json)


@model_app.command()
def promote(
    candidate: Annotated[str, typer.Argument(help="URL of a fine-tuned checkpoint; the gate decides.")] = "",
    to: Annotated[str, typer.Option(help="Make this registered version champion, without a gate: a rollback.")] = "",
    because: Annotated[str, typer.Option(help="With --to: why. It is kept.")] = "by hand",
    config: Nightly = "finetune/nightly",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Judge a candidate against the champion on the same chains, and move the alias if it is surely better.

    Example: upvla promote s3://upvla/models/3f2c/finetune, or to go back: upvla promote --to 3
    """
    if bool(candidate) == bool(to):
        raise ConfigError("promote: give the URL of a candidate, or --to VERSION")
    line = _finetuning(config, site, set_)
    if to:
        show(line.roll_to(to, because), as_json)
        return
    champion, model = line.champion(), {"url": candidate}
    show(line.promote(model, champion, line.evaluate(candidate)), as_json)


@model_app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="Empty folder or URL.")],
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """Copy a model to a place of its own, hashes checked. Example: upvla export upvla-tiny@champion --to ./champion"""
    from upvla.checkpoint import copy_checkpoint

    checkpoint = copy_checkpoint(_url(model, site), to)
    show({"url": checkpoint.url, "model_id": checkpoint.model_id, "step": checkpoint.step}, as_json)


@model_app.command()
def predict(
    model: Model,
    instruction: Annotated[str, typer.Option(help="What the robot is to do.")],
    image: Annotated[list[str], typer.Option(help="CAMERA=FILE, a JPEG or PNG; once a camera.")],
    state: Annotated[str, typer.Option(help="Comma-separated numbers; this model does not read them.")] = "0",
    site: SiteName = "local",
    as_json: Json = False,
) -> None:
    """The next actions for one observation, every camera of the model given.

    Example: upvla predict ./champion --instruction "open the drawer" --image static=a.png --image gripper=b.png
    """
    import numpy as np

    from upvla.checkpoint import load_bundle
    from upvla.images import decode_image
    from upvla.rollout.golden import proven
    from upvla.types import Observation

    frames = {}
    for pair in image:
        camera, equals, path = pair.partition("=")
        if not equals or not Path(path).is_file():
            raise ConfigError(f"--image {pair!r}: write it as CAMERA=FILE, with a file that exists")
        frames[camera] = decode_image(Path(path).read_bytes())
    numbers = _numbers(state)
    policy = proven(load_bundle(url := _url(model, site)), url)
    policy.reset(instruction)
    actions = policy.act(Observation(frames, np.array(numbers, np.float32))).actions
    if as_json:
        dims = [dim.name for dim in policy.action_space.dims]
        print(json.dumps({"dims": dims, "dt_s": policy.action_space.dt_s, "actions": actions.tolist()}))
        return
    print(" ".join(f"{dim.name:>8}" for dim in policy.action_space.dims))
    for row in actions:
        print(" ".join(f"{value:>8.3f}" for value in row))


@model_app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback put TLS in front.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8600,
    threads: Annotated[int, typer.Option(min=1, help="Of one prediction; with 1 it sums as an evaluation does.")] = 1,
    reload_every_s: Annotated[
        float, typer.Option(min=0.1, help="How often the registry is asked for a newer model.")
    ] = 5.0,
    deadline_ms: Annotated[float, typer.Option(min=1, help="The longest that an answer may take.")] = 2000.0,
    site: SiteName = "local",
) -> None:
    """Let robots call a policy by WebSocket or HTTP, with a token. Example: upvla serve models:/upvla-tiny@champion"""
    from upvla.config import SiteConfig, load
    from upvla.rollout.server import ServerConfig

    newest = _newest(model, site)  # sets the running stack's addresses, so it comes before the imports below
    from upvla.launch.serve import serve as run
    from upvla.launch.serve import server_token

    token, source = server_token(load(f"site/{site}", SiteConfig).home)
    settings = ServerConfig(host=host, port=port, reload_every_s=reload_every_s, deadline_ms=deadline_ms)
    print(f"its token is in {source}", file=sys.stderr, flush=True)
    run(newest, settings, token, lambda text: print(text, file=sys.stderr, flush=True), threads)


@model_app.command()
def deploy(site: SiteName = "local", as_json: Json = False) -> None:
    """Register deployments, schedules, limits and automations with Prefect, from code. Example: upvla deploy"""
    from upvla import stack
    from upvla.config import SiteConfig, load

    if load(f"site/{site}", SiteConfig).stack is not None:
        os.environ.update(stack.environment(stack.load_site(site)))
    began = time.monotonic()
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "flows.deploy"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise UpvlaError(
            f"deploy ended with {done.returncode}: {lines[-1] if lines else ''}; is Prefect up? `upvla status`"
        )
    show({"deployed": done.stdout.strip(), "seconds": round(time.monotonic() - began, 1)}, as_json)


def _numbers(state: str) -> list[float]:
    try:
        return [float(number) for number in state.split(",")]
    except ValueError as error:
        raise ConfigError(f"--state {state!r}: {error}; write numbers with commas between them") from error


def _url(model: str, site: str) -> str:
    """Of a checkpoint, or of the registered model of that name."""
    found = _newest(model, site)()
    return found if isinstance(found, str) else str(found.checkpoint.url)


def _newest(model: str, site: str) -> Any:
    """A function of what is meant: a URL, or what the registry says of `name@alias` whenever it is called."""
    from upvla.checkpoint import registered_name

    name = registered_name(model)
    if not name and not model.startswith("s3://"):
        return lambda: model
    line = open_line("pretrain/full", site, None)
    return (lambda: line.version(name)) if name else (lambda: model)
