"""Closed-loop evaluation measured: drawing chains, experts without rendering, a model in every layout.

    python benchmarks/rollout.py [--json out.json] [--chains 100] [--model URL] [--model-chains 16] [--max-steps 120]

Without `--model` an untrained `tiny` drives: it fails all its tasks, so every chain has one subtask of `--max-steps`
steps, and speed is what is measured. `wall/ideal` is the wall time of judging over (simulator + policy time) / workers;
`whole` also counts opening worlds, the protocol, the self-test and starting Ray.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from upvla.checkpoint import Bundle, export
from upvla.launch.cluster import connected
from upvla.launch.evaluate import judge_chains
from upvla.launch.scores import SLOTS, Exam, judge
from upvla.model.config import preset
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.evaluate import Control, Layout
from upvla.rollout.judge import SuiteJudge
from upvla.sim.playtable.suite import PlaytableSuite, playtable
from upvla.sim.playtable.tasks import TASKS
from upvla.store import open_store
from upvla.types import CALVIN_RELATIVE, ChainRecord

LAYOUTS = {  # (workers, layout, rows of a pass)
    "one process, a world at a time": (1, Layout(lanes=1), 1),
    "one process, 8 lanes": (1, Layout(lanes=8), 8),
    "two processes, a world at a time": (2, Layout(lanes=1), 1),
    "two processes, 8 lanes each": (2, Layout(lanes=8), 8),
    "two processes, 8 lanes each, one model": (2, Layout(lanes=8, model="one"), 8),
}


def sampling(scratch: Path) -> dict[str, float]:
    """Seconds for 1000 chains, drawn and read back."""
    found = {}
    for name in ("drawn_s", "kept_s"):
        began = time.monotonic()
        playtable("playtable-d", scratch).chains(1000)
        found[name] = round(time.monotonic() - began, 3)
    return found


def experts(scratch: Path, count: int) -> dict[str, Any]:
    """The whole of `upvla evaluate expert --suite playtable-d --workers 2`, without its command line."""
    began, suite = time.monotonic(), playtable("playtable-d", scratch)
    exam = Exam(suite, suite.chains(count), Control(), Layout(), 2)
    judged = judge(open_store(str(scratch / "experts")), exam, ["expert"])["expert"]
    whole = round(time.monotonic() - began, 1)
    return {**judged.figures, "whole_s": whole, "average_length": judged.report.average_length.value}


def layouts(model_url: str, count: int, max_steps: int) -> dict[str, Any]:
    suite = PlaytableSuite("speed", "chains", ("D",), max_steps=max_steps)
    chains, found, records = list(enumerate(suite.chains(count))), {}, {}
    for name, (workers, layout, slots) in LAYOUTS.items():
        judged: list[ChainRecord] = []
        work = SuiteJudge(suite, model_url, Control(), layout.lanes, slots)
        began = time.monotonic()
        if workers == 1:
            judged += work.run(iter(chains))
            cost = work.cost
        else:
            cost = judge_chains(work, chains, workers, layout, judged.extend)
        found[name] = cost.figures(time.monotonic() - began, workers)
        found[name]["simulator_ms_per_chunk"] = round(1000 * cost.simulator_s / cost.chunks, 2)
        records[name] = sorted(judged)
    assert all(records[name] == records["one process, 8 lanes"] for name, row in LAYOUTS.items() if row[2] == SLOTS)
    return found


def untrained(scratch: Path) -> str:
    text = TextTokenizer.train([row.held_out for row in TASKS.values()], 512)
    config = preset("tiny", text_vocab_size=512)
    bundle = Bundle(config, UPVLA(config), VQTokenizer(config.vq), text, CALVIN_RELATIVE, {})
    return export(open_store(str(scratch / "model")), "tiny", bundle).url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chains", type=int, default=100, help="of the experts; 0 leaves them out")
    parser.add_argument("--model", default="")
    parser.add_argument("--model-chains", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder:
        scratch = Path(folder)
        result: dict[str, Any] = {"sampling": sampling(scratch)}
        print("1000 chains:", result["sampling"])
        if options.chains:
            result["experts"] = experts(scratch, options.chains)
            print(f"{options.chains} chains of the experts in D:", json.dumps(result["experts"]))
        with connected():
            result["layouts"] = layouts(options.model or untrained(scratch), options.model_chains, options.max_steps)
    print(f"\n{'layout':<42}{'seconds':>9}{'steps/s':>9}{'frames/s':>10}{'policy':>9}{'simulator ms/chunk':>20}")
    for name, row in result["layouts"].items():
        print(
            f"{name:<42}{row['seconds']:9.1f}{row['env_steps_per_s']:9.0f}{row['frames_per_s']:10.1f}"
            f"{row['policy_ms_per_chunk']:9.2f}{row['simulator_ms_per_chunk']:20.2f}"
            f"   wall/ideal {row['wall_over_ideal']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
