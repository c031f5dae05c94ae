"""Meta-World's tasks: its own scripted policies must succeed, or this environment is not what they were written for."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from upvla.data.quality import QualityLimits, check
from upvla.data.sources import open_source
from upvla.errors import ConfigError
from upvla.rollout.benchmarks import Places, SuiteJudge, open_suite
from upvla.rollout.evaluate import wilson
from upvla.rollout.references import StillPolicy
from upvla.sim import metaworld
from upvla.sim.recording import record_suite

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="pip install 'upvla[metaworld]'"),
    pytest.mark.filterwarnings("ignore:Constant.s. may be too high"),  # Meta-World's policies count on being clipped
]


@pytest.mark.seam
def test_every_task_of_meta_world_has_one_instruction_of_its_own() -> None:
    official = {name.removesuffix("-v3") for name in metaworld._load().MT1.ENV_NAMES}
    assert set(metaworld.INSTRUCTIONS) == official
    assert len(official) == len(set(metaworld.INSTRUCTIONS.values())) == 50
    from metaworld.env_dict import MT10_V3

    assert set(metaworld.MT10) == {name.removesuffix("-v3") for name in MT10_V3}


@pytest.mark.seam
def test_an_episode_depends_on_its_start_alone() -> None:
    suite = open_suite("metaworld-push", Places())
    first, second = suite.chains(2)
    env = suite.open("push", cameras=False)
    try:
        ends = []
        for chain in (first, second, first):
            env.reset(chain.robot_state, chain.scene_state)
            for action in np.random.default_rng(0).uniform(-1, 1, (30, 4)):
                env.step(action)
            ends.append(env.truth())
        np.testing.assert_array_equal(ends[0], ends[2])
        assert not np.array_equal(ends[0], ends[1])
        with pytest.raises(ConfigError, match="4 finite numbers"):
            env.step(np.full(4, np.nan))
        with pytest.raises(ConfigError, match="number below 50"):
            env.reset(np.zeros(0), np.array([0.0, 50.0]))
    finally:
        env.close()


@pytest.mark.seam
def test_recordings_of_another_robot_are_read_back_as_what_they_are(tmp_path: Path) -> None:
    suite = open_suite("metaworld-drawer-close", Places())
    found = record_suite(suite, suite.chains(2), tmp_path)
    assert found["tasks"] == {"drawer-close": [2, 2]}
    again = record_suite(suite, suite.chains(2), tmp_path)  # finished: nothing is recorded again
    assert again == found
    with pytest.raises(ConfigError, match="holds other recordings"):
        record_suite(suite, suite.chains(1), tmp_path)
    source = open_source("calvin", str(tmp_path / "training"), span_end="inclusive")
    episodes = [source.read(key) for key in list(source.keys())]
    assert sum(map(len, episodes)) == found["frames"]
    for episode in episodes:
        assert episode.embodiment == "metaworld" and episode.rate_hz == 80.0
        assert episode.action_space == metaworld.ACTIONS and episode.actions.shape[1] == 4
        assert [(span.text, span.task) for span in episode.spans] == [("close the drawer", "drawer-close")]
        check(episode, QualityLimits())


def test_standing_still_keeps_the_gripper_open_whatever_its_sign() -> None:
    assert StillPolicy(metaworld.ACTIONS)._actions[0].tolist() == [0, 0, 0, -1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_scripted_policies_reach_their_reference() -> None:
    """All 50 tasks, four starts each. The row in docs/benchmarks.md (982 of 1000) has its few failures at fixed starts,
    of which a small sample may hold more than 2 %: it must not be significantly worse than 98 %, nor any task fail."""
    suite = open_suite("metaworld-mt50", Places())
    records = SuiteJudge(suite, "expert")(list(enumerate(suite.chains(4))))
    failed = [(record.scene, record.error) for record in records if not record.succeeded]
    assert wilson(len(records) - len(failed), len(records)).high >= 0.98, failed
    assert max(Counter(failed).values(), default=0) <= 2, failed
