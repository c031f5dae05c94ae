"""`upvla demo`: the stack, the deployments, `prefect deployment run pretrain/full`, and one table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from upvla import stack
from upvla.errors import ConfigError, UpvlaError
from upvla.launch.pretrain import open_pretraining
from upvla.stack import StackConfig

STAGES = ("up", "collect", "ingest", "mix", "text", "vq", "encode", "stage1", "stage2", "evaluate", "register")
CONFIGS = {"full": "pretrain/full", "ci": "pretrain/ci"}


def run_demo(size: str, site: str) -> dict[str, Any]:
    """Bring everything up, run the line through its deployment, print and write `<home>/demo/report.json`."""
    if size not in CONFIGS:
        raise ConfigError(f"no demo size {size!r}; choose one of {', '.join(CONFIGS)}")
    began = time.monotonic()
    servers = stack.load_site(site, starting=True)
    stack.up(servers, progress=_say)
    os.environ.update(stack.environment(servers))
    up_seconds = time.monotonic() - began
    config = CONFIGS[size]
    _run("flows.deploy", quiet=True)
    name = f"demo-{size}-{uuid.uuid4().hex[:8]}"
    parameters = ("-p", f"config={json.dumps(config)}", "-p", f"site={json.dumps(site)}")
    _run("prefect", "--no-prompt", "deployment", "run", "pretrain/full", "--flow-run-name", name, *parameters)
    _run("flows.follow", name)
    line = open_pretraining(config, site)
    report = line.store.read_json(line.report_key)
    report["stage_seconds"] = {"up": round(up_seconds, 1), **report["stage_seconds"]}
    report["total_seconds"] = round(time.monotonic() - began, 1)
    report["addresses"] = {part["name"]: part["address"] for part in stack.status(servers)}
    target = _write(servers, report)
    print(table(report))
    print(f"\nreport: {target}\nstop everything: upvla down")
    return report


def table(report: dict[str, Any]) -> str:
    """The report for a terminal: stages, losses, scores beside the reference policies, where to look."""
    lines = ["", f"{'stage':<10} {'seconds':>8}  figure"]
    for stage in sorted(report["stage_seconds"], key=STAGES.index):
        seconds = report["stage_seconds"][stage]
        lines.append(f"{stage:<10} {seconds:>8.1f}  {report['figures'].get(stage, '')}")
    lines.append(f"{'total':<10} {report['total_seconds']:>8.1f}")
    lines += ["", f"{'held-out loss':<14} {'before':>9} {'after':>9}"]
    lines += [f"{name:<14} {_loss(row['first'])} {_loss(row['last'])}" for name, row in report["losses"].items()]
    policies = list(report["scores"])
    lines += ["", f"{'score (95 % interval)':<34}" + "".join(f"{policy:>22}" for policy in policies)]
    for metric in sorted({metric for scores in report["scores"].values() for metric in scores}):
        cells = []
        for policy in policies:
            score = report["scores"][policy].get(metric)
            cells.append("" if score is None else "{value:.2f} [{low:.2f}, {high:.2f}]".format(**score))
        lines.append(f"{metric:<34}" + "".join(f"{cell:>22}" for cell in cells))
    lines += ["", "where to look"] + [f"  {name:<10} {address}" for name, address in report["addresses"].items()]
    lines += [f"  {name:<10} {value}" for name, value in report["versions"].items()]
    return "\n".join(lines)


def _loss(value: float | None) -> str:
    return f"{value:>9.4f}" if value is not None else f"{'-':>9}"  # not finite, or not there


def _run(module: str, *arguments: str, quiet: bool = False) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=root, check=False, capture_output=quiet, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        print(done.stdout or "", done.stderr or "", file=sys.stderr)
        raise UpvlaError(
            f"`python -m {module} {' '.join(arguments[:2])}` ended with {done.returncode}; its log is in the Prefect "
            "UI (`upvla status` says where). What was finished is kept: run the demo again to go on"
        )


def _write(servers: StackConfig, report: dict[str, Any]) -> Path:
    target = servers.home / "demo/report.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=2, sort_keys=True))
    return target


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
