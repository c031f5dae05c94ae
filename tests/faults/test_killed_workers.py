"""One seeded kill a phase and ZeRO stage, and one stall a stage; `make faults` makes twenty kills of each.

Resume points lie in a bucket. Under ZeRO 2, and where a set is converted, they are part of `make test`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import S3Server
from tests.faults.kills import ZERO_STAGES, draw, draw_in_turn, resized, trial
from tests.faults.lives import CONVERT, PHASES, SAVE_EVERY, STALL, STALL_TIMEOUT_S, Kill, Life, Lives

pytestmark = pytest.mark.seam
_MARGIN_S = 15.0  # for the end of a process, on a machine that has other things to do


@pytest.fixture(scope="module")
def lives() -> Lives:
    return Lives()


@pytest.fixture(scope="module")
def lives_on_s3(s3_server: S3Server) -> Lives:
    return Lives(s3_server.url(), s3_server.env)


@pytest.fixture(
    scope="module", params=[each if each == 2 else pytest.param(each, marks=pytest.mark.slow) for each in ZERO_STAGES]
)
def uninterrupted(
    request: pytest.FixtureRequest, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Life]:
    whole = lives.live(tmp_path_factory.mktemp("whole"), request.param)
    assert whole.exit_codes == [0, 0]
    return request.param, whole


@pytest.mark.parametrize("deaths", [0, 1], ids=["before-a-set-is-there", "after-it-is-there"])
def test_a_worker_killed_in_every_phase_life_after_life_changes_nothing_in_the_result(
    lives_on_s3: Lives, uninterrupted: tuple[int, Life], deaths: int, tmp_path: Path
) -> None:
    zero_stage, whole = uninterrupted
    runs = draw_in_turn(seed=zero_stage)
    assert {kill.phase for run in runs for kill in run} == set(PHASES)
    for row in trial(lives_on_s3, tmp_path, zero_stage, runs[deaths], whole):
        print(json.dumps(row))


@pytest.mark.parametrize("zero_stage", ZERO_STAGES[1:])
def test_one_that_is_killed_while_it_converts_the_set_of_two_goes_on_from_it_afterwards(
    lives_on_s3: Lives, zero_stage: int, tmp_path: Path
) -> None:
    whole = resized(lives_on_s3, tmp_path / f"halved-{zero_stage}", zero_stage)
    cut = tmp_path / f"convert-{zero_stage}"
    (row,) = trial(lives_on_s3, cut, zero_stage, [draw(CONVERT, seed=zero_stage)], whole)
    print(json.dumps(row))


def test_a_worker_that_stalls_amid_a_step_is_given_up_by_the_others(
    lives_on_s3: Lives, uninterrupted: tuple[int, Life], tmp_path: Path
) -> None:
    """They wait in a group that DeepSpeed has made, where torch's own limit is half an hour."""
    zero_stage, whole = uninterrupted
    stalled_in = SAVE_EVERY + 2
    stalled = lives_on_s3.live(tmp_path, zero_stage, Kill(STALL, 1, stalled_in))
    given_up_s = stalled.ended_s - stalled.last_step_s
    assert given_up_s < STALL_TIMEOUT_S + _MARGIN_S, "long before any limit that is not ours"
    assert stalled.exit_codes == [1, -9], "the one that lived has raised, and the one that stood still was ended by us"
    assert stalled.losses == {step: loss for step, loss in whole.losses.items() if step < stalled_in}
    last = lives_on_s3.live(tmp_path, zero_stage)
    assert last.exit_codes == [0, 0] and last.start in (0, SAVE_EVERY)  # or its shards were still on their way
    assert stalled.losses | last.losses == whole.losses
    for name, weight in whole.weights.items():
        assert torch.equal(last.weights[name], weight), name
    row = {"zero_stage": zero_stage, "phase": STALL, "rank": 1, "nth": stalled_in, "given_up_s": round(given_up_s, 2)}
    row |= {"lost_steps": max(stalled.losses) - last.start, "bit_identical": True}
    print(json.dumps(row | {"recovery_s": round(last.first_step_s - last.began_s, 2)}))
