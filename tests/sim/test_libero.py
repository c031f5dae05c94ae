"""LIBERO from a Python of its own: refusals run everywhere; the rest where UPVLA_LIBERO names that Python."""

from __future__ import annotations

import os

import numpy as np
import pytest

from upvla.errors import ConfigError
from upvla.rollout.benchmarks import Places, open_suite
from upvla.rollout.judge import SuiteJudge
from upvla.sim import libero

PYTHON = os.environ.get("UPVLA_LIBERO", "")
real = pytest.mark.skipif(
    not PYTHON, reason="LIBERO: set UPVLA_LIBERO to the Python that holds it (docs/benchmarks.md)"
)


def test_without_its_python_libero_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="--libero PATH/bin/python"):
        open_suite("libero-goal", Places()).chains(1)
    (finding,) = libero.inspect("/no/such/python")
    assert not finding.found and "docs/benchmarks.md" in finding.detail


@real
@pytest.mark.slow
def test_official_starts_language_and_the_expert_s_reference() -> None:
    suite = open_suite("libero-object", Places(libero=PYTHON))
    chains = suite.chains(1)
    assert len(chains) == 10
    assert {suite.instruction(chain.tasks[0]) for chain in chains} >= {"pick up the milk and place it in the basket"}
    with pytest.raises(ConfigError, match="50 initial states"):
        suite.chains(51)
    records = SuiteJudge(suite, "expert")(list(enumerate(chains[:3])))
    assert [record.succeeded for record in records] == [1, 1, 1], records


@real
@pytest.mark.slow
def test_the_world_is_seen_upright_and_starts_as_recorded() -> None:
    suite = open_suite("libero-object", Places(libero=PYTHON))
    chain = suite.chains(1)[0]
    env = suite.open(chain.scene)
    try:
        env.reset(chain.robot_state, chain.scene_state)
        first = env.observe()
        assert {name: image.shape for name, image in first.images.items()} == dict.fromkeys(
            ("static", "gripper"), (128, 128, 3)
        )
        assert first.state.shape == (8,)
        env.reset(chain.robot_state, chain.scene_state)
        np.testing.assert_allclose(env.truth()[1:], first.scene_state[1:], atol=1e-6)  # [0] is the clock
        with pytest.raises(ConfigError, match="7 finite numbers"):
            env.step(np.full(7, np.inf))
    finally:
        env.close()
