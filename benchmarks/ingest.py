"""How near ingest comes to what encoding JPEGs costs anyway, and whether memory grows with the number of recordings.

    python benchmarks/ingest.py [--recordings 180] [--rounds 8] [--json [FILE]]

`ratio_from_arrays`: recordings from memory into a committed version, against encoding the frames only, in one thread.
`ratio_from_npz`: CALVIN's compressed npz files, against inflating and encoding them only. Sides take turns in a round.
Ratios are of elapsed time; `cpu_ratio_*` are of the process's own time, which the machine's other work disturbs less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from _figures import give, parse
from _recordings import make_recording

from upvla.data.commit import commit
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.shards import stage
from upvla.data.versions import dataset_root
from upvla.images import encode_jpeg
from upvla.store import open_store
from upvla.types import Episode

SIZES = (20, 80, 320, 640)  # recordings that memory is looked at with


class Spent(NamedTuple):
    """Seconds that passed, and those that this process computed, for itself and in the system."""

    elapsed: float
    cpu: float


def timed(work: Callable[[Path], Any]) -> Spent:
    """Of work in an empty folder, whose removal is not counted."""
    with tempfile.TemporaryDirectory(prefix="upvla-bench-") as folder:
        began = time.perf_counter(), time.process_time()
        work(Path(folder))
        return Spent(time.perf_counter() - began[0], time.process_time() - began[1])


def encode_only(episodes: Sequence[Episode]) -> None:
    for episode in episodes:
        for frames in episode.images.values():
            for frame in frames:
                encode_jpeg(np.asarray(frame))


def from_arrays(episodes: Sequence[Episode], folder: Path) -> None:
    store = open_store(str(folder))
    staged = stage(dataset_root(store, "bench"), ((episode, "token") for episode in episodes))
    commit(store, "bench", [staged], validation_fraction=0.1, options={})


def write_calvin(folder: Path, episodes: Sequence[Episode]) -> None:
    ends = np.cumsum([len(episode) for episode in episodes])
    ranges = [(end - len(episode), end - 1) for end, episode in zip(ends, episodes, strict=True)]
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    for (start, _), episode in zip(ranges, episodes, strict=True):
        for step in range(len(episode)):
            np.savez_compressed(
                folder / f"episode_{start + step:07d}.npz",
                actions=episode.actions[step],
                rel_actions=episode.actions[step],
                robot_obs=episode.state[step],
                scene_obs=np.zeros(24),
                **{f"rgb_{camera}": frames[step] for camera, frames in episode.images.items()},
            )


def inflate_and_encode(folder: Path) -> None:
    for path in sorted(folder.glob("episode_*.npz")):
        with np.load(path) as frame:
            arrays = {name: frame[name] for name in frame.files}
        encode_jpeg(arrays["rgb_static"])
        encode_jpeg(arrays["rgb_gripper"])


def from_npz(raw: Path, folder: Path) -> None:
    ingest(open_store(str(folder)), IngestConfig(format="calvin", dataset="bench", qa_per_episode=0), str(raw))


def memory_mb(recordings: int) -> float:
    """Growth of resident memory while a stream of recordings is staged."""
    timed(lambda empty: from_arrays([make_recording(0)], empty))  # imports, first-time costs
    process, peak = psutil.Process(), 0.0
    before = process.memory_info().rss / 2**20

    def stream() -> Any:
        nonlocal peak
        for number in range(recordings):
            yield make_recording(number, 16), "token"
            peak = max(peak, process.memory_info().rss / 2**20 - before)

    with tempfile.TemporaryDirectory(prefix="upvla-bench-") as folder:
        stage(dataset_root(open_store(folder), "bench"), stream())
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=180)
    parser.add_argument("--rounds", type=int, default=8)
    options = parse(parser, has_table=False)
    episodes = [make_recording(number) for number in range(options.recordings)]
    timed(lambda empty: from_arrays(episodes[:1], empty))  # imports, first-time costs
    with tempfile.TemporaryDirectory(prefix="upvla-bench-raw-") as folder:
        raw = Path(folder)
        write_calvin(raw, episodes[:4])
        sides: dict[str, Callable[[Path], Any]] = {
            "encode": lambda _: encode_only(episodes),
            "arrays": lambda empty: from_arrays(episodes, empty),
            "inflate": lambda _: inflate_and_encode(raw),
            "npz": lambda empty: from_npz(raw, empty),
        }
        rows = [{name: timed(side) for name, side in sides.items()} for _ in range(options.rounds)]
    frames, raw_frames = sum(map(len, episodes)), sum(map(len, episodes[:4]))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        grown = dict(zip(SIZES, fresh.map(memory_mb, SIZES), strict=True))
    result = {
        "ratio_from_arrays": round(statistics.median(row["encode"].elapsed / row["arrays"].elapsed for row in rows), 3),
        "ratio_from_npz": round(statistics.median(row["inflate"].elapsed / row["npz"].elapsed for row in rows), 3),
        "cpu_ratio_from_arrays": round(statistics.median(row["encode"].cpu / row["arrays"].cpu for row in rows), 3),
        "cpu_ratio_from_npz": round(statistics.median(row["inflate"].cpu / row["npz"].cpu for row in rows), 3),
        "steps_per_s_from_arrays": round(frames / statistics.median(row["arrays"].elapsed for row in rows), 1),
        "steps_per_s_from_npz": round(raw_frames / statistics.median(row["npz"].elapsed for row in rows), 1),
        "rss_growth_mb_by_recordings": {recordings: round(mb, 1) for recordings, mb in grown.items()},
    }
    give(options, result)


if __name__ == "__main__":
    main()
