from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.toy import Workers


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
