"""The door to benchmarks: names, and what is answered where one is wrong."""

from __future__ import annotations

import pytest

from upvla.errors import ConfigError
from upvla.rollout.benchmarks import Places, inspect, line_suite, load_policy, open_suite, suite_names
from upvla.rollout.evaluate import EvalConfig, SuiteConfig
from upvla.sim.recording import load_expert


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("calvin-e", "calvin-"),
        ("libero-objct", "libero-object"),
        ("metaworld-mt5", "metaworld-mt50"),
        ("playtable-e", "playtable-"),
        ("playtabel-d", "playtable-d"),
    ],
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
    assert [name for name in suite_names() if name.startswith("calvin")] == [f"calvin-{s}" for s in "dabc"]
    assert {"playtable-d", "playtable-abc", "playtable-d-tasks"} <= set(suite_names())


def test_a_line_s_suite_is_the_playtable_restricted_to_its_tasks() -> None:
    asked = SuiteConfig(name="mine", kind="tasks", scenes=("A", "B"), tasks=("open_drawer",), num=3, seed=7)
    suite = line_suite(EvalConfig(suites=(asked,), max_steps=50), asked)
    chains = suite.chains(asked.num)
    assert [(chain.scene, chain.tasks) for chain in chains] == [(s, ("open_drawer",)) for s in "AAABBB"]
    assert (suite.name, suite.max_steps) == ("mine", 50)
    wrong = asked.model_copy(update={"tasks": ("open_drawr",)})
    with pytest.raises(ConfigError, match="no task 'open_drawr'"):
        line_suite(EvalConfig(suites=(wrong,)), wrong)


def test_a_policy_that_nobody_knows_is_answered_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no policy 'rnadom': name one of random, still, expert"):
        load_policy("rnadom", open_suite("playtable-a", Places()))


@pytest.mark.parametrize("place", ["nothing", "no.such.module:f", "math:pi", "math:nothing"])
def test_an_expert_that_is_not_there_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"expert|function"):
        load_expert(place)
