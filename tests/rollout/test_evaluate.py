"""The chain protocol and its statistics, on a one-dimensional world whose outcomes can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from upvla.errors import Mismatch
from upvla.rollout.evaluate import bootstrap_mean, run_chain, summarise, wilson
from upvla.rollout.film import Film
from upvla.rollout.policy import RandomPolicy, StillPolicy
from upvla.types import CALVIN_RELATIVE, ActionSpace, Chain, ChainRecord, Observation, Prediction


class Corridor:
    """A point on a line; the task `at N` is done when the point has moved to N or beyond."""

    name = "corridor"
    action_space: ActionSpace = CALVIN_RELATIVE

    def __init__(self) -> None:
        self.x = 0.0
        self.renders = 0

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self.x = float(robot_state[0])

    def step(self, action: np.ndarray) -> None:
        self.x += float(action[0])

    def observe(self) -> Observation:
        self.renders += 1
        frame = np.full((20, 20, 3), int(self.x) % 256, np.uint8)
        return Observation({"static": frame, "gripper": frame}, np.array([self.x], np.float32))

    def info(self) -> Mapping[str, Any]:
        return {"x": self.x}

    def fingerprint(self) -> Mapping[str, str]:
        return {"env": "corridor"}

    def close(self) -> None:
        pass


class Walker:
    """Moves one unit a step; `chunk` and `fault` let a test break the contract."""

    name = "walker"
    action_space = CALVIN_RELATIVE

    def __init__(self, chunk: int = 10, fault: float = 0.0) -> None:
        self.instructions: list[str] = []
        self._actions = np.zeros((chunk, 7), np.float32)
        self._actions[:, 0] = 1.0
        self._actions[-1, 3] = fault

    def reset(self, instruction: str) -> None:
        self.instructions.append(instruction)

    def act(self, observation: Observation) -> Prediction:
        return Prediction(self._actions)


def _reached(task: str, start: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return bool(now["x"] >= float(task.split()[1]))


def _run(policy: Any, tasks: tuple[str, ...], env: Corridor | None = None, **options: Any) -> ChainRecord:
    chain = Chain("A", np.zeros(15), np.zeros(24), tasks, 0)
    settings = {"max_steps": 30, "replan": 10} | options
    return run_chain(env or Corridor(), policy, chain, 7, oracle=_reached, instruction=str.upper, **settings)


def test_a_chain_goes_on_without_reset_and_ends_at_the_first_failure() -> None:
    policy = Walker()
    record = _run(policy, ("at 5", "at 25", "at 90", "at 91"))
    assert (record.succeeded, record.steps) == (2, (5, 20, 30))
    assert policy.instructions == ["AT 5", "AT 25", "AT 90"]
    assert record.number == 7 and record.error == ""


def test_cameras_are_rendered_once_a_chunk() -> None:
    env = Corridor()
    _run(Walker(), ("at 999",), env)
    assert env.renders == 3


@pytest.mark.parametrize(("policy", "says"), [(Walker(chunk=4), "shape"), (Walker(fault=np.nan), "dimension 3")])
def test_a_policy_that_breaks_its_contract_fails_its_chain_by_name(policy: Walker, says: str) -> None:
    record = _run(policy, ("at 5",))
    assert record.succeeded == 0 and says in record.error and "walker" in record.error


def test_another_action_space_is_refused_before_the_first_step() -> None:
    policy = Walker()
    policy.action_space = ActionSpace("other", CALVIN_RELATIVE.dims, dt_s=0.1)  # type: ignore[misc]
    with pytest.raises(Mismatch, match="dt_s differs"):
        _run(policy, ("at 5",))


def test_reference_policies_are_pure_functions_of_what_they_see() -> None:
    observation = Corridor().observe()
    first, again = RandomPolicy(CALVIN_RELATIVE), RandomPolicy(CALVIN_RELATIVE)
    first.reset("go")
    again.reset("go")
    np.random.seed(1)  # noqa: NPY002  (the global generator is what must not matter)
    a = first.act(observation).actions
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(a, again.act(observation).actions)
    again.reset("stop")
    assert not np.array_equal(a, again.act(observation).actions)
    assert not StillPolicy(CALVIN_RELATIVE).act(observation).actions[:, :6].any()


def test_wilson_matches_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I: 81/263 -> 0.2553..0.3662; 0/20 -> 0..0.1611
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_bootstrap_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        estimate = bootstrap_mean(rng.binomial(5, 0.4, 60), draws=400)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_summary_counts_chains_and_attempts() -> None:
    records = [
        ChainRecord(1, "D", ("a", "b"), 1, (3, 9)),
        ChainRecord(0, "D", ("a", "c"), 2, (3, 4)),
        ChainRecord(2, "D", ("b", "a"), 0, (9,)),
    ]
    report = summarise("p", "s", "f", records)
    assert [e.value for e in report.success] == pytest.approx([2 / 3, 1 / 3])
    assert report.average_length.value == 1.0
    assert {t: e.value for t, e in report.per_task.items()} == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert [r.number for r in report.records] == [0, 1, 2]


def test_a_film_shows_instruction_and_outcome(tmp_path: Any) -> None:
    film = Film(picture=None, every=5)
    _run(Walker(), ("at 25",), film=film)
    video = film.save_video(tmp_path / "chain.mp4")
    assert video.stat().st_size > 1000
    assert film.strip() is None  # nothing was predicted
