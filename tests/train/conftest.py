from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.toy import Workers
from upvla.train.zero import import_deepspeed


@pytest.fixture(scope="session")
def one_worker() -> Iterator[Workers]:
    workers = Workers(1)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def two_workers() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture
def async_io() -> None:
    """DeepSpeed's operator for local disks, which swaps what is a megabyte or more. Its first build takes minutes."""
    import_deepspeed(use_gpu=False)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io does not build here: install libaio's headers (apt-get install libaio-dev)")
    AsyncIOBuilder().load(verbose=False)  # two workers at once would wait for each other's build
