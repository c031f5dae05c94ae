"""How near the loader comes to what decoding and resizing cost anyway.

    python benchmarks/loader.py [--recordings 60] [--batches 12] [--rounds 4] [--epochs 2] [--pool-mb 256] [--json FILE]

Unit of work: a training row: two frames of a step as 256x256 arrays (cv2 linear), ten actions, the instruction.
The limit decodes and resizes the same frames from memory into one batch again and again, in one process and in two at
once. Sides take turns within a round and ratios are of one round, so the machine's noise cancels; printed are medians.
`npz_per_frame` reads the same recordings as the published code does: np.load of a compressed npz a frame, PIL bicubic.
`--recordings 1200 --epochs 5` gives a set of 4 GB for the memory figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _recordings import make_recording, s3_bucket
from PIL import Image

from upvla.data.commit import commit
from upvla.data.loader import Loader
from upvla.data.mixture import Mixture, MixtureConfig
from upvla.data.order import Groups, Order
from upvla.data.rowgroups import RowGroupPool
from upvla.data.samples import Collator, SampleReader
from upvla.data.shards import stage
from upvla.data.table import Dataset
from upvla.data.versions import dataset_root, load_manifest
from upvla.images import Resize, decode_image, resize, use_one_thread
from upvla.store import Store, open_store

BATCH, CAMERAS, SIZE = 64, ("static", "gripper"), Resize(size=256, filter="linear")


def build(store: Store, recordings: int) -> None:
    """Commit in portions, so that memory holds one recording."""
    staged = stage(dataset_root(store, "bench"), ((make_recording(n), "token") for n in range(recordings)))
    commit(store, "bench", [staged], validation_fraction=0.0, options={"format": "synthetic"})


def open_loader(store: Store, threads: int, pool_mb: int) -> Loader[Any]:
    dataset = Dataset(store, load_manifest(store, "bench"), pool_mb=2 * pool_mb)
    source = {"dataset": "bench", "kind": "robot", "weight": 1}
    config = MixtureConfig.model_validate({"sources": [source], "global_batch": BATCH, "pool_mb": pool_mb})
    mixture = Mixture(config.plan(store), {"bench": dataset})
    reader = SampleReader(mixture, chunk=10, cameras=CAMERAS, resize=SIZE)
    collate = Collator(reader.shape, lambda text: list(text.encode()), lambda turns: ([], []), 0)
    micro = BATCH // max(2, threads)
    return Loader(mixture, reader, collate, rank=0, world_size=1, micro_batch=micro, threads=threads)


def rate_of_loader(loader: Loader[Any], batches: int) -> float:
    next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * BATCH / (time.perf_counter() - began)


def rate_of_limit(frames: Sequence[Sequence[bytes]], batches: int) -> float:
    use_one_thread()
    batch = np.empty((BATCH, len(CAMERAS), SIZE.size, SIZE.size, 3), np.uint8)
    began = time.perf_counter()
    for number in range(batches):
        for row in range(BATCH):
            for view, encoded in enumerate(frames[(number * BATCH + row) % len(frames)]):
                resize(decode_image(encoded), SIZE, batch[row, view])
    return batches * BATCH / (time.perf_counter() - began)


def _limit_in_child(frames: Sequence[Sequence[bytes]], batches: int, ready: Any, rates: Any) -> None:
    ready.wait()
    rates.put(rate_of_limit(frames, batches))


def rate_of_two_limits(frames: Sequence[Sequence[bytes]], batches: int) -> float:
    context = multiprocessing.get_context("fork")
    ready, rates = context.Barrier(2), context.Queue()
    children = [context.Process(target=_limit_in_child, args=(frames, batches, ready, rates)) for _ in range(2)]
    for child in children:
        child.start()
    total = sum(float(rates.get()) for _ in children)
    for child in children:
        child.join()
    return total


def write_npz(folder: Path, recordings: int) -> list[Path]:
    paths = []
    for number in range(recordings):
        episode = make_recording(number)
        for step in range(len(episode)):
            paths.append(folder / f"episode_{len(paths):07d}.npz")
            pictures = {f"rgb_{camera}": episode.images[camera][step] for camera in CAMERAS}
            np.savez_compressed(paths[-1], rel_actions=episode.actions[step], robot_obs=episode.state[step], **pictures)
    return paths


def rate_of_npz(paths: Sequence[Path], rows: int) -> float:
    rng = np.random.Generator(np.random.Philox(1))
    began = time.perf_counter()
    for start in rng.integers(0, len(paths) - 10, rows).tolist():
        for path in paths[start : start + 10]:  # an action lies in its own frame's file
            np.load(path)["rel_actions"]
        frame = np.load(paths[start])
        for camera in CAMERAS:
            np.asarray(Image.fromarray(frame[f"rgb_{camera}"]).resize((256, 256), Image.Resampling.BICUBIC))
    return rows / (time.perf_counter() - began)


def memory_over_epochs(store: Store, epochs: int, pool_mb: int) -> dict[str, Any]:
    """RSS after each epoch, how often a row group was read, and how many recordings meet in a batch."""
    reads: Counter[tuple[Any, ...]] = Counter()
    original = RowGroupPool._read

    def counted(pool: RowGroupPool, key: str, group: int, columns: tuple[str, ...]) -> Any:
        reads[(key, group)] += "image_static" in columns
        return original(pool, key, group, columns)

    RowGroupPool._read = counted  # type: ignore[method-assign]
    rss, distinct, per_epoch = [], [], []
    process = psutil.Process()
    with open_loader(store, 2, pool_mb) as loader:
        mixture: Mixture = loader._mixture
        steps = mixture.sizes[0] // BATCH
        for epoch in range(epochs):
            for number in range(steps):
                next(loader)
                if number % 10 == 0:
                    positions = range((epoch * steps + number) * BATCH, (epoch * steps + number + 1) * BATCH)
                    distinct.append(len({mixture.sample_at(p).episode for p in positions}))
            rss.append(process.memory_info().rss / 2**20)
            per_epoch.append(sum(reads.values()))
        groups = sum(
            len(store.sub("datasets/bench").parquet(s.key).metadata.to_dict()["row_groups"])
            for s in mixture.datasets["bench"].manifest.shards
        )
    RowGroupPool._read = original  # type: ignore[method-assign]
    return {
        "rss_mb": round(max(rss), 1),
        "rss_mb_by_epoch": [round(value, 1) for value in rss],
        "row_group_reads_an_epoch": round(per_epoch[-1] / len(per_epoch) / groups, 3),
        "distinct_recordings_in_a_batch": round(statistics.mean(distinct), 1),
    }


def plan(groups: int) -> dict[str, float]:
    """Seconds and MB until the first batch of an order over so many row groups of 64 windows, on 64 lanes."""

    def first_batch() -> list[int]:
        order = Order(Groups(groups, lambda edges: edges * 64), seed=0, name="plan", lanes=64, spread=4.0)
        return [order.number(lane, 0) for lane in range(64)]

    began = time.perf_counter()
    batch = first_batch()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    assert first_batch() == batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"row_groups": groups, "first_batch_s": round(seconds, 3), "peak_mb": round(peak / 2**20, 1)}


def stored_frames(store: Store, limit: int = 1024) -> list[tuple[bytes, ...]]:
    dataset = Dataset(store, load_manifest(store, "bench"))
    rows: list[tuple[bytes, ...]] = []
    for i, episode in enumerate(dataset.episodes):
        found = dataset.read(i, range(episode.length), [f"image_{camera}" for camera in CAMERAS])
        rows += list(zip(*(found[f"image_{camera}"] for camera in CAMERAS), strict=True))
        if len(rows) >= limit:
            break
    return rows


def rounds(sides: dict[str, Callable[[], float]], count: int) -> Iterator[dict[str, float]]:
    for _ in range(count):
        yield {name: side() for name, side in sides.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("recordings", 60), ("batches", 12), ("rounds", 4), ("epochs", 2), ("pool-mb", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-s3", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upvla-bench-") as folder:
        store = open_store(f"{folder}/store")
        build(store, options.recordings)
        frames = stored_frames(store)
        paths = write_npz(Path(folder), min(options.recordings, 4))
        batches, sides = options.batches, {}
        one, two = open_loader(store, 1, options.pool_mb), open_loader(store, 2, options.pool_mb)
        sides["limit"] = lambda: rate_of_limit(frames, batches)
        sides["one_thread"] = lambda: rate_of_loader(one, batches)
        sides["limit_two_cores"] = lambda: rate_of_two_limits(frames, batches)
        sides["two_threads"] = lambda: rate_of_loader(two, batches)
        sides["npz"] = lambda: rate_of_npz(paths, 2 * BATCH)
        found = list(rounds(sides, options.rounds))
        one.close()
        two.close()

        def ratio(a: str, b: str, of: list[dict[str, float]]) -> float:
            return round(statistics.median(row[a] / row[b] for row in of), 3)

        result: dict[str, Any] = {
            "ratio_one_process": ratio("one_thread", "limit", found),
            "ratio_two_threads": ratio("two_threads", "limit_two_cores", found),
            "ratio_vs_npz_per_frame": ratio("one_thread", "npz", found),
            "windows_per_s": {name: round(statistics.median(row[name] for row in found), 1) for name in sides},
            "plans": [plan(17_870), plan(16_000_000)],
            **memory_over_epochs(store, options.epochs, options.pool_mb),
        }
        if not options.no_s3:
            with s3_bucket() as url:
                remote = open_store(url)
                build(remote, options.recordings)
                near, far = open_loader(store, 1, options.pool_mb), open_loader(remote, 1, options.pool_mb)
                pair = {"local": lambda: rate_of_loader(near, batches), "s3": lambda: rate_of_loader(far, batches)}
                result["ratio_s3_pool"] = ratio("s3", "local", list(rounds(pair, options.rounds)))
                near.close()
                far.close()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
