"""One Ray head and one pair of workers, and one alone, for all tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import S3Server
from tests.launch.conftest import RayHead, started_head, two_workers
from tests.train.conftest import one_worker

__all__ = ["one_worker", "ray_head", "two_workers"]


@pytest.fixture(scope="session")
def ray_head(s3_server: S3Server) -> Iterator[RayHead]:
    """One whose jobs know where the S3 server is."""
    with started_head() as head:
        yield head
