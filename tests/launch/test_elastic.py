"""An elastic run on Ray has as many workers as there is room for and as fit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.rows import told
from tests.launch.conftest import RayHead, ray_node
from tests.launch.running import Prepared, Running, by_start, cost_of, saved_point, stage_of, wait_for
from tests.launch.stages import model, prepared, run_stage
from tests.train.toy import Workers
from upvla.errors import JobFailed
from upvla.launch.jobs import Jobs
from upvla.launch.train import stop_training

__all__ = ["model", "prepared"]  # fixtures

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(900)]

HELD_OUT = ("val_loss/pre", "val_loss/act", "val_loss/mmu")


def test_a_run_takes_more_workers_when_there_is_room_and_goes_on_with_fewer_when_a_node_is_gone(
    ray_head: RayHead, prepared: Prepared, two_workers: Workers, tmp_path: Path
) -> None:
    """Two begin, for whom there is room. Nodes for one more each come: with one of them nothing changes, because no
    batch can be shared out between three. One is lost again, and the three for whom Ray finds places leave for two.

    Held-out losses of all lives are compared, at a rate that does not multiply what other sums round otherwise.
    """
    optimizer = {"lr": 1e-5, "schedule": "constant"}
    stage = {"steps": 9000, "save_every": 20, "eval_every": 10, "eval_batches": 2, "optimizer": optimizer}
    changes = {"engine": {"zero_stage": 1, "threads": 1, "num_workers": (2, 4)}, "stage": stage}
    store, spec = stage_of(prepared, tmp_path / "elastic", **changes)
    running = Running(store, spec, ray_head)

    def trained(lives: int) -> float:
        """Until the last of so many lives has taken and saved some steps; and when that was."""
        enough = [True] * lives
        wait_for(lambda: running.error or [len(life.steps) > 40 for life in by_start(running.lives())] == enough)
        return time.monotonic()

    running.wait_for("Attempting to start training worker group of size 2")
    with ray_node(ray_head, num_cpus=1):
        with ray_node(ray_head, num_cpus=1):
            came = time.monotonic()
            running.wait_for("Started training worker group of size 4")
            went = trained(lives=2)
        trained(lives=3)
        stop_training(store, Jobs(ray_head.jobs_url))
        with pytest.raises(JobFailed, match="stopped after step"):
            running.join()
    seen = saved_point(store, spec).meta["validation"]
    other, uncut = stage_of(prepared, tmp_path / "uncut", **changes | {"stage": stage | {"steps": max(map(int, seen))}})
    run_stage(two_workers, uncut)
    expected = saved_point(other, uncut).meta["validation"]
    difference = max(abs(seen[step][name] / expected[step][name] - 1) for step in seen for name in HELD_OUT)
    equal = {"bit_identical": difference == 0.0, "loss_difference": difference}
    two, four, two_again = by_start(running.lives())
    grown, shrunk = cost_of(came, two, four), cost_of(went, four, two_again)
    told("a node came: from two workers to four", **grown, **equal)
    told("a node was lost: from four workers to two", **shrunk, **equal)
    assert running.left_for() == ["grow", "resize"]
    assert grown["lost_steps"] == 0 and four.start > 0, "it was saved when there was room"
    assert 0 <= shrunk["lost_steps"] <= 2 * spec.stage.save_every, "the newest resume point may have been on its way"
    assert difference < 1e-5
