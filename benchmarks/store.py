"""What the object store costs: reading row groups, committing versions, committers who race.

    python benchmarks/store.py [--writers 8] [--commits 25] [--reads 100] [--json [FILE]]

Against an S3 server of its own on loopback. `ratio_row_group`: our open handle with a cached footer against boto3,
which gets the same bytes and parses nothing. Committers are processes; all their commits must be in the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from typing import Any

import boto3
from _figures import give, parse
from _recordings import make_recording, s3_bucket

from upvla.data.commit import commit
from upvla.data.shards import Layout, stage
from upvla.data.versions import dataset_root, list_versions, load_manifest
from upvla.store import Store, open_store

OPTIONS = {"format": "synthetic"}


def commit_one(store: Store, dataset: str, number: int) -> float:
    """Seconds of the commit alone; staging is somebody else's figure."""
    staged = stage(dataset_root(store, dataset), [(make_recording(number, 2), "token")])
    began = time.perf_counter()
    commit(store, dataset, [staged], validation_fraction=0.0, options=OPTIONS)
    return time.perf_counter() - began


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
    """A row group of about 1 MB: parsed by us, and its bytes by the plain client; in turns."""
    layout = Layout(shard_bytes=64 << 20)
    stage(dataset_root(store, "rows"), ((make_recording(n), "token") for n in range(8)), layout=layout)
    (key,) = store.list("datasets/rows/data/")
    file = store.parquet(key)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    ours, theirs = [], []
    for number in range(reads):
        group = number % file.metadata.num_row_groups
        about = file.metadata.row_group(group)
        columns = [about.column(i) for i in range(about.num_columns)]
        first = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        last = first + sum(c.total_compressed_size for c in columns)
        began = time.perf_counter()
        file.read_row_group(group, use_threads=False)
        between = time.perf_counter()
        found = client.get_object(Bucket=bucket, Key=f"{prefix}/{key}", Range=f"bytes={first}-{last - 1}")[
            "Body"
        ].read()
        theirs.append(time.perf_counter() - between)
        ours.append(between - began)
        assert len(found) == last - first
    return {
        "row_group_ms": round(1000 * statistics.median(ours), 2),
        "boto3_range_ms": round(1000 * statistics.median(theirs), 2),
        "ratio_row_group": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("writers", 8), ("commits", 25), ("reads", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parse(parser, has_table=False)
    with s3_bucket() as url:
        store = open_store(url)
        commit_one(store, "alone", 0)
        alone = [commit_one(store, "alone", n) for n in range(1, 21)]
        result = {
            "commit_p50_ms": round(1000 * statistics.median(alone), 2),
            **row_groups(store, url, options.reads),
            **race(url, options.writers, options.commits),
        }
    give(options, result)


if __name__ == "__main__":
    main()
