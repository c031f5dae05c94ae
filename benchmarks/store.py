"""What the object store costs: reading row groups, committing versions, committers who race.

    python benchmarks/store.py [--writers 8] [--commits 25] [--reads 100] [--recordings 10000] [--json [FILE]]

Against an S3 server of its own on loopback. `ratio_row_group`: our open handle with a cached footer against the faster
of boto3 and obstore, which get the row group's bytes in one range and parse them into the same table;
`ratio_over_bytes`: against that client's range alone, with nothing parsed. Committers are processes; all their commits
must be in the end.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _figures import give, parse
from _recordings import make_recording, s3_bucket
from obstore.store import S3Store

from upvla.data.commit import commit
from upvla.data.shards import Layout, stage
from upvla.data.versions import dataset_root, list_versions, load_manifest
from upvla.images import encode_jpeg
from upvla.store import Store, open_store
from upvla.types import Episode

OPTIONS = {"format": "synthetic"}


def commit_one(store: Store, dataset: str, number: int) -> float:
    """Seconds of the commit alone; staging is somebody else's figure."""
    staged = stage(dataset_root(store, dataset), [(make_recording(number, 2), "token")])
    began = time.perf_counter()
    commit(store, dataset, [staged], validation_fraction=0.0, options=OPTIONS)
    return time.perf_counter() - began


def many(store: Store, recordings: int) -> float:
    """Milliseconds, p50, of adding one recording to so many, all of which show the same tiny picture."""
    first, frame = make_recording(0), encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    root, images = dataset_root(store, "many"), dict.fromkeys(first.images, [frame] * len(first))

    def cheap(number: int) -> tuple[Episode, str]:
        values = np.random.Generator(np.random.Philox(number)).normal(0, 0.3, (len(first), 15)).astype(np.float32)
        return replace(first, id=f"{number}", images=images, state=values, actions=np.sin(values[:, :7])), "token"

    def add(numbers: Iterable[int]) -> float:
        staged = stage(root, map(cheap, numbers))
        began = time.perf_counter()
        commit(store, "many", [staged], validation_fraction=0.1, options=OPTIONS)
        return time.perf_counter() - began

    add(range(recordings))
    return 1000 * statistics.median(add([recordings + n]) for n in range(20))


def write(url: str, writer: int, commits: int, start: Any, times: Any) -> None:
    store = open_store(url)
    start.wait()
    times.put([commit_one(store, "race", 10_000 * writer + i) for i in range(commits)])


def race(url: str, writers: int, commits: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    start, times = context.Barrier(writers), context.Queue()
    processes = [context.Process(target=write, args=(url, w, commits, start, times)) for w in range(writers)]
    for process in processes:
        process.start()
    spent = sorted(second for _ in processes for second in times.get())
    for process in processes:
        process.join()
    store = open_store(url)
    newest, versions = load_manifest(store, "race"), list_versions(store, "race")
    parents = [load_manifest(store, "race", version).parent for version in versions]
    return {
        "commits": len(versions),
        "lost": writers * commits - newest.num_episodes,
        "linear": parents == [None, *versions[:-1]],
        "race_commit_p50_ms": round(1000 * statistics.median(spent), 1),
        "race_commit_p95_ms": round(1000 * spent[int(0.95 * len(spent))], 1),
    }


def row_groups(store: Store, url: str, reads: int) -> dict[str, Any]:
    """A row group of about 1 MB into a table: by our open file, and by either client's range and a parser; in turns."""
    layout = Layout(shard_bytes=64 << 20)
    stage(dataset_root(store, "rows"), ((make_recording(n), "token") for n in range(8)), layout=layout)
    (key,) = store.list("datasets/rows/data/")
    file = store.parquet(key)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    endpoint, name = os.environ["AWS_ENDPOINT_URL"], f"{prefix}/{key}"
    boto = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    rust = S3Store(bucket, endpoint=endpoint, region="us-east-1", client_options={"allow_http": True})
    clients: dict[str, Callable[[int, int], Any]] = {
        "boto3": lambda a, b: boto.get_object(Bucket=bucket, Key=name, Range=f"bytes={a}-{b - 1}")["Body"].read(),
        "obstore": lambda a, b: memoryview(rust.get_range(name, start=a, end=b)),
    }
    sparse = mmap.mmap(-1, store.size(key))  # as the whole object, of which only the range is there
    parsed = pq.ParquetFile(pa.BufferReader(sparse), metadata=file.metadata, page_checksum_verification=True)
    spent: dict[str, list[float]] = {side: [] for side in ("ours", *clients, *(f"{side}_bytes" for side in clients))}
    for number in range(reads):
        group = number % file.metadata.num_row_groups
        about = file.metadata.row_group(group)
        columns = [about.column(i) for i in range(about.num_columns)]
        first = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        last = first + sum(c.total_compressed_size for c in columns)
        began = time.perf_counter()
        expected = file.read_row_group(group, use_threads=False)
        spent["ours"].append(time.perf_counter() - began)
        for side, get in clients.items():
            began = time.perf_counter()
            found = get(first, last)
            spent[f"{side}_bytes"].append(time.perf_counter() - began)
            sparse[first:last] = found
            table = parsed.read_row_group(group, use_threads=False)
            spent[side].append(time.perf_counter() - began)
            assert number >= file.metadata.num_row_groups or table.equals(expected)
            sparse[first:last] = bytes(last - first)
    middle = {side: statistics.median(values) for side, values in spent.items()}
    fastest = min(clients, key=lambda side: middle[side])
    return {
        "row_group_ms": {side: round(1000 * value, 2) for side, value in middle.items()},
        "fastest_client": fastest,
        "ratio_row_group": round(statistics.median(np.divide(spent["ours"], spent[fastest])), 3),
        "ratio_over_bytes": round(statistics.median(np.divide(spent["ours"], spent[f"{fastest}_bytes"])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("writers", 8), ("commits", 25), ("reads", 100), ("recordings", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parse(parser, has_table=False)
    with s3_bucket() as url:
        store = open_store(url)
        commit_one(store, "alone", 0)
        alone = [commit_one(store, "alone", n) for n in range(1, 21)]
        result = {
            "commit_p50_ms": round(1000 * statistics.median(alone), 2),
            "commit_onto_many_p50_ms": round(many(store, options.recordings), 1),
            **row_groups(store, url, options.reads),
            **race(url, options.writers, options.commits),
        }
    give(options, result)


if __name__ == "__main__":
    main()
