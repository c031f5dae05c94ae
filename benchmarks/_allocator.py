"""The memory allocator's settings of a training job, for figures of what runs inside one."""

from __future__ import annotations

import os
import sys


def as_in_a_training_job() -> None:
    """Start this program again with them: the allocator reads them when a process starts."""
    from upvla.launch.train import ALLOCATOR  # late, so that a process whose memory is measured has no torch in it

    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
