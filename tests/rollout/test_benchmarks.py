"""The door to benchmarks: names, refusals, and a suite whose outcomes can be worked out by hand."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from upvla.errors import ConfigError, SimulatorError
from upvla.rollout.benchmarks import Places, SuiteJudge, inspect, open_suite, suite_fingerprint, suite_names
from upvla.rollout.evaluate import summarise
from upvla.sim.libero import ACTIONS as LIBERO_ACTIONS
from upvla.sim.recording import load_expert
from upvla.types import CALVIN_RELATIVE, Chain, Observation


@pytest.mark.parametrize(
    ("wrong", "near"), [("calvin-e", "calvin-"), ("libero-objct", "libero-object"), ("metaworld-mt5", "metaworld-mt50")]
)
def test_a_suite_that_does_not_exist_is_answered_with_the_nearest_name(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no suite '{wrong}'; did you mean '{near}"):
        open_suite(wrong, Places())


def test_every_suite_opens_by_its_name_once_its_place_is_known() -> None:
    places = Places(calvin="somewhere", libero="python")
    for name in suite_names():
        assert open_suite(name, places).name == name
    with pytest.raises(ConfigError, match="--calvin PATH"):
        open_suite("calvin-d", Places())
    with pytest.raises(ConfigError, match="choose calvin, libero or metaworld"):
        inspect("robosuite", "")


def test_the_playtable_is_never_called_calvin() -> None:
    assert not [name for name in suite_names() if "playtable" in name]
    assert [name for name in suite_names() if name.startswith("calvin")] == [f"calvin-{s}" for s in "dabc"]


@dataclass
class Line:
    """A world of one number: `+1` needs one step to the right, `+9` nine. It may die at a step."""

    dies_at: int = -1
    name = "line"
    action_space = CALVIN_RELATIVE
    x: float = 0.0
    steps: int = 0

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        self.x = float(scene_state[0])

    def step(self, action: np.ndarray) -> None:
        self.steps += 1
        if self.steps == self.dies_at:
            raise SimulatorError("the line simulator died")
        self.x += float(action[0])

    def observe(self) -> Observation:
        return Observation({}, self.state(), self.truth())

    def state(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    def truth(self) -> np.ndarray:
        return np.array([self.x])

    def info(self) -> Mapping[str, Any]:
        return {"x": self.x}

    def fingerprint(self) -> dict[str, str]:
        return {"line": "1"}

    def close(self) -> None: ...


@dataclass
class LineSuite:
    deaths: list[int] = field(default_factory=list)  # of the worlds, in the order in which they are opened
    name: str = "line"
    opened: int = 0
    words: str = "go right"
    action_space = CALVIN_RELATIVE
    max_steps = 5

    def chains(self, num: int) -> list[Chain]:
        return [Chain("only", np.zeros(1), np.array([i], np.float64), ("+1", "+9"), i) for i in range(num)]

    def open(self, scene: str, *, cameras: bool = True) -> Line:
        dies_at = self.deaths[self.opened] if self.opened < len(self.deaths) else -1
        self.opened += 1
        return Line(dies_at)

    def succeeded(self, task: str, start: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        return bool(now["x"] - start["x"] >= float(task))

    def instruction(self, task: str) -> str:
        return f"{self.words} {task}"

    def paraphrases(self, task: str) -> list[str]:
        return [self.instruction(task)]

    def expert(self, env: Any, task: str) -> Iterator[np.ndarray]:
        while True:
            yield np.array([1.0, 0, 0, 0, 0, 0, 1])


def test_an_expert_is_judged_like_any_policy() -> None:
    records = SuiteJudge(LineSuite(), "expert")(list(enumerate(LineSuite().chains(2))))
    assert [(record.succeeded, record.steps) for record in records] == [
        (1, (1, 5))
    ] * 2  # nine steps do not fit in five


@pytest.mark.parametrize("name", ["calvin-d", "libero-10", "metaworld-mt50"])
def test_a_judge_travels_to_a_worker_process(name: str) -> None:
    judge = SuiteJudge(open_suite(name, Places(calvin="somewhere", libero="python")), "expert", 5)
    assert pickle.loads(pickle.dumps(judge)) == judge


def test_recorded_actions_are_replayed_by_chain() -> None:
    go, stay = np.eye(7)[:1].repeat(3, 0), np.zeros((3, 7))
    suite = LineSuite()
    chains = [chain._replace(tasks=("+1",)) for chain in suite.chains(2)]
    records = SuiteJudge(suite, "replay", recorded=((stay,), (go,)))(list(enumerate(chains)))
    assert [(record.succeeded, record.steps) for record in records] == [(0, (3,)), (1, (1,))]


def test_a_world_that_dies_is_opened_again_and_other_chains_are_untouched() -> None:
    clean = SuiteJudge(LineSuite(), "expert")(list(enumerate(LineSuite().chains(3))))
    suite = LineSuite(deaths=[8])  # in the middle of the second chain
    assert SuiteJudge(suite, "expert")(list(enumerate(suite.chains(3)))) == clean
    assert suite.opened == 2
    hopeless = LineSuite(deaths=[8, 2])  # and once more at the second try
    records = SuiteJudge(hopeless, "expert")(list(enumerate(hopeless.chains(3))))
    assert [bool(record.error) for record in records] == [False, True, False]
    assert "the line simulator died" in records[1].error
    assert [records[0], records[2]] == [clean[0], clean[2]]


def test_a_policy_of_another_robot_is_refused_by_the_dimension() -> None:
    suite = LineSuite()
    records = SuiteJudge(suite, "still")(list(enumerate(suite.chains(1))))
    assert records[0].succeeded == 0 and records[0].error == ""
    suite.action_space = LIBERO_ACTIONS  # type: ignore[misc]
    (record,) = SuiteJudge(suite, "still")(list(enumerate(suite.chains(1))))
    assert "dimension 0 (dx) differs in 'scale'" in record.error


def test_a_fingerprint_changes_with_what_the_policy_is_told_and_with_the_chains() -> None:
    suite = LineSuite()
    mark = suite_fingerprint(suite, suite.chains(2), 10)
    assert mark == suite_fingerprint(LineSuite(), suite.chains(2), 10)
    others = [
        suite_fingerprint(LineSuite(words="move right"), suite.chains(2), 10),
        suite_fingerprint(suite, suite.chains(3), 10),
        suite_fingerprint(suite, suite.chains(2), 5),
    ]
    assert len({mark, *others}) == 4
    report = summarise("expert", suite.name, mark, SuiteJudge(suite, "expert")(list(enumerate(suite.chains(2)))))
    assert report.average_length.value == 1.0 and report.per_task["+9"].value == 0.0


@pytest.mark.parametrize("place", ["nothing", "no.such.module:f", "math:pi", "math:nothing"])
def test_an_expert_that_is_not_there_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"expert|function"):
        load_expert(place)
