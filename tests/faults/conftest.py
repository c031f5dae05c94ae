"""One Ray head and one pair of workers for all tests of faults."""

from __future__ import annotations

from tests.launch.conftest import ray_head, two_workers

__all__ = ["ray_head", "two_workers"]
