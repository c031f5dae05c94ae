"""The judge on a world whose outcomes can be worked out by hand, and on the playtable where a real world matters."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollout.line_world import LineSuite, Stepper
from upvla.errors import Mismatch
from upvla.rollout.benchmarks import Places, open_suite
from upvla.rollout.evaluate import Control, compare, report_from_json, report_to_json, summarise
from upvla.rollout.judge import SuiteJudge
from upvla.rollout.protocol import identity, protocol, self_test
from upvla.sim import contract as c
from upvla.sim.libero import ACTIONS as LIBERO_ACTIONS
from upvla.sim.playtable.suite import PlaytableSuite
from upvla.store import open_store
from upvla.types import ChainRecord


def test_an_expert_is_judged_like_any_policy() -> None:
    records = SuiteJudge(LineSuite(), "expert")(list(enumerate(LineSuite().chains(2))))
    assert [(record.succeeded, record.steps) for record in records] == [
        (1, (1, 5))
    ] * 2  # nine steps do not fit in five


@pytest.mark.parametrize("name", ["calvin-d", "libero-10", "metaworld-mt50", "playtable-d"])
def test_a_judge_travels_to_a_worker_process(name: str) -> None:
    judge = SuiteJudge(open_suite(name, Places(calvin="somewhere", libero="python")), "expert", Control(replan=5))
    assert pickle.loads(pickle.dumps(judge)) == judge


def test_recorded_actions_are_replayed_by_chain_and_end_with_the_recording() -> None:
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


def _many(policy: Stepper, lanes: int, num: int = 7) -> dict[int, ChainRecord]:
    judge = SuiteJudge(LineSuite(), policy, Control(replan=2), lanes)
    return {record.number: record for record in judge(list(enumerate(LineSuite().chains(num))))}


def test_records_do_not_depend_on_lanes_and_worlds_are_kept() -> None:
    alone = _many(Stepper(), 1)
    assert alone == _many(Stepper(), 3) and alone[0].succeeded == 2
    suite = LineSuite()
    judge = SuiteJudge(suite, Stepper(), Control(replan=2), lanes=3)
    judge(list(enumerate(suite.chains(7))))
    assert suite.opened == 3 and judge.cost.frames == judge.cost.chunks == 7 * (1 + 3)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "RuntimeError: out of memory"),
        ("nan", "not finite at chunk step 2, dimension 1"),
        ("shape", "chunk has shape (10, 6)"),
        ("nothing", "answered with a NoneType"),
    ],
)
def test_what_a_policy_does_wrong_costs_no_other_chain(fault: str, says: str) -> None:
    clean = _many(Stepper(), 3, 20)
    found = _many(Stepper(at=12, fault=fault), 3, 20)
    wrong = {number for number, record in found.items() if record.error}
    assert wrong == {5, 9, 11, 12}  # those that ask there
    assert all(says in found[number].error and found[number].failure == "error" for number in wrong)
    assert {n: r for n, r in found.items() if n not in wrong} == {n: r for n, r in clean.items() if n not in wrong}


def test_a_state_that_no_joint_can_have_is_one_chain_s_error() -> None:
    suite = PlaytableSuite("mine", "tasks", ("A",), ("close_drawer",))
    first, second = suite.chains(2)
    broken = first.scene_state.copy()
    broken[c.DRAWER] = 0.9
    chains = [first._replace(scene_state=broken), second]
    bad, good = SuiteJudge(suite, "expert")(list(enumerate(chains)))
    assert "drawer = 0.9000 lies outside" in bad.error and bad.failure == "error"
    assert good.succeeded == 1


# ------------------------------------------------------------------------------------ before anything is scored


def test_the_protocol_changes_with_whatever_changes_a_score() -> None:
    suite = LineSuite()
    asked, cameras = protocol(suite, suite.chains(2), Control())
    assert cameras == {"static": [4, 4]}
    assert asked == protocol(LineSuite(), suite.chains(2), Control())[0]
    others = [
        protocol(LineSuite(words="move right"), suite.chains(2), Control()),
        protocol(suite, suite.chains(3), Control()),
        protocol(suite, suite.chains(2), Control(replan=5)),
        protocol(suite, suite.chains(2), Control(execution="ensemble")),
    ]
    for other, _ in others:
        assert other != asked
    assert {"env.line", "chains", "seeds", "max_steps", "actions", "camera.static", "control.replan"} <= set(asked)


def test_the_playtable_s_protocol_names_versions_renderer_and_code() -> None:
    suite = PlaytableSuite("mine", "tasks", ("A",), ("close_drawer",))
    asked, cameras = protocol(suite, suite.chains(1), Control())
    assert cameras == {"static": [200, 200], "gripper": [84, 84]}
    assert {"env.mujoco", "env.numpy", "env.renderer", "env.code"} <= set(asked)


def test_a_suite_is_tested_with_its_own_expert() -> None:
    suite = PlaytableSuite("mine", "tasks", ("A",), ("close_drawer",))
    tested = self_test(suite, suite.chains(1))
    assert tested["task"] == "close_drawer" and 5 < tested["steps"] < 60
    line = LineSuite()
    assert self_test(line, line.chains(2)) == {"task": "+1", "steps": 1}
    line.has_expert = False  # type: ignore[misc]
    assert "no expert" in self_test(line, line.chains(2))["skipped"]


def test_a_simulator_that_does_not_repeat_itself_is_refused() -> None:
    drifting = LineSuite(drifts=[0.0, 0.5])  # the second world is another one
    with pytest.raises(Mismatch, match=r"\+1 succeeded after 1 actions; the same actions in a fresh world did not"):
        self_test(drifting, drifting.chains(2))
    useless = LineSuite(drifts=[1.0] * 5)
    with pytest.raises(Mismatch, match="its expert fails in"):
        self_test(useless, useless.chains(2))


def test_worlds_and_policies_of_different_robots_are_refused_by_the_dimension() -> None:
    suite = LineSuite()
    suite.action_space = LIBERO_ACTIONS  # type: ignore[misc]
    with pytest.raises(Mismatch, match=r"dimension 0 \(dx\) differs in 'scale'"):
        protocol(suite, suite.chains(1), Control())


def test_a_camera_and_statistics_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from tests.rollout.test_policy import make_bundle
    from upvla.checkpoint import export

    saved = export(open_store(str(tmp_path)), "x", make_bundle())
    both: dict[str, Any] = {"static": [200, 200], "gripper": [84, 84]}
    found = identity(saved.url, LineSuite(), both)
    assert found["name"] == saved.model_id and found["cameras"] == ["static", "gripper"] and found["slots"] == 1
    with pytest.raises(Mismatch, match=r"camera: model .*/x looks through 'gripper', suite line has static"):
        identity(saved.url, LineSuite(), {"static": [200, 200]})
    assert identity(saved.url, LineSuite(), both, expected={"stats_id": found["stats_id"], "name": ""}) == found
    with pytest.raises(Mismatch, match=r"stats_id: .*/x has .*, registered was 0123"):
        identity(saved.url, LineSuite(), both, expected={"stats_id": "0123"})
    suite = LineSuite()
    suite.action_space = LIBERO_ACTIONS  # type: ignore[misc]
    with pytest.raises(Mismatch, match=r"dimension 0 \(dx\) differs in 'scale'"):
        identity(saved.url, suite, both)


def test_nothing_of_a_model_is_imported_to_say_who_is_judged_or_to_simulate() -> None:
    """Each of these would cost every process of simulators a second or more."""
    code = "import sys, upvla.launch.scores, upvla.rollout.judge, upvla.rollout.protocol\n"
    code += "from upvla.sim.playtable.suite import playtable\nplaytable('playtable-d').open('D').observe()\n"
    code += "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'pyarrow', 'pandas', 'scipy', 'prefect'}\n"
    code += "print(sorted(heavy & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert said.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------- comparing


def _report(policy: str, lengths: list[int], **changes: Any) -> Any:
    records = [ChainRecord(i, "D", ("a", "b"), n, (3,) * 2) for i, n in enumerate(lengths)]
    return summarise(policy, "line", {"env.mujoco": "3.3", "chains": "x", **changes}, {"name": policy}, records)


def test_models_compare_in_pairs_under_one_protocol_and_not_at_all_under_two(tmp_path: Path) -> None:
    before, after = _report("old", [0, 1, 2, 0]), _report("new", [1, 2, 2, 1])
    gain = compare(before, after)
    assert gain.average_length.value == 0.75 and gain.average_length.low > 0
    assert [step.value for step in gain.success] == [0.5, 0.25]
    other = _report("new", [1, 2, 2, 1], **{"env.mujoco": "3.4", "camera.static": "200x200"})
    with pytest.raises(Mismatch, match=r"camera.static: nothing and 200x200; env.mujoco: 3.3 and 3.4"):
        compare(before, other)
    kept = json.loads(json.dumps(report_to_json(before)))
    assert report_from_json(kept) == before
    assert kept["average_length"] == 0.75 and kept["success"] == [0.5, 0.25] and len(kept["fingerprint"]) == 16
    with pytest.raises(Mismatch, match="chains: y and x"):  # a list of another version
        compare(_report("old", [0, 1, 2, 0], chains="y"), after)
    with pytest.raises(Mismatch, match="not the one that its fingerprint"):
        report_from_json({**kept, "protocol": {"env.mujoco": "9"}})
    with pytest.raises(Mismatch, match=r"not what .* prints"):
        report_from_json({"average_length": 1.0})


def test_reports_hold_failures_and_errors_by_chain() -> None:
    records = [
        ChainRecord(0, "D", ("open_drawer", "turn_on_led"), 1, (31, 360), "", "close_to_goal"),
        ChainRecord(1, "D", ("turn_on_led",), 0, (0,), "Mismatch: chunk has shape (4, 7)", "error"),
        ChainRecord(2, "D", ("turn_on_led",), 1, (44,)),
    ]
    value = json.loads(json.dumps(report_to_json(summarise("p", "s", {}, {}, records))))
    assert value["failures"] == {"close_to_goal": 1, "error": 1}
    assert value["errors"] == {"1": "Mismatch: chunk has shape (4, 7)"}
    assert list(report_from_json(value).records) == records
