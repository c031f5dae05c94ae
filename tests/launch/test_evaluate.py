"""Chains on processes of Ray: deaths, hangs and silence cost nobody else anything, and neither do workers and lanes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.conftest import RayHead
from tests.rollout.line_world import LineSuite, Stepper
from tests.rollout.test_policy import make_bundle
from upvla.checkpoint import export
from upvla.errors import JobFailed, NotFound
from upvla.launch.cluster import connected
from upvla.launch.evaluate import Crew, judge_chains
from upvla.launch.scores import Exam, judge
from upvla.rollout.evaluate import Control, Layout
from upvla.rollout.judge import Cost, SuiteJudge
from upvla.rollout.play import Ask
from upvla.sim.playtable.suite import PlaytableSuite
from upvla.store import open_store
from upvla.types import ChainRecord, Prediction

pytestmark = pytest.mark.seam

NUM = 12
IMPATIENT = Layout(lanes=3, patience_s=15.0)


def run(suite: LineSuite, num_workers: int = 2) -> list[ChainRecord]:
    found: list[ChainRecord] = []
    work = SuiteJudge(suite, Stepper(), Control(replan=2), IMPATIENT.lanes)
    with connected():
        cost = judge_chains(work, list(enumerate(suite.chains(NUM))), num_workers, IMPATIENT, found.extend)
    assert cost.env_steps >= sum(sum(record.steps) for record in found if not record.error)
    return sorted(found, key=lambda record: record.number)


def clean() -> list[ChainRecord]:
    found = SuiteJudge(LineSuite(), Stepper(), Control(replan=2))(list(enumerate(LineSuite().chains(NUM))))
    return sorted(found, key=lambda record: record.number)


def test_processes_that_are_lost_once_cost_nothing(ray_head: RayHead, tmp_path: Path) -> None:
    """One exits, one hangs in a world, one is stopped and answers nobody."""
    harms = {2: "crash", 5: "hang", 9: "stop"}
    assert run(LineSuite(harms=harms, times=tmp_path)) == clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-0", "5-0", "9-0"]


def test_a_chain_that_always_kills_its_process_is_an_error_and_the_only_one(ray_head: RayHead, tmp_path: Path) -> None:
    found = run(LineSuite(harms={4: "crash"}, times=tmp_path, most=99))
    assert found[4].error == "SimulatorError: the process that judged it died, twice" and found[4].failure == "error"
    assert [r for r in found if r.number != 4] == [r for r in clean() if r.number != 4]
    assert len(list(tmp_path.iterdir())) == 3  # among others, and twice alone


def test_a_chain_that_was_beside_a_culprit_may_lose_a_process_of_its_own(ray_head: RayHead, tmp_path: Path) -> None:
    assert run(LineSuite(harms={0: "crash", 1: "crash"}, times=tmp_path), num_workers=1) == clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "1-0"]


class Signing(Stepper):
    """Leaves the id of the process that it acts in, and waits for that of another."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        (self.folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 240
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return super().act_many(asks)


def test_policy_after_policy_is_judged_by_the_same_processes(ray_head: RayHead, tmp_path: Path) -> None:
    """And by another where one was lost; between two, a process has nothing to say that the next could mistake."""
    suite = LineSuite()
    chains = list(enumerate(suite.chains(NUM)))
    told: list[set[str]] = []
    with connected(), Crew(suite, 2, Layout(lanes=3, patience_s=600), slots=1) as crew:
        for policy in (Signing(tmp_path / "a"), "expert", Signing(tmp_path / "b"), Signing(tmp_path / "c")):
            found: list[ChainRecord] = []
            if isinstance(policy, Signing):
                policy.folder.mkdir()
            cost = crew.judge(SuiteJudge(suite, policy, Control(replan=2), lanes=3), chains, found.extend)
            alone = SuiteJudge(suite, Stepper() if policy != "expert" else policy, Control(replan=2))
            assert sorted(found) == sorted(alone(chains)) and cost.env_steps == alone.cost.env_steps
            if isinstance(policy, Signing):
                told.append({path.name for path in policy.folder.iterdir()})
                if policy.folder.name == "b":
                    os.kill(int(min(told[-1])), signal.SIGKILL)
        assert crew.judge(SuiteJudge(suite, "expert"), [], print) == Cost()
    assert told[0] == told[1] and len(told[1] & told[2]) == 1
    assert [len(pids) for pids in told] == [2, 2, 2]


def test_what_keeps_every_chain_from_being_judged_is_raised(ray_head: RayHead, tmp_path: Path) -> None:
    suite = LineSuite()
    with connected(), pytest.raises(NotFound, match="no finished checkpoint"):
        judge_chains(SuiteJudge(suite, f"{tmp_path}/none"), list(enumerate(suite.chains(3))), 1, Layout(), print)
    with connected(), pytest.raises(JobFailed, match="cannot start"):
        work = SuiteJudge(suite, f"{tmp_path}/none")
        judge_chains(work, list(enumerate(suite.chains(3))), 1, Layout(model="one"), print)


def test_one_model_for_all_or_one_in_each_and_any_number_of_workers_and_lanes_agree(
    ray_head: RayHead, tmp_path: Path
) -> None:
    """A model's records on the real playtable, to the last step."""
    store = open_store(str(tmp_path))
    checkpoint = export(store, "model", make_bundle(chunk=10))
    suite = PlaytableSuite("mine", "chains", ("D",), max_steps=20)
    chains = suite.chains(5)
    layouts = [(1, Layout(lanes=1)), (2, Layout(lanes=3)), (2, Layout(lanes=2, model="one"))]
    found = []
    for number, (workers, layout) in enumerate(layouts):
        exam = Exam(suite, chains, Control(), layout, workers)
        found.append(judge(store.sub(f"ledger-{number}"), exam, [checkpoint.url])[checkpoint.url])
    assert found[0].report == found[1].report == found[2].report
    assert found[0].report.policy == checkpoint.model_id and found[0].report.identity["slots"] == 8
    assert found[0].figures["policy_ms_per_chunk"] > 0 and found[0].figures["frames_per_s"] > 0
    again = judge(store.sub("ledger-0"), Exam(suite, chains, Control()), [checkpoint.url])[checkpoint.url]
    assert again == found[0]  # read back, speed and all


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    store, suite = open_store(str(tmp_path)), LineSuite()
    chains = suite.chains(10)

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(store, Exam(suite, chains, Control()), ["still"], progress=lambda name: stop)
    counted: list[int] = []
    found = judge(
        store,
        Exam(LineSuite(), chains, Control()),
        ["still"],
        progress=lambda name: lambda done, total: counted.append(done),
    )
    assert counted == [7, 8, 9, 10] and len(found["still"].report.records) == 10
