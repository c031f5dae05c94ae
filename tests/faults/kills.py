"""A worker is killed in every phase under every ZeRO stage, and the run ends as if nothing had happened.

    python -m tests.faults.kills [--runs 20] [--store-url URL] [--json docs/faults-training.json]

Each run draws, by its seed, who dies and when, and prints what was killed, what it cost and whether the result is the
uninterrupted one, bit for bit. Resume points lie on an S3 server that is started for it, or where `--store-url` says:
in a folder, or on the server that the environment names. What a run has left there is deleted after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.conftest import started_s3
from tests.faults.lives import CONVERT, PHASES, SAVE_EVERY, STEPS, Kill, Life, Lives
from upvla.store import open_store
from upvla.train import resume

ZERO_STAGES = (0, 1, 2, 3)


def draw(phase: str, seed: int, world_size: int = 2) -> Kill:
    """Who dies, at which occasion; one of the occasions that such a run has."""
    dice = random.Random(f"{phase} {seed}")
    rank = dice.randrange(world_size)
    if phase in ("step", "restore"):
        nth = dice.randrange(SAVE_EVERY + 1, STEPS) if phase == "step" else 1
    elif phase == CONVERT:
        rank, nth = 0, 1
    elif phase == "export":
        nth = dice.randrange(1, 3)
    elif phase == "snapshot":
        nth = SAVE_EVERY * dice.randrange(2, STEPS // SAVE_EVERY + 1)
    else:
        nth = dice.randrange(2, 4)
    commits = phase in ("commit", "committed", "collect", "restore")
    return Kill(phase, 0 if commits else rank, nth)


def resized(lives: Lives, folder: Path, zero_stage: int) -> Life:
    """Two workers up to their first set, and one from there on: what a run gives that is killed amid the conversion."""
    before = lives.live(folder, zero_stage, Kill("committed", 0, 1))
    after = lives.live(folder, zero_stage, world_size=1)
    saved = {step: loss for step, loss in before.losses.items() if step <= after.start}
    return after._replace(losses=saved | after.losses, positions=before.positions | after.positions)


def draw_in_turn(seed: int) -> tuple[list[Kill], list[Kill]]:
    """A kill of every phase, for two runs that die four times each: a death leaves the next one its occasion."""
    dice = random.Random(f"in turn {seed}")
    step, snapshot, upload, export = (dice.randrange(2) for _ in range(4))
    before = [
        Kill("step", step, dice.randrange(SAVE_EVERY + 1, 2 * SAVE_EVERY)),
        Kill("snapshot", snapshot, 2 * SAVE_EVERY),
        Kill("upload", upload, 2),
        Kill("commit", 0, 2),
    ]
    after = [
        Kill("committed", 0, 2),
        Kill("collect", 0, dice.randrange(2, 4)),
        Kill("restore", 0, 1),
        Kill("export", export, dice.randrange(1, 3)),
    ]
    return before, after


def trial(lives: Lives, folder: Path, zero_stage: int, kills: Sequence[Kill], whole: Life) -> list[dict[str, Any]]:
    """Kill, live on until the next death, and compare with the uninterrupted run; what each death cost.

    Raises `AssertionError` where they differ.
    """
    lived, world_size = [], 1 if kills[0].phase == CONVERT else 2
    if kills[0].phase in ("restore", CONVERT):  # something must be there to be restored
        lived.append(lives.live(folder, zero_stage, Kill("committed", 0, 1)))
    first = len(lived)
    for kill in kills:
        lived.append(lives.live(folder, zero_stage, kill, world_size))
        assert -9 in lived[-1].exit_codes, f"{kill}: nobody was killed, exit codes {lived[-1].exit_codes}"
    lived.append(last := lives.live(folder, zero_stage, world_size=world_size))
    assert set(last.exit_codes) == {0}, f"{kills}: the life after it failed, {last.exit_codes}"
    if kills[0].phase == CONVERT:  # one worker's sums are rounded otherwise: of two, what they have saved is compared
        lived[0] = lived[0]._replace(losses={step: x for step, x in lived[0].losses.items() if step <= last.start})
    losses: dict[int, float] = {}
    for life in lived:
        for step, loss in life.losses.items():
            assert whole.losses[step] == loss, f"{kills}: step {step} gave {loss}, uninterrupted {whole.losses[step]}"
            assert whole.positions[step] == life.positions[step], f"{kills}: step {step} saw other samples"
        losses |= life.losses
    assert losses == whole.losses
    for name, weight in whole.weights.items():
        assert torch.equal(last.weights[name], weight), f"{kills}: {name} differs"
    store = open_store(lives.store_url(folder))
    named = {point.name for point in resume.points(store)}
    left = {key.partition("/")[0].removesuffix(".json") for key in store.list()}
    assert left == named, f"{kills}: {sorted(left - named)} was never collected"
    return [{"zero_stage": zero_stage, **cost_of(kill, lived, first + n)} for n, kill in enumerate(kills)]


def cost_of(kill: Kill, lived: Sequence[Life], number: int) -> dict[str, Any]:
    """Of the death that ended life `number`; the next one may have ended before its first step."""
    after = next((life for life in lived[number + 1 :] if life.losses), lived[-1])
    lost = max(max(life.losses, default=life.start) for life in lived[: number + 1]) - after.start
    assert 0 <= lost <= 2 * SAVE_EVERY, f"{kill}: {lost} steps were lost"  # the set before was still on its way
    took = round(after.first_step_s - after.began_s, 2) if after.losses else None
    return {**asdict(kill), "lost_steps": lost, "recovery_s": took, "bit_identical": True}


def attempt(lives: Lives, folder: Path, zero_stage: int, kill: Kill, whole: Life) -> dict[str, Any]:
    """The row of one trial, also where it has failed. Nothing of it stays behind, or later ones would be slower."""
    try:
        (row,) = trial(lives, folder, zero_stage, [kill], whole)
        return row
    except AssertionError as error:
        return {"zero_stage": zero_stage, **asdict(kill), "bit_identical": False, "error": str(error)}
    finally:
        store = open_store(lives.store_url(folder))
        for key in store.list():
            store.delete(key)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def place(store_url: str | None) -> Iterator[str]:
    """Where the stores of all runs lie; the environment leads there meanwhile."""
    if store_url is not None:
        yield store_url
        return
    with tempfile.TemporaryDirectory(prefix="upvla-kills-s3-") as folder, started_s3(Path(folder)) as server:
        yield server.url()


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for phase in dict.fromkeys(row["phase"] for row in rows):
        found = [row for row in rows if row["phase"] == phase]
        good = [row for row in found if row["bit_identical"]]
        lost, took = [row["lost_steps"] for row in good], [row["recovery_s"] for row in good if row["recovery_s"]]
        yield (
            f"{phase:<10} {len(good)}/{len(found)} bit-identical, lost steps at most {max(lost, default=0)}, "
            f"first step after {max(took, default=0.0):.1f} s at most"
        )


def all_of(lives: Lives, scratch: Path, phases: Sequence[str], runs: int) -> Iterator[dict[str, Any]]:
    for zero_stage in ZERO_STAGES:
        whole = lives.live(scratch / f"whole-{zero_stage}", zero_stage)
        # every worker of ZeRO 0 has all of it: nothing is converted
        converts = CONVERT in phases and zero_stage > 0
        halved = resized(lives, scratch / f"halved-{zero_stage}", zero_stage) if converts else whole
        for phase in phases:
            if phase == CONVERT and not converts:
                continue
            for seed in range(runs):
                folder = scratch / f"{zero_stage}-{phase}-{seed}"
                yield attempt(lives, folder, zero_stage, draw(phase, seed), halved if phase == CONVERT else whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="seeds a phase and ZeRO stage")
    parser.add_argument("--phases", nargs="+", choices=[*PHASES, CONVERT], default=[*PHASES, CONVERT])
    parser.add_argument("--store-url", help="an empty prefix or folder for the stores of all runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="upvla-kills-") as scratch, place(options.store_url) as url:
        keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for row in all_of(Lives(url, keys), Path(scratch), options.phases, options.runs):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(*table(rows), sep="\n")
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return 0 if all(row["bit_identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
