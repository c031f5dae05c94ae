from __future__ import annotations

import pickle
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import Table
from pyarrow.parquet import ParquetFile

from tests.data.test_mixture import mixture
from tests.data.test_table import make_episode, staged_of
from upvla.data.commit import commit
from upvla.data.loader import Loader, _Memory
from upvla.data.mixture import Mixture, MixtureConfig, open_mixture
from upvla.data.rowgroups import RowGroupPool
from upvla.data.samples import SampleReader
from upvla.data.shards import Layout
from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, Corrupt
from upvla.images import Resize, encode_jpeg
from upvla.store import Store, open_store
from upvla.types import Sample


class Row:
    """A batch that remembers which samples it was made of."""

    def __init__(self, samples: Sequence[Sample]):
        self.keys = [(sample.position, sample.text, sample.turns) for sample in samples]
        self.pixels = sum(int(frame.sum()) for sample in samples for frame in sample.images.values())


def _loader(
    dataset: Dataset, world_size: int = 1, rank: int = 0, micro_batch: int = 4, lanes: int = 16, **options: int
) -> Loader[Row]:
    found = mixture(dataset, 3, 1, lanes=lanes)
    reader = SampleReader(found, chunk=5, cameras=["static"], resize=Resize(size=16))
    return Loader(found, reader, Row, rank=rank, world_size=world_size, micro_batch=micro_batch, **options)


def _take(loader: Loader[Row], steps: int) -> list[list[list[tuple[object, ...]]]]:
    with loader:
        return [[row.keys for row in next(loader)] for _ in range(steps)]


def test_the_global_batches_do_not_depend_on_world_size_or_threads(dataset: Dataset) -> None:
    expected = [sorted(key for row in step for key in row) for step in _take(_loader(dataset, micro_batch=16), 4)]
    assert [len(step) for step in expected] == [16] * 4
    assert [key[0] for step in expected for key in step] == list(range(64))
    for world_size, micro_batch, threads in ((1, 4, 3), (2, 8, 1), (4, 2, 2), (8, 1, 2), (16, 1, 1)):
        ranks = [
            _take(_loader(dataset, world_size, rank, micro_batch, threads=threads), 4) for rank in range(world_size)
        ]
        assert all(len(row) == micro_batch for steps in ranks for step in steps for row in step)
        merged = [sorted(key for steps in ranks for row in steps[k] for key in row) for k in range(4)]
        assert merged == expected


def test_resuming_needs_one_integer_and_may_change_the_world(dataset: Dataset) -> None:
    whole = _take(_loader(dataset), 6)
    loader = _loader(dataset)
    with loader:
        before = [[row.keys for row in next(loader)] for _ in range(2)]
        state = loader.state_dict()
    assert state == {"step": 2}  # two were consumed, however many were prefetched
    resumed = _loader(dataset)
    with resumed:
        next(resumed)
        resumed.load_state_dict(state)
        after = [[row.keys for row in next(resumed)] for _ in range(4)]
    assert before + after == whole
    halves = [_take(_loader(dataset, 2, rank, start_step=2), 4) for rank in range(2)]
    for k in range(4):
        assert sorted(key for half in halves for row in half[k] for key in row) == sorted(
            key for row in whole[k + 2] for key in row
        )


def test_poisoned_global_generators_change_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a global random generator was used")

    expected = _take(_loader(dataset), 3)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    for module, names in ((np.random, ("rand", "randint", "permutation", "shuffle", "choice", "default_rng")),
                          (random, ("random", "randint", "shuffle", "choice", "sample", "getrandbits"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    assert _take(_loader(dataset), 3) == expected


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """120 recordings of 12 to 18 steps, a row group of some 70 kB each."""
    store = open_store(str(tmp_path_factory.mktemp("recordings")))
    episodes = [make_episode(number, 12 + number % 7, size=48) for number in range(120)]
    staged = staged_of(store, episodes, Layout(row_group_bytes=1))
    commit(store, "d", [staged], validation_fraction=0.0, options={})
    return store


@pytest.mark.parametrize(("pool_mb", "world_size"), [(1, 1), (1, 4), (64, 1)])
def test_each_row_group_is_read_once_whatever_the_pool(
    recordings: Store, monkeypatch: pytest.MonkeyPatch, pool_mb: int, world_size: int
) -> None:
    """As training opens and reads a mixture. With `pool_mb` 1 less than half of the row groups are held."""
    reads: Counter[tuple[str, int]] = Counter()

    def counted(pool: RowGroupPool, file: ParquetFile, key: str, group: int, columns: tuple[str, ...]) -> Table:
        reads[key, group] += 1
        return original(pool, file, key, group, columns)

    original = RowGroupPool._read
    monkeypatch.setattr(RowGroupPool, "_read", counted)
    source = {"dataset": "d", "kind": "robot", "weight": 1}
    config = MixtureConfig.model_validate({"sources": [source], "global_batch": 16, "pool_mb": pool_mb})
    found = open_mixture(recordings, config.plan(recordings), world_size)
    reader = SampleReader(found, chunk=5, cameras=["static"], resize=Resize(size=16))
    with Loader(found, reader, Row, rank=0, world_size=world_size, micro_batch=4) as loader:
        for _ in range(found.sizes[0] // 16 - 2):  # what is fetched ahead is not of the next epoch
            next(loader)
    assert len(reads) > 100 / world_size and set(reads.values()) == {1}
    dataset = found.datasets["d"]
    stored = sum(shard.num_bytes for shard in dataset.manifest.shards)
    assert pool_mb == 64 or dataset._rows._bytes < 0.45 * stored


def test_worlds_that_do_not_fit_are_refused(dataset: Dataset) -> None:
    for world_size, micro_batch in ((3, 1), (2, 3), (32, 1)):
        with pytest.raises(ConfigError, match="must divide it"):
            _loader(dataset, world_size, micro_batch=micro_batch)
    with pytest.raises(ConfigError, match=r"8 ranks does not divide the mixture's 4 lanes; use one of \[1, 2, 4\]"):
        _loader(dataset, 8, micro_batch=2, lanes=4)  # 16 rows could be dealt to 8 ranks
    with pytest.raises(ConfigError, match="rank 2 of a world of 2"):
        _loader(dataset, 2, rank=2)


def test_work_ahead_is_bounded_and_waiting_is_counted(dataset: Dataset) -> None:
    loader = _loader(dataset, prefetch_steps=1)
    with loader:
        for _ in range(3):
            next(loader)
            assert len(loader._ahead) <= 2
        assert loader.data_wait_s > 0
        names = [thread.name for thread in threading.enumerate()]
        assert any(name.startswith("upvla-loader") for name in names)
    assert not any(thread.name.startswith("upvla-loader") for thread in threading.enumerate())


def test_an_unreadable_shard_raises_where_it_is_met(dataset: Dataset, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset.store.url, copy)
    store = open_store(str(copy))
    broken = Dataset(store, dataset.manifest)
    shard = copy / "datasets" / "table" / dataset.manifest.shards[0].key
    data = bytearray(shard.read_bytes())
    half = len(data) // 2
    data[half : half + 4] = bytes(byte ^ 0xFF for byte in data[half : half + 4])
    shard.write_bytes(data)
    with pytest.raises(Corrupt, match=dataset.manifest.shards[0].key), _loader(broken) as loader:
        for _ in range(40):
            next(loader)


def test_datasets_travel_to_workers(dataset: Dataset) -> None:
    there = pickle.loads(pickle.dumps(dataset))
    assert _take(_loader(there), 2) == _take(_loader(dataset), 2)


def test_a_picture_that_does_not_decode_is_named_and_nothing_takes_its_place(tmp_path: Path) -> None:
    episodes = [make_episode(n) for n in range(4)]
    frames = [encode_jpeg(frame) for frame in np.asarray(episodes[2].images["static"])]
    frames[5] = frames[5][:20] + b"not a picture" * 9  # damaged after its check: it is staged without one
    episodes[2] = replace(episodes[2], images={"static": frames})
    store = open_store(str(tmp_path))
    commit(store, "d", [staged_of(store, episodes)], validation_fraction=0.0, options={})
    settings = {"sources": [{"dataset": "d", "kind": "robot", "weight": 1}], "global_batch": 8}
    found = Mixture(
        MixtureConfig.model_validate(settings).plan(store), {"d": Dataset(store, load_manifest(store, "d"))}
    )
    reader = SampleReader(found, chunk=3, cameras=["static"], resize=Resize(size=16))
    with Loader(found, reader, Row, rank=0, world_size=1, micro_batch=4) as loader:
        steps: list[int] = []
        message = r"sample \d+ \(d@1, recording key-2, step 5, data/.*unreadable_image.*upvla data remove"
        with pytest.raises(Corrupt, match=message):
            for _ in range(40):
                steps.append(loader.step)
                next(loader)
        assert steps == list(range(len(steps)))  # none before it is missing
        with pytest.raises(Corrupt, match="recording key-2, step 5"):  # nor is it skipped the next time
            loader.load_state_dict({"step": steps[-1]})
            next(loader)


def test_memory_of_batches_is_used_again_when_nobody_has_it() -> None:
    memory = _Memory()
    first = memory.take(100)
    second = memory.take(80)
    assert not np.shares_memory(first, second)
    place = first.ctypes.data
    part = first[3:5]
    del first
    assert memory.take(90).ctypes.data != place  # a part of it is still read
    del part
    assert memory.take(90).ctypes.data == place
