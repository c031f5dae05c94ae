"""One seeded kill a phase and ZeRO stage; `make faults` makes twenty of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import ZERO_STAGES, draw, trial
from tests.faults.lives import PHASES, Life, Lives

pytestmark = pytest.mark.seam


@pytest.fixture(scope="module")
def lives() -> Lives:
    return Lives()


@pytest.fixture(scope="module", params=ZERO_STAGES)
def uninterrupted(
    request: pytest.FixtureRequest, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Life]:
    return request.param, lives.live(tmp_path_factory.mktemp("whole"), request.param)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_worker_changes_nothing_in_the_result(
    lives: Lives, uninterrupted: tuple[int, Life], phase: str, tmp_path: Path
) -> None:
    zero_stage, whole = uninterrupted
    assert whole.exit_codes == [0, 0]
    trial(lives, tmp_path, zero_stage, draw(phase, seed=zero_stage), whole)
