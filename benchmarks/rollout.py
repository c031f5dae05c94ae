"""Closed-loop evaluation measured: drawing chains, whole evaluations, a model in every layout.

    python benchmarks/rollout.py [--json [FILE]] [--chains 100] [--model URL] [--model-chains 48] [--max-steps 240]

Without `--model` an untrained `tiny` drives: it fails all its tasks, so every chain has one subtask, and speed is what
is measured. A ratio is wall time over the seconds that simulators and policies took in this very run (by the clock, in
whichever process), shared by the cores; 1.0 means that nothing else was done or waited for.

`whole`   from asking for processes to the last record: starting them, importing, loading the model, opening worlds
`steady`  the same chains once more in the same processes: opening worlds, the rounds, the tail

An evaluation's ratio is `whole` too, over all rows that `upvla evaluate MODEL --suite playtable-d --workers 2` prints
(the model, random, still, the expert), with the protocol and the self-test; only the cluster is there before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from _figures import give, parse

from upvla.checkpoint import Bundle, export
from upvla.launch.cluster import connected
from upvla.launch.evaluate import Crew
from upvla.launch.scores import SLOTS, Exam, judge
from upvla.model.config import preset
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.benchmarks import BUILT_IN
from upvla.rollout.evaluate import Control, Layout
from upvla.rollout.judge import Cost, SuiteJudge, load_alone
from upvla.rollout.play import BatchPolicy
from upvla.sim.playtable.suite import PlaytableSuite, playtable
from upvla.sim.playtable.tasks import TASKS
from upvla.store import open_store
from upvla.types import CALVIN_RELATIVE, Chain, ChainRecord

WORKERS = 2
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


def evaluation(scratch: Path, policies: list[str], count: int) -> dict[str, Any]:
    """Rows of one evaluation in D by two workers, and what it took as a whole."""
    began, suite = time.monotonic(), playtable("playtable-d", scratch)
    exam = Exam(suite, suite.chains(count), Control(), Layout(), WORKERS)
    with tempfile.TemporaryDirectory(prefix="judged-") as folder:
        judged = judge(open_store(folder), exam, policies)
    seconds = time.monotonic() - began
    spent = sum(row.figures["simulator_s"] + row.figures["policy_s"] for row in judged.values())
    rows = {
        name if name in BUILT_IN else "model": {**row.figures, "average_length": row.report.average_length.value}
        for name, row in judged.items()
    }
    return {"seconds": round(seconds, 1), "ratio_whole": round(seconds * WORKERS / spent, 3), "rows": rows}


def layouts(model_url: str, count: int, max_steps: int) -> dict[str, Any]:
    suite = PlaytableSuite("speed", "chains", ("D",), max_steps=max_steps)
    chains, found, records = list(enumerate(suite.chains(count))), {}, {}
    for name, (workers, layout, slots) in LAYOUTS.items():
        work = SuiteJudge(suite, model_url, Control(), layout.lanes, slots)
        found[name], records[name] = alone(work, chains) if workers == 1 else crewed(work, chains, layout)
    assert all(records[name] == records["one process, 8 lanes"] for name, row in LAYOUTS.items() if row[2] == SLOTS)
    return found


def alone(work: SuiteJudge, chains: list[tuple[int, Chain]]) -> tuple[dict[str, float], list[ChainRecord]]:
    """In this process, the model loaded before."""
    work.policy = cast(BatchPolicy, load_alone(str(work.policy), work.suite, work.slots))
    began = time.monotonic()
    records = sorted(work(chains))
    return figures(work.cost, time.monotonic() - began, 1), records


def crewed(
    work: SuiteJudge, chains: list[tuple[int, Chain]], layout: Layout
) -> tuple[dict[str, float], list[ChainRecord]]:
    """By two processes: once with their start in the time, and once more."""
    records: list[ChainRecord] = []
    began = time.monotonic()
    with Crew(work.suite, WORKERS, layout, work.slots) as crew:
        crew.prepare(str(work.policy))
        first = figures(crew.judge(work, chains, lambda found: None), time.monotonic() - began, WORKERS)
        began = time.monotonic()
        again = figures(crew.judge(work, chains, records.extend), time.monotonic() - began, WORKERS)
    return {**again, "whole_s": first["seconds"], "ratio_whole": first["ratio_steady"]}, sorted(records)


def figures(cost: Cost, seconds: float, cores: int) -> dict[str, float]:
    found = cost.figures(seconds, cores)
    return {**found, "ratio_steady": found.pop("wall_over_ideal")}


def untrained(scratch: Path) -> str:
    text = TextTokenizer.train([row.held_out for row in TASKS.values()], 512)
    config = preset("tiny", text_vocab_size=512)
    bundle = Bundle(config, UPVLA(config), VQTokenizer(config.vq), text, CALVIN_RELATIVE, {})
    return export(open_store(str(scratch / "model")), "tiny", bundle).url


def show(what: str, found: dict[str, Any]) -> None:
    print(f"\n{what}: {found['seconds']} s, ratio {found['ratio_whole']:.2f}")
    table("row", found["rows"])


def table(what: str, rows: dict[str, dict[str, float]]) -> None:
    columns = {
        "seconds": "seconds", "env_steps_per_s": "steps/s", "frames_per_s": "frames/s",
        "policy_ms_per_chunk": "policy ms/chunk", "simulator_ms_per_chunk": "simulator ms/chunk",
        "ratio_steady": "steady", "wall_over_ideal": "ratio", "ratio_whole": "whole",
    }  # fmt: skip
    told = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
    print(f"\n{what:<40}" + "".join(f"{title:>{len(title) + 2}}" for title in told.values()))
    for name, row in rows.items():
        print(f"{name:<40}" + "".join(f"{row.get(key, '-'):>{len(title) + 2}}" for key, title in told.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=100, help="of an evaluation; 0 leaves evaluations out")
    parser.add_argument("--model", default="")
    parser.add_argument("--model-chains", type=int, default=48, help="of every layout; 0 leaves layouts out")
    parser.add_argument("--max-steps", type=int, default=240, help="of a chain in a layout")
    options = parse(parser)
    os.environ.setdefault("RAY_ADDRESS", "local")  # never somebody else's cluster that happens to run here
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder:
        scratch = Path(folder)
        model_url = options.model or untrained(scratch)
        result: dict[str, Any] = {"sampling": sampling(scratch)}
        print("1000 chains:", result["sampling"])
        began = time.monotonic()
        with connected():
            result["ray_s"] = round(time.monotonic() - began, 1)
            if options.chains:
                result["experts"] = evaluation(scratch, ["expert"], options.chains)
                show(f"{options.chains} chains of the experts in D", result["experts"])
                result["evaluation"] = evaluation(scratch, [model_url, *BUILT_IN], options.chains)
                show(f"{options.chains} chains of a model in D, and its references", result["evaluation"])
            if options.model_chains:
                result["layouts"] = layouts(model_url, options.model_chains, options.max_steps)
                table("layout", result["layouts"])
    give(options, result)


if __name__ == "__main__":
    main()
