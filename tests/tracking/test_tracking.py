"""Against a real MLflow: its SQLite store, and its server where being away is the point."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest

from tests.conftest import free_ports
from tests.tracking.conftest import Server
from upvla.checkpoint import Bundle, export
from upvla.errors import Mismatch, StackError
from upvla.model.config import preset
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.policy import UPVLAPolicy
from upvla.store import open_store
from upvla.tracking import CHAMPION, Registry, Tracker, flatten
from upvla.types import CALVIN_RELATIVE, Checkpoint, Manifest, ModelVersion, Observation

pytestmark = [pytest.mark.seam, pytest.mark.usefixtures("server")]  # it starts while the first tests run


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    folder = tmp_path_factory.mktemp("mlflow")
    made = Tracker(f"sqlite:///{folder}/mlflow.db", "tests")
    made.client.create_experiment("tests", artifact_location=f"{folder}/artifacts")
    return made


@pytest.fixture
def as_default(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow's own functions ask. They keep it in the environment, where tests of other rooms would find it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    mlflow.set_tracking_uri(tracker.uri)


def history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracker.client.get_metric_history(run_id, name)]


def test_a_run_is_found_by_its_key_and_nests(tracker: Tracker) -> None:
    parent = tracker.run_id("k-parent", "pipeline")
    child = tracker.start("k-child", "stage1", parent=parent, params={"model": {"chunk": 10}}, tags={"plan": "p"})
    child.log({"loss/pre": 2.0, "loss/act": math.nan}, 1)
    child.close()
    assert tracker.run_id("k-parent", "pipeline") == parent
    assert tracker.run_id("k-child", "stage1") == child.run_id
    run = tracker.client.get_run(child.run_id)
    assert run.data.params == {"model.chunk": "10"}
    assert run.data.tags["plan"] == "p"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss/pre": 2.0}


def test_attaching_again_continues_curves_without_doubles(tracker: Tracker) -> None:
    first = tracker.start("k-resume", "stage1", params={"a": 1})
    for step in range(1, 6):
        first.log({"loss/pre": float(step)}, step)
    first.close("KILLED")
    second = tracker.start("k-resume", "stage1", params={"a": 1, "b": 2})
    for step in range(4, 9):  # resumed from step 3
        second.log({"loss/pre": float(step), "loss/act": 0.5}, step)
    second.close()
    assert history(tracker, first.run_id, "loss/pre") == [(step, float(step)) for step in range(1, 9)]
    assert len(history(tracker, first.run_id, "loss/act")) == 5
    assert tracker.client.get_run(first.run_id).data.params == {"a": "1", "b": "2"}


def test_what_a_killed_process_had_not_sent_comes_with_its_resume_point(tracker: Tracker) -> None:
    """The first life ends with steps 3 and 4 unsent (its server is away) and step 2 sent after the point was saved."""
    cut_off = Tracker("http://127.0.0.1:9", "tests").start("k-cut", "stage1")
    for step in (2, 3, 4):
        cut_off.log({"loss/pre": float(step)}, step)
    saved = json.loads(json.dumps(cut_off.unsent()))
    assert [point[:3] for point in saved] == [["loss/pre", float(step), step] for step in (2, 3, 4)]
    sent = tracker.start("k-cut", "stage1")
    for step in (1, 2):
        sent.log({"loss/pre": float(step)}, step)
    sent.close()
    assert sent.unsent() == []
    resumed = tracker.start("k-cut", "stage1")
    resumed.replay(saved)
    resumed.log({"loss/pre": 5.0}, 5)
    resumed.close()
    assert sorted(history(tracker, resumed.run_id, "loss/pre")) == [(step, float(step)) for step in range(1, 6)]
    cut_off.close(timeout_s=0)


def test_pages_are_named_as_browsers_reach_them_and_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "upvla")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    for pages, root in (("", "http://mlflow:5000"), ("https://lab.example/mlflow/", "https://lab.example/mlflow")):
        page = Tracker("http://upvla:secret@mlflow:5000", "tests", pages).version_page("upvla tiny", "3")
        assert page == f"{root}/#/models/upvla%20tiny/versions/3"


def test_artifacts_and_pictures(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "rollout.mp4").write_bytes(b"video")
    run = tracker.start("k-artifacts", "evaluate")
    run.artifact(tmp_path / "rollout.mp4", "videos")
    run.picture(np.zeros((8, 8, 3), np.uint8), "strips/one.png")
    run.record({"scores": [1, 2]}, "report.json")
    run.close()
    assert {item.path for item in tracker.client.list_artifacts(run.run_id)} == {"videos", "strips", "report.json"}


def test_threads_that_ask_at_once_get_one_run(tracker: Tracker) -> None:
    with ThreadPoolExecutor(4) as pool:
        for key in (f"k-at-once-{i}" for i in range(10)):
            ids = list(pool.map(lambda key: tracker.run_id(key, "at once"), [key] * 4))
            assert len(set(ids)) == 1


def test_params_are_flat() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1]}, "e": None}) == {"a.b.c": 1, "a.d": [1], "e": None}


# ------------------------------------------------------------------------------------------------------ registry


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Checkpoint, Bundle]]:
    """Three small exported policies."""
    store = open_store(str(tmp_path_factory.mktemp("models")))
    text = TextTokenizer.train(["open the drawer", "turn on the light"], 300)
    config = preset("tiny", text_vocab_size=300, eot_id=text.eot_id)
    made = []
    for name in ("a", "b", "c"):
        bundle = Bundle(
            config,
            UPVLA(config).eval(),
            VQTokenizer(config.vq).eval(),
            text,
            CALVIN_RELATIVE,
            {},
            {"step": 7, "run": name},
        )
        made.append((export(store, name, bundle), bundle))
    return made


def observation() -> Observation:
    rng = np.random.Generator(np.random.Philox(1))
    images = {
        "static": rng.integers(0, 255, (200, 200, 3), np.uint8),
        "gripper": rng.integers(0, 255, (84, 84, 3), np.uint8),
    }
    return Observation(images, np.zeros(15, np.float32))


@pytest.mark.usefixtures("as_default")
def test_a_registered_champion_predicts_what_the_policy_does(
    tracker: Tracker, checkpoints: list[tuple[Checkpoint, Bundle]]
) -> None:
    (first, bundle), (second, _), _ = checkpoints
    registry, run_id = Registry(tracker), tracker.run_id("k-register", "evaluate")
    cameras = ("static", "gripper")
    assert registry.by_alias("upvla-test") is None
    one = registry.register(
        "upvla-test", first, run_id, cameras=cameras, metrics={"chains/avg_len": 1.5}, tags={"stats": "s1"}
    )
    again = registry.register("upvla-test", first, run_id, cameras=cameras, metrics={}, tags={})
    two = registry.register("upvla-test", second, run_id, cameras=cameras, metrics={}, tags={})
    assert (one.version, again.version, two.version) == ("1", "1", "2")
    assert one.checkpoint == first
    assert one.tags["stats"] == "s1"
    registry.set_alias("upvla-test", CHAMPION, "2")
    registry.set_alias("upvla-test", CHAMPION, "1")
    champion = registry.by_alias("upvla-test")
    assert champion is not None
    assert (champion.version, champion.alias, champion.checkpoint) == ("1", CHAMPION, first)

    model = mlflow.pyfunc.load_model("models:/upvla-test@champion")
    seen = observation()
    answer = model.predict(
        {f"image_{camera}": frame[None] for camera, frame in seen.images.items()}
        | {"state": seen.state[None], "instruction": np.array(["open the drawer"])}
    )
    policy = UPVLAPolicy(bundle)
    policy.reset("open the drawer")
    np.testing.assert_allclose(answer["actions"][0], policy.act(seen).actions, atol=1e-6)
    assert tracker.client.get_logged_model(model.metadata.model_id).metrics[0].key == "chains/avg_len"


def test_two_that_register_a_checkpoint_at_once_get_one_version(
    tracker: Tracker, checkpoints: list[tuple[Checkpoint, Bundle]]
) -> None:
    """As one flow run in two processes does."""
    (first, _), *_ = checkpoints
    run_id, both = tracker.run_id("k-twins", "evaluate"), threading.Barrier(2)

    class AtOnce(Registry):
        looked = False

        def versions(self, name: str) -> list[ModelVersion]:
            found = super().versions(name)
            if not self.looked:  # both have seen that there is none
                self.looked = True
                both.wait(120)
            return found

    def register() -> str:
        return AtOnce(tracker).register("upvla-twins", first, run_id, cameras=(), metrics={}, tags={}).version

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(register) for _ in range(2)]
    assert [one.result() for one in made] == ["1", "1"]
    assert [version.version for version in Registry(tracker).versions("upvla-twins")] == ["1"]


def test_a_checkpoint_is_a_model_of_its_run_before_it_is_registered(
    tracker: Tracker, checkpoints: list[tuple[Checkpoint, Bundle]]
) -> None:
    """Its held-out losses, its data as inputs, its card; logging all of it again changes nothing."""
    *_, (third, _) = checkpoints
    registry, run_id = Registry(tracker), tracker.run_id("k-inputs", "stage2")
    counts = {"num_episodes": 12, "num_steps": 900, "num_spans": 40}
    about = ("playtable", 3, None, (), (), (), "stats", CALVIN_RELATIVE, ("static",))
    manifest = Manifest(*about, **counts, content_id="abcdef0123456789")
    for _ in range(2):
        tracker.log_datasets(run_id, [manifest], "s3://upvla")
        logged = registry.log_model("upvla-card-stage2", third, run_id, metrics={"held_out/act": 0.5}, tags={"t": "1"})
    (given,) = tracker.client.get_run(run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("playtable@3", "abcdef0123456789")
    assert '"recordings": 12' in given.dataset.profile
    assert history(tracker, run_id, "held_out/act") == [(0, 0.5)]  # as scores are: bars beside each other
    version = registry.register(
        "upvla-card", third, run_id, cameras=("static",), metrics={"chains/avg_len": 2.0}, tags={"t": "2"}
    )
    model = tracker.client.get_logged_model(logged.model_id)
    assert {metric.key for metric in model.metrics} >= {"held_out/act", "chains/avg_len"}
    assert model.source_run_id == run_id and model.tags["t"] == "2"
    registry.describe("upvla-card", version.version, "# card")
    registry.tag("upvla-card", version.version, {"gate": "better"})
    found = tracker.client.get_model_version("upvla-card", version.version)
    assert (found.description, found.tags["gate"]) == ("# card", "better")


@pytest.mark.usefixtures("as_default")
def test_a_reference_whose_checkpoint_was_replaced_is_refused(
    tracker: Tracker, checkpoints: list[tuple[Checkpoint, Bundle]]
) -> None:
    (first, _), (second, _), _ = checkpoints
    moved = Checkpoint(second.url, first.model_id[::-1], 7, "a")
    run_id = tracker.run_id("k-register", "evaluate")
    version = Registry(tracker).register("upvla-moved", moved, run_id, cameras=("static",), metrics={}, tags={})
    with pytest.raises(Mismatch, match="register the new checkpoint as a version of its own"):
        mlflow.pyfunc.load_model(f"models:/upvla-moved/{version.version}")


# ------------------------------------------------------------------------------------------------- being away


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("upvla.tracking.runs._RETRY_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_no_server_costs_one_warning_and_no_time(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(f"http://127.0.0.1:{free_ports(1)[0]}", "away")
    with pytest.raises(StackError, match="is it up"):
        tracker.run_id("k", "n")
    began = time.monotonic()
    run = tracker.start("k", "stage1", params={"a": 1})
    for step in range(200):
        run.log({"loss/pre": float(step)}, step)
    assert time.monotonic() - began < 5  # nothing waited for a server
    run.record({}, "lost.json")
    run.close(timeout_s=1.0)
    messages = [record.message for record in caplog.records]
    assert sum("going on without it" in message for message in messages) == 1
    assert any("200 metric points and 0 pictures were never sent" in message for message in messages)


@pytest.mark.usefixtures("impatient")
def test_a_run_that_was_removed_is_made_again_and_goes_on(tracker: Tracker) -> None:
    run = tracker.start("k-gone", "stage1", params={"a": 1})
    run.log({"loss/pre": 1.0}, 1)
    while not history(tracker, run.run_id, "loss/pre"):
        time.sleep(0.05)
    first = run.run_id
    with sqlite3.connect(tracker.uri.removeprefix("sqlite:///")) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (first,))
    for step in (2, 3):
        run.log({"loss/pre": float(step)}, step)
        time.sleep(1.5)
    run.close()
    assert run.run_id != first
    assert history(tracker, run.run_id, "loss/pre") == [(2, 2.0), (3, 3.0)]
    assert tracker.client.get_run(run.run_id).data.params == {"a": "1"}


@pytest.mark.usefixtures("impatient")
def test_what_is_measured_while_the_server_hangs_arrives_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen server accepts a request and carries it out when thawed, long after the client gave up on the reply."""
    server.wait_healthy()
    tracker = Tracker(server.uri, "away")
    run = tracker.start("k", "stage1", params={"a": 1})
    for step in range(1, 30):
        run.log({"loss/pre": float(step), "loss/act": 0.5}, step)
    while not history(tracker, run.run_id, "loss/act"):
        time.sleep(0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    os.killpg(server.process.pid, signal.SIGSTOP)
    for step in range(30, 60):
        run.log({"loss/pre": float(step), "loss/act": 0.5}, step)
    time.sleep(4.0)
    os.killpg(server.process.pid, signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    for step in range(60, 90):
        run.log({"loss/pre": float(step), "loss/act": 0.5}, step)
    run.close(timeout_s=60)
    assert history(tracker, run.run_id, "loss/pre") == [(step, float(step)) for step in range(1, 90)]
    assert len(history(tracker, run.run_id, "loss/act")) == 89
    assert tracker.client.get_run(run.run_id).data.params == {"a": "1"}
