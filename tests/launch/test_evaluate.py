from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.launch.conftest import RayHead
from upvla.errors import BadStep, JobFailed
from upvla.launch.evaluate import map_chains
from upvla.types import Chain, ChainRecord

pytestmark = pytest.mark.seam

CHAINS = [Chain("A", np.zeros(15), np.zeros(24), ("open_drawer",), seed) for seed in range(7)]
Work = Callable[[Sequence[tuple[int, Chain]]], list[ChainRecord]]


def record(index: int, chain: Chain) -> ChainRecord:
    return ChainRecord(index, chain.scene, chain.tasks, chain.seed % 2, (chain.seed,))


def dying(folder: Path, times: int) -> Work:
    """Work whose process dies on chain 4, the first `times` times."""

    def work(shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
        for index, _ in shard:
            (folder / f"run-{index}-{os.getpid()}").touch()
            deaths = len(list(folder.glob("death-*")))
            if index == 4 and deaths < times:
                (folder / f"death-{deaths}").touch()
                os._exit(11)
        return [record(index, chain) for index, chain in shard]

    return work


def test_records_come_back_in_order_though_a_process_dies(ray_head: RayHead, tmp_path: Path) -> None:
    kept: list[ChainRecord] = []
    found = map_chains(dying(tmp_path, 1), CHAINS, num_workers=2, shard_size=2, on_records=kept.extend)
    assert found == [record(i, chain) for i, chain in enumerate(CHAINS)]
    assert sorted(kept) == found
    assert len(list(tmp_path.glob("run-0-*"))) == 1, "the other shards were not run again"
    assert len(list(tmp_path.glob("run-4-*"))) == 2


def test_an_interrupted_evaluation_goes_on_where_it_was(ray_head: RayHead, tmp_path: Path) -> None:
    kept: dict[int, ChainRecord] = {}
    with pytest.raises(JobFailed, match=r"chains 4\.\.5: their process died"):
        map_chains(
            dying(tmp_path, 99),
            CHAINS,
            num_workers=1,
            shard_size=2,
            on_records=lambda records: kept.update({r.number: r for r in records}),
        )
    assert set(kept) == {0, 1, 2, 3}
    found = map_chains(dying(tmp_path, 0), CHAINS, num_workers=2, shard_size=2, done=kept)
    assert [r.number for r in found] == list(range(7))
    assert len(list(tmp_path.glob("run-0-*"))) == 1


def test_an_error_of_the_work_is_raised_as_it_is(ray_head: RayHead) -> None:
    def work(shard: Sequence[tuple[int, Chain]]) -> list[ChainRecord]:
        raise BadStep("the policy is broken")

    with pytest.raises(BadStep, match=r"^the policy is broken$"):
        map_chains(work, CHAINS, num_workers=1)
