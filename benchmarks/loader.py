"""How near the loader comes to what decoding and resizing cost anyway.

    python benchmarks/loader.py [--recordings 60] [--batches 12] [--rounds 8] [--epochs 2] [--pool-mb 56]
        [--json [FILE]]

Unit of work: a training row: two frames of a step as 256x256 arrays (cv2 linear), ten actions, the instruction.
The limit decodes and resizes the frames of the loader's first 16 batches from memory, in its order, into one batch
again and again, in one process and in two at once. `limit_in_stored_order` takes as many frames as they are recorded:
right after its neighbour, which looks much the same, a picture decodes 7 to 8 % faster, also where its bytes are in the
cache; no batch of many recordings can have that. Sides take turns within a round and ratios are of one round, so the
machine's noise cancels; printed are medians. All of it has the memory allocator's settings of a training job, in which
the loader runs.
`orders` begin an order alone, over row groups that nothing holds; `mixture_of_1000_shards` opens a stored dataset of
1.1 million windows, which is reading a thousand indexes, and begins its order.
The memory figures are of a process of its own; over more than 4 GB: `--only-memory --recordings 4000 --epochs 5`.

`npz_per_frame` reads the same recordings as UP-VLA's published code does, in one process. There
(`DataProvider.get_raw_items` in `training/future_view_prediction_w_action_dataset.py`) a row is the frame at t and the
one ten steps on, or the span's last; of each frame, one `np.load` and one inflated array a camera; every picture goes
through `image_transform` of `training/utils.py`: PIL bicubic, centre crop, float tensor, normalised. Actions and
instructions lie in memory (`load_preprocessed_data`), and the other arrays of a frame's file are never touched. Kinder
than the original: it resizes to 256 where that resizes to 512, finds its frame without a search over all episodes, and
sends no batch through a worker's pipe. So it reads four pictures a row where our loader reads two: what the later frame
is wanted for, its image codes, comes from a table that was made once. `npz_current_frame_only` leaves that out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from _allocator import as_in_a_training_job
from _figures import give, parse
from _recordings import make_recording, s3_bucket
from PIL import Image

from upvla.data.commit import commit
from upvla.data.loader import Loader
from upvla.data.mixture import Mixture, MixtureConfig, make_plan, open_mixture
from upvla.data.order import Groups, Order
from upvla.data.rowgroups import RowGroupPool
from upvla.data.samples import Collator, SampleReader
from upvla.data.shards import Layout, stage
from upvla.data.table import Dataset
from upvla.data.versions import dataset_root, load_manifest
from upvla.images import Resize, decode_image, encode_jpeg, resize, use_one_thread
from upvla.store import Store, open_store
from upvla.types import Episode, MixtureSource, Span

BATCH, CHUNK, CAMERAS, SIZE = 64, 10, ("static", "gripper"), Resize(size=256, filter="linear")


def build(store: Store, recordings: int) -> None:
    staged = stage(dataset_root(store, "bench"), ((recording, "token") for recording in unlike(recordings)))
    commit(store, "bench", [staged], validation_fraction=0.0, options={"format": "synthetic"})


def unlike(recordings: int) -> Iterator[Episode]:
    """So many recordings (8192 at most), of which 128 are drawn; the rest are these again with their frames in another
    order, which saves the time of drawing and encoding them, and none of reading them."""
    drawn: list[Episode] = []
    for number in range(recordings):
        if number < 128:
            drawn.append(encoded(make_recording(number)))
        turn, pattern = number // 128, drawn[number % 128]
        images = {camera: [*frames[turn:], *frames[:turn]] for camera, frames in pattern.images.items()}
        yield replace(pattern, id=f"recording-{number:06d}", images=images)


def encoded(episode: Episode) -> Episode:
    images = {camera: [encode_jpeg(frame) for frame in np.asarray(episode.images[camera])] for camera in CAMERAS}
    return replace(episode, images=images)


def open_loader(store: Store, threads: int, pool_mb: int) -> Loader[Any]:
    source = {"dataset": "bench", "kind": "robot", "weight": 1}
    config = MixtureConfig.model_validate({"sources": [source], "global_batch": BATCH, "pool_mb": pool_mb})
    mixture = open_mixture(store, config.plan(store))
    reader = SampleReader(mixture, chunk=CHUNK, cameras=CAMERAS, resize=SIZE)
    collate = Collator(reader.shape, lambda text: list(text.encode()), lambda turns: ([], []), 0)
    micro = BATCH // max(2, threads)
    return Loader(mixture, reader, collate, rank=0, world_size=1, micro_batch=micro, threads=threads)


def rate_of_loader(loader: Loader[Any], batches: int) -> float:
    for _ in range(3):  # it has decoded ahead while the other sides had their turns
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


class Frames(NamedTuple):
    """A recording as CALVIN keeps it: a compressed npz a frame; and what the published code holds in memory of it."""

    paths: list[Path]
    actions: list[list[float]]
    text: str


def write_npz(folder: Path, recordings: int) -> list[Frames]:
    written: list[Frames] = []
    for episode in map(make_recording, range(recordings)):
        first = sum(len(frames.paths) for frames in written)
        paths = [folder / f"episode_{first + step:07d}.npz" for step in range(len(episode))]
        for step, path in enumerate(paths):
            pictures = {f"rgb_{camera}": episode.images[camera][step] for camera in CAMERAS}
            numbers = {"rel_actions": episode.actions[step], "robot_obs": episode.state[step]}
            np.savez_compressed(path, actions=episode.actions[step], scene_obs=np.zeros(24), **numbers, **pictures)
        written.append(Frames(paths, episode.actions.tolist(), episode.spans[0].text))
    return written


def published_picture(path: Path, camera: str) -> np.ndarray:
    """f32[3,H,W] in [-1,1]. Our frames are square: nothing is left to crop."""
    with np.load(path) as frame:
        picture = Image.fromarray(frame[f"rgb_{camera}"]).resize((SIZE.size, SIZE.size), Image.Resampling.BICUBIC)
    values = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1), np.float32)
    values /= 255
    values -= 0.5
    values /= 0.5
    return values


def published_row(frames: Frames, step: int, *, later: bool) -> list[np.ndarray]:
    """The pictures of a row and f32[10,7], filled up by standing still with the last gripper value."""
    future = min(step + CHUNK, len(frames.paths) - 1)
    pictures = [published_picture(frames.paths[t], camera) for t in (step, future)[: 1 + later] for camera in CAMERAS]
    moves = np.array(frames.actions[step : max(future, step + 1)], np.float32)
    padding = np.zeros((CHUNK - len(moves), moves.shape[1]), np.float32)
    padding[:, -1] = moves[-1, -1]
    return [*pictures, np.concatenate([moves, padding])]


def rate_of_npz(recordings: Sequence[Frames], rows: int, *, later: bool) -> float:
    places = [(frames, step) for frames in recordings for step in range(len(frames.paths))]
    drawn = np.random.Generator(np.random.Philox(1)).integers(0, len(places), (rows // BATCH, BATCH))
    began = time.perf_counter()
    for batch in drawn:
        read = [published_row(*places[place], later=later) for place in batch]
        for column in zip(*read, strict=True):
            np.stack(column)
    return drawn.size / (time.perf_counter() - began)


def memory_over_epochs(store: Store, epochs: int, pool_mb: int) -> dict[str, Any]:
    """RSS in each epoch, how often a row group was read, and how many recordings meet in a batch."""
    reads: Counter[tuple[Any, ...]] = Counter()
    original = RowGroupPool._read

    def counted(pool: RowGroupPool, file: Any, key: str, group: int, columns: tuple[str, ...]) -> Any:
        reads[(key, group)] += "image_static" in columns
        return original(pool, file, key, group, columns)

    RowGroupPool._read = counted  # type: ignore[method-assign]
    rss, distinct, per_epoch = [0.0] * epochs, [], []
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
                    rss[epoch] = max(rss[epoch], process.memory_info().rss / 2**20)
            per_epoch.append(sum(reads.values()))
            print(f"epoch {epoch + 1} of {epochs}: {rss[epoch]:.0f} MB at most", file=sys.stderr, flush=True)
        groups = sum(
            len(store.sub("datasets/bench").parquet(s.key).metadata.to_dict()["row_groups"])
            for s in mixture.datasets["bench"].manifest.shards
        )
    RowGroupPool._read = original  # type: ignore[method-assign]
    return {
        "stored_mb": sum(shard.num_bytes for shard in mixture.datasets["bench"].manifest.shards) >> 20,
        "rss_mb": round(max(rss), 1),
        "rss_mb_by_epoch": [round(value, 1) for value in rss],
        "row_group_reads_an_epoch": round(per_epoch[-1] / len(per_epoch) / groups, 3),
        "distinct_recordings_in_a_batch": round(statistics.mean(distinct), 1),
    }


def in_a_fresh_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a measurement leaves in memory is not the next one's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def build_scattered(store: Store, shards: int) -> None:
    """So many shards of one recording, its one small frame again and again: 1,100 windows in 20 row groups or so."""
    steps, drawn = 1100, make_recording(0)
    long = replace(
        drawn,
        timestamps=np.arange(steps) / 30,
        images=dict.fromkeys(CAMERAS, [encode_jpeg(np.full((16, 16, 3), 128, np.uint8))] * steps),
        state=np.resize(drawn.state, (steps, 15)),
        actions=np.resize(drawn.actions, (steps, 7)),
        spans=(Span(0, steps, "wait", "wait"),),
    )
    layout = Layout(row_group_bytes=1, max_row_group_bytes=80_000, shard_bytes=1)
    episodes = (replace(long, id=f"recording-{number:06d}", scene=str(number)) for number in range(shards))
    staged = stage(dataset_root(store, "scattered"), ((episode, "token") for episode in episodes), layout=layout)
    commit(store, "scattered", [staged], validation_fraction=0.0, options={"format": "synthetic"})


def opening(store: Store) -> dict[str, Any]:
    """Seconds from a plan to an open mixture, which reads every index, and from there to the references of its first
    batch, of which none is decoded."""
    content_id = load_manifest(store, "scattered").content_id
    plan = make_plan([MixtureSource("scattered", 1, content_id, "robot", 1.0)], 0, BATCH, lanes=BATCH)
    began = time.perf_counter()
    mixture = open_mixture(store, plan)
    opened = time.perf_counter()
    for position in range(BATCH):
        mixture.sample_at(position)
    return {
        "windows": mixture.sizes[0],
        "open_s": round(opened - began, 3),
        "first_batch_s": round(time.perf_counter() - opened, 3),
    }


def order(groups: int) -> dict[str, float]:
    """Seconds and MB until the first batch of an order over so many row groups of 64 windows, on 64 lanes: the order
    alone, as if a dataset of that size lay open."""

    def first_batch() -> list[int]:
        found = Order(Groups(groups, lambda edges: edges * 64), seed=0, name="plan", lanes=64, spread=4.0)
        return [found.number(lane, 0) for lane in range(64)]

    began = time.perf_counter()
    batch = first_batch()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    assert first_batch() == batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"row_groups": groups, "first_batch_s": round(seconds, 3), "peak_mb": round(peak / 2**20, 1)}


def drawn_frames(mixture: Mixture, rows: int = 1024) -> list[tuple[bytes, ...]]:
    """Of the first rows, as the loader draws them."""
    refs = [mixture.sample_at(position) for position in range(rows)]
    return [encoded_frames(mixture.datasets["bench"], ref.episode, [ref.step])[0] for ref in refs]


def stored_frames(dataset: Dataset, rows: int = 1024) -> list[tuple[bytes, ...]]:
    """Of so many rows, as they are recorded."""
    of_each = (encoded_frames(dataset, i, range(episode.length)) for i, episode in enumerate(dataset.episodes))
    return [*itertools.islice(itertools.chain.from_iterable(of_each), rows)]


def encoded_frames(dataset: Dataset, episode: int, steps: Sequence[int]) -> list[tuple[bytes, ...]]:
    found = dataset.read(episode, steps, [f"image_{camera}" for camera in CAMERAS])
    return list(zip(*(found[f"image_{camera}"] for camera in CAMERAS), strict=True))


def in_turns(sides: dict[str, Callable[[], float]], count: int) -> list[dict[str, float]]:
    return [{name: side() for name, side in sides.items()} for _ in range(count)]


def ratio(over: str, under: str, found: Sequence[dict[str, float]]) -> float:
    return round(statistics.median(row[over] / row[under] for row in found), 3)


def speeds(store: Store, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One thread and two against their limits, and one against the published loader."""
    raw, batches = write_npz(folder, min(options.recordings, 4)), options.batches
    with open_loader(store, 1, options.pool_mb) as one, open_loader(store, 2, options.pool_mb) as two:
        frames, recorded = drawn_frames(one._mixture), stored_frames(one._mixture.datasets["bench"])
        sides: dict[str, Callable[[], float]] = {
            "limit": lambda: rate_of_limit(frames, batches),
            "limit_in_stored_order": lambda: rate_of_limit(recorded, batches),
            "one_thread": lambda: rate_of_loader(one, batches),
            "limit_two_cores": lambda: rate_of_two_limits(frames, batches),
            "two_threads": lambda: rate_of_loader(two, batches),
            "npz": lambda: rate_of_npz(raw, 2 * BATCH, later=True),
            "npz_current_frame_only": lambda: rate_of_npz(raw, 2 * BATCH, later=False),
        }
        found = in_turns(sides, options.rounds)
    return {
        "ratio_one_process": ratio("one_thread", "limit", found),
        "ratio_one_process_to_stored_order": ratio("one_thread", "limit_in_stored_order", found),
        "ratio_two_threads": ratio("two_threads", "limit_two_cores", found),
        "ratio_vs_npz_per_frame": ratio("one_thread", "npz", found),
        "ratio_vs_npz_current_frame_only": ratio("one_thread", "npz_current_frame_only", found),
        "windows_per_s": {name: round(statistics.median(row[name] for row in found), 1) for name in sides},
    }


def speed_from_s3(store: Store, options: argparse.Namespace) -> dict[str, float]:
    with s3_bucket() as url:
        build(open_store(url), options.recordings)
        with open_loader(store, 1, options.pool_mb) as near, open_loader(open_store(url), 1, options.pool_mb) as far:
            pair = {"local": lambda: rate_of_loader(near, options.batches)}
            found = in_turns(pair | {"s3": lambda: rate_of_loader(far, options.batches)}, options.rounds)
    return {"ratio_s3_pool": ratio("s3", "local", found)}


def main() -> None:
    as_in_a_training_job()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("recordings", 60), ("batches", 12), ("rounds", 8), ("epochs", 2), ("pool-mb", 56)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only-memory", action="store_true")
    options = parse(parser, has_table=False)
    with tempfile.TemporaryDirectory(prefix="upvla-bench-") as folder:
        store = open_store(f"{folder}/store")
        build(store, options.recordings)
        result: dict[str, Any] = {}
        if not options.only_memory:
            result |= speeds(store, Path(folder), options) | speed_from_s3(store, options)
            result["orders"] = [order(17_870), order(16_000_000)]
            build_scattered(store, 1000)
            result["mixture_of_1000_shards"] = in_a_fresh_process(opening, store)
        result |= in_a_fresh_process(memory_over_epochs, store, options.epochs, options.pool_mb)
    give(options, result)


if __name__ == "__main__":
    main()
