"""`upvla evaluate`: closed-loop scores on the line's suites or on any benchmark, beside the reference policies."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from upvla.console import Config, Json, Set, SiteName, open_line, show
from upvla.errors import ConfigError, Mismatch, StackError

CalvinPath = Annotated[str, typer.Option(help="Checkout of mees/calvin with calvin_env in it.")]
LiberoPython = Annotated[str, typer.Option(help="Python of the environment that holds LIBERO.")]


def bar(what: str) -> Any:
    """A progress callback (done, in all) on a terminal's error stream."""
    shown = tqdm(desc=what, disable=not sys.stderr.isatty(), leave=False)

    def progress(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)

    return progress


def places_of(site: str, calvin: str, libero: str) -> Any:
    from upvla.config import SiteConfig, load
    from upvla.rollout.benchmarks import Places

    return Places(calvin, libero, str(load(f"site/{site}", SiteConfig).home / "benchmarks"))


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint URL, a registered model (NAME@ALIAS, NAME@VERSION, models:/NAME@ALIAS), or with "
            "--suite: random, still, expert, replay."
        ),
    ] = "",
    policy_url: Annotated[str, typer.Option(help="Instead of a model: ws://HOST:PORT of `upvla serve`.")] = "",
    suite: Annotated[str, typer.Option(help="A benchmark, e.g. playtable-d, calvin-d, libero-object.")] = "",
    chains: Annotated[int, typer.Option(min=1, help="Its first N chains; of single tasks, starts a task.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Processes; more than one run on Ray, under a watchdog.")] = 1,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="Worlds side by side in a process; default: the site's.")
    ] = None,
    one_model: Annotated[bool, typer.Option(help="One process holds the policy, all others ask it.")] = False,
    replan: Annotated[int, typer.Option(min=1, help="Actions of a chunk that are executed before the next one.")] = 10,
    ensemble: Annotated[bool, typer.Option(help="Average all chunks that speak about a step.")] = False,
    references: Annotated[bool, typer.Option(help="Also the rows of random, still and the suite's expert.")] = True,
    compare: Annotated[Path | None, typer.Option(help="Result of an earlier --json to compare with.")] = None,
    videos: Annotated[int, typer.Option(min=0, help="Chains that are filmed, spread evenly over the list.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for the videos.")] = "rollouts",
    dataset: Annotated[str, typer.Option(help="replay: NAME@VERSION whose segments are played.")] = "",
    calvin: CalvinPath = "",
    libero: LiberoPython = "",
    config: Config = "pretrain/full",
    site: SiteName = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Closed-loop scores with intervals, beside random and still. Example: upvla evaluate upvla-tiny@champion

    With --suite, on one benchmark: upvla evaluate MODEL --suite playtable-d --chains 100 --workers 2
    Through a policy server, whose token is in UPVLA_POLICY_TOKEN: upvla evaluate --policy-url ws://127.0.0.1:8600"""
    if bool(model) == bool(policy_url):
        raise ConfigError("evaluate: name a model, or --policy-url")
    if policy_url and not suite:
        from upvla.config import RunConfig, load
        from upvla.launch.serve import evaluate_served

        show(evaluate_served(policy_url, load(config, RunConfig, set_ or []).eval), as_json)
        return
    model = model or policy_url
    if not suite:
        opened = open_line(config, site, set_)
        show(opened.evaluate(opened.checkpoint_url(model)), as_json)
        return
    tracker = _running_tracker(site)  # before Ray is imported, which reads its environment only once
    from upvla.launch.benchmarks import evaluate_suite, replay_dataset

    places, progress = places_of(site, calvin, libero), lambda name: bar(f"{name}: chains")
    if model == "replay":
        if not dataset:
            raise ConfigError("replay needs recordings: name them with --dataset NAME@VERSION (`upvla data ls`)")
        store = open_line(config, site, set_).store
        _print(replay_dataset(store, dataset, suite, places, workers=workers, progress=progress), as_json)
        return
    url, expected = _resolved(model, lambda: open_line(config, site, set_))
    result = evaluate_suite(
        url,
        suite,
        places,
        num=chains,
        workers=workers,
        control=_control(replan, ensemble),
        layout=_layout(site, lanes, one_model),
        use_gpu=_uses_gpu(site),
        references=references,
        expected=expected,
        against=None if compare is None else _earlier(compare),
        videos=videos,
        out=out if videos else "",
        tracker=tracker,
        progress=progress,
    )
    _print(result, as_json)


def _uses_gpu(site: str) -> bool:
    from upvla.config import SiteConfig, load

    return load(f"site/{site}", SiteConfig).use_gpu


def _running_tracker(site: str) -> Any:
    """MLflow, where the site's stack runs, else None: a benchmark needs neither. A RAY_ADDRESS that is set stays."""
    from upvla import stack
    from upvla.config import SiteConfig, load

    if load(f"site/{site}", SiteConfig).stack is not None:
        servers = stack.load_site(site)
        try:
            known = stack.environment(servers)
        except StackError:  # there never was one
            return None
        if not all(part["healthy"] for part in stack.status(servers)):
            return None
        os.environ.update(known | {"RAY_ADDRESS": os.environ.get("RAY_ADDRESS", known["RAY_ADDRESS"])})
    from upvla.tracking import Tracker

    found = load(f"site/{site}", SiteConfig)
    return Tracker(found.tracking_url, found.experiment) if found.tracking_url else None


def _resolved(model: str, line: Callable[[], Any]) -> tuple[str, Mapping[str, str]]:
    """(what `load_policy` knows, what the registry says of it)."""
    from upvla.checkpoint import registered_name
    from upvla.rollout.benchmarks import BUILT_IN

    name = registered_name(model)
    if model in BUILT_IN or not name:
        return model, {}
    version = line().version(name)
    return version.checkpoint.url, {"name": version.checkpoint.model_id, "stats_id": version.tags.get("stats_id", "")}


def _control(replan: int, ensemble: bool) -> Any:
    from upvla.rollout.evaluate import Control

    return Control(replan=replan, execution="ensemble" if ensemble else "chunk")


def _layout(site: str, lanes: int | None, one_model: bool) -> Any:
    from upvla.config import SiteConfig, load

    layout = load(f"site/{site}", SiteConfig).rollout
    changes = {"lanes": lanes} if lanes else {}
    return layout.model_copy(update=changes | ({"model": "one"} if one_model else {}))


def _earlier(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mismatch(f"--compare {path}: {error}; give what an earlier `--json` printed") from error


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, sort_keys=True))
    else:
        print(table(result))


def table(result: Mapping[str, Any]) -> str:
    """For a terminal: who did how many tasks of a chain, every task, why it failed, what it took."""
    steps = len(result["success"])
    rows = {result["policy"]: result, **result["references"]}
    lines = [f"{result['suite']}, {result['chains']} chains, protocol {result['fingerprint']}", ""]
    lines += [f"{'policy':<20}{'average length':<22}" + "".join(f"{k} done".rjust(9) for k in range(1, steps + 1))]
    for name, row in rows.items():
        low, high = row["average_length_interval"]
        length = f"{row['average_length']:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"{name:<20}{length:<22}" + "".join(f"{rate:9.1%}" for rate in row["success"]))
    lines += ["", f"{'task':<30}success when it was tried"]
    for task, score in result["per_task"].items():
        lines.append(f"{task:<30}{score['value']:7.1%} [{score['low']:.1%}, {score['high']:.1%}]")
    if result["failures"]:
        lines += ["", "failed: " + ", ".join(f"{kind} {count}" for kind, count in result["failures"].items())]
    lines += [f"chain {number}: {error}" for number, error in result["errors"].items()]
    if "compared" in result:
        gain = result["compared"]["average_length"]
        lines += ["", "against {with}: ".format(**result["compared"])
                  + "{value:+.2f} [{low:+.2f}, {high:+.2f}] tasks a chain".format(**gain)]  # fmt: skip
    took = "{env_steps_per_s:.0f} env steps/s, {frames_per_s:.1f} frames/s, policy {policy_ms_per_chunk:.1f} ms a chunk"
    lines += ["", f"{took}, {{seconds:.1f}} s".format(**result["speed"])]
    return "\n".join(lines)
