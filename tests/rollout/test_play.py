"""The chain protocol, on a one-dimensional world whose outcomes can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from upvla.rollout.evaluate import Control
from upvla.rollout.film import Film
from upvla.rollout.play import Ask, Rules, answers, drive, play
from upvla.rollout.references import RandomPolicy, StillPolicy
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


def _rules(**options: Any) -> Rules:
    return Rules(_reached, str.upper, options.pop("max_steps", 30), Control(**options))


def _run(
    policy: Any, tasks: tuple[str, ...], env: Corridor | None = None, film: Any = None, **rules: Any
) -> ChainRecord:
    chain = Chain("A", np.zeros(15), np.zeros(24), tasks, 0)
    answer, lanes = answers(policy)
    (record,) = drive(iter([play(env or Corridor(), chain, 7, _rules(**rules), film)]), answer, lanes or 4)
    return record


def test_a_chain_goes_on_without_reset_and_ends_at_the_first_failure() -> None:
    policy = Walker()
    record = _run(policy, ("at 5", "at 25", "at 90", "at 91"))
    assert (record.succeeded, record.steps) == (2, (5, 20, 30))
    assert policy.instructions == ["AT 5", "AT 25", "AT 90"]
    assert record.number == 7 and record.error == "" and record.failure == "failed"


def test_a_policy_that_stands_still_never_moved() -> None:
    assert _run(StillPolicy(CALVIN_RELATIVE), ("at 5",)).failure == "never_moved"


def test_cameras_are_rendered_once_a_chunk() -> None:
    env = Corridor()
    _run(Walker(), ("at 999",), env)
    assert env.renders == 3


@pytest.mark.parametrize(("policy", "says"), [(Walker(chunk=4), "shape"), (Walker(fault=np.nan), "dimension 3")])
def test_a_policy_that_breaks_its_contract_fails_its_chain_by_name(policy: Walker, says: str) -> None:
    record = _run(policy, ("at 5",))
    assert (record.succeeded, record.failure) == (0, "error") and says in record.error


class Counting:
    """Answers together; moves by how often this subtask has asked, and breaks on a colour that a test chooses."""

    name = "counting"
    action_space = CALVIN_RELATIVE

    def __init__(self, breaks_at: int = -1) -> None:
        self.breaks_at = breaks_at
        self.sizes: list[int] = []

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        self.sizes.append(len(asks))
        replies = []
        for ask in asks:
            if int(ask.observation.images["static"][0, 0, 0]) == self.breaks_at:
                raise RuntimeError("out of memory")
            ask.memory["asked"] = ask.memory.get("asked", 0) + 1
            actions = np.zeros((10, 7), np.float32)
            actions[:, 0] = ask.memory["asked"]
            replies.append(Prediction(actions))
        return replies


def _many(policy: Counting, lanes: int, starts: Sequence[float]) -> dict[int, ChainRecord]:
    chains = [Chain("A", np.full(15, x), np.zeros(24), ("at 20", "at 60", "at 300"), 0) for x in starts]
    plays = (play(Corridor(), chain, number, _rules(max_steps=25)) for number, chain in enumerate(chains))
    return {record.number: record for record in drive(plays, answers(policy)[0], lanes)}


def test_records_do_not_depend_on_how_many_lanes_are_answered_together() -> None:
    starts = [0.0, 7.0, 15.0, 3.0, 40.0, 11.0]
    alone, together = Counting(), Counting()
    assert _many(alone, 1, starts) == _many(together, 4, starts)
    assert max(alone.sizes) == 1 and max(together.sizes) == 4


def test_one_world_that_breaks_the_policy_costs_no_other_its_answer() -> None:
    found = _many(Counting(breaks_at=40), 4, [0.0, 7.0, 40.0, 3.0])
    assert [number for number, record in found.items() if record.error] == [2]
    assert found[2].error == "RuntimeError: out of memory"
    assert found[0] == _many(Counting(), 1, [0.0])[0]


def test_ensembling_averages_what_chunks_say_about_the_same_step() -> None:
    env = Corridor()
    _run(Counting(), ("at 999",), env, max_steps=3, replan=1, execution="ensemble", decay=0.5)
    older, oldest = np.exp(-0.5), np.exp(-1.0)  # newest weighs least
    second = (1 + 2 * older) / (1 + older)
    third = (1 + 2 * older + 3 * oldest) / (1 + older + oldest)
    assert env.x == pytest.approx(1 + second + third, abs=1e-5)


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


def test_a_film_shows_instruction_and_outcome(tmp_path: Any) -> None:
    film = Film(picture=None, every=5)
    _run(Walker(), ("at 25",), film=film)
    video = film.save_video(tmp_path / "chain.mp4")
    assert video.stat().st_size > 1000
    assert film.strip() is None  # nothing was predicted
