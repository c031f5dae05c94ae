"""A policy behind a real server on loopback: the same actions, no door without a token, late answers are no answers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.conftest import ROOT
from tests.rollout.line_world import LineSuite, Stepper
from tests.rollout.test_policy import make_bundle, observation
from upvla.errors import Mismatch, NoAnswer
from upvla.rollout import wire
from upvla.rollout.client import TOKEN as TOKEN_VARIABLE
from upvla.rollout.client import RemotePolicy, control
from upvla.rollout.evaluate import Control
from upvla.rollout.judge import SuiteJudge
from upvla.rollout.play import Ask
from upvla.rollout.policy import UPVLAPolicy
from upvla.rollout.predictor import Asked, Served, Session
from upvla.rollout.references import StillPolicy
from upvla.rollout.server import PolicyServer, ServerConfig, as_uvicorn
from upvla.types import CALVIN_RELATIVE, ActionSpace, Observation, Prediction

TOKEN = "only-for-tests"
CAMERAS = ("static", "gripper")


class Counting:
    """Answers with its `value`; remembers nothing, so it may answer several sessions together."""

    action_space: ActionSpace = CALVIN_RELATIVE

    def __init__(self, value: float, wait_s: float = 0.0, chunk: int = 4) -> None:
        self.name, self.value, self.wait_s, self.chunk = f"counting-{value}", value, wait_s, chunk
        self.together: list[int] = []

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        self.together.append(len(asks))
        time.sleep(self.wait_s)
        return [Prediction(np.full((self.chunk, 7), self.value, np.float32)) for _ in asks]


def served(policy: Any) -> Served:
    return Served(policy, policy.name, "1", CAMERAS)


class Running:
    def __init__(self, server: PolicyServer, port: int, uvicorn_server: uvicorn.Server, thread: threading.Thread):
        self.server, self.port, self.url = server, port, f"ws://127.0.0.1:{port}"
        self._uvicorn, self._thread = uvicorn_server, thread

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(60)

    def http(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read()

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        return self.http(method, path, body, Authorization=f"Bearer {TOKEN}", **headers)

    def metrics(self) -> str:
        return self.call("GET", "/metrics")[1].decode()


@contextlib.contextmanager
def running(load: Callable[[str], Served | None], **config: Any) -> Iterator[Running]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = PolicyServer(load, TOKEN, ServerConfig(**{"deadline_ms": 60_000, **config}))
    made = as_uvicorn(server)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    found = Running(server, listening.getsockname()[1], made, thread)
    try:
        yield found
    finally:
        found.stop()
        assert not thread.is_alive()
        listening.close()


def robot(found: Running, deadline_s: float = 50.0) -> RemotePolicy:
    """Patient where time is not the point: this machine may be busy."""
    return RemotePolicy(found.url, TOKEN, deadline_s=deadline_s)


def always(policy: Any) -> Callable[[str], Served | None]:
    return lambda known: None if known else served(policy)


@pytest.fixture
def counting() -> Iterator[Running]:
    with running(always(Counting(0.5)), max_bytes=100_000, max_side=300) as found:
        yield found


# ---------------------------------------------------------------------------------------------------- the answers


def test_a_remote_policy_answers_as_the_one_in_this_process_does() -> None:
    bundle = make_bundle()
    local = UPVLAPolicy(bundle, "abc")
    with running(always(UPVLAPolicy(bundle, "abc"))) as found, robot(found) as remote:
        assert (remote.name, remote.action_space) == ("abc", bundle.action_space)
        assert remote.about["cameras"] == list(CAMERAS)
        for text in ("open the drawer", "push the red block"):
            local.reset(text)
            remote.reset(text)
            for number in range(3):
                expected = local.act(observation(number)).actions
                np.testing.assert_allclose(remote.act(observation(number)).actions, expected, atol=1e-6)
        assert 0 < remote.timing["predict_ms"] <= remote.timing["total_ms"]


def test_an_evaluation_through_a_server_is_the_one_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, with what the policy remembers of a subtask."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    suite, control = LineSuite(), Control(replan=2)
    chains = list(enumerate(suite.chains(4)))
    with running(lambda known: None if known else Served(Stepper(), "stepper", "1", ("static",))) as found:
        records = SuiteJudge(suite, found.url, control)(chains)
    assert records == SuiteJudge(suite, Stepper(), control)(chains)
    assert [record.steps for record in records] == [(1, 5)] * 4  # what `Stepper` does by hand


def test_a_request_that_nobody_waits_for_does_not_end_the_others() -> None:
    with running(always(Counting(0.5, wait_s=0.5))) as found, robot(found) as remote:
        remote.reset("push")
        remote.ask(observation(0))
        request = Asked(Session(found.server.served), Ask(observation(1), "push", {}), 50.0)
        request.done.cancel()
        found.server._predictor.submit(request)
        assert remote.answer().actions.shape == (4, 7)
        assert remote.act(observation(2)).actions.shape == (4, 7)


def test_http_answers_single_observations_in_bytes_and_in_json(counting: Running) -> None:
    seen = observation(0)
    arrays = {**{f"image_{camera}": frame for camera, frame in seen.images.items()}, "state": seen.state}
    status, reply = counting.call("POST", "/v1/act", wire.pack({"id": 7, "instruction": "push"}, arrays))
    header, answered = wire.unpack(reply)
    assert (status, header["id"], header["model_id"]) == (200, 7, "counting-0.5")
    np.testing.assert_array_equal(answered["actions"], np.full((4, 7), 0.5))
    listed = {
        name: {"dtype": a.dtype.name, "shape": a.shape, "data": base64.b64encode(a.tobytes()).decode()}
        for name, a in arrays.items()
    }
    body = json.dumps({"instruction": "push", "arrays": listed}).encode()
    status, reply = counting.call("POST", "/v1/act", body, Content_Type="application/json")
    assert status == 200 and json.loads(reply)["actions"] == [[0.5] * 7] * 4


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "[1]", '{"a": 1}'])
def test_an_id_that_no_reply_could_repeat_is_refused_and_counted_once(counting: Running, number: str) -> None:
    body = f'{{"id": {number}, "instruction": "push", "arrays": {{}}}}'.encode()
    status, reply = counting.call("POST", "/v1/act", body, Content_Type="application/json")
    assert status == 400 and "`id` is a text" in json.loads(reply)["error"]["message"]
    assert 'upvla_act_total{outcome="ok"}' not in counting.metrics()


def test_sessions_that_wait_together_are_answered_together() -> None:
    policy = Counting(1.0, wait_s=0.15)
    with running(always(policy)) as found, contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(robot(found)) for _ in range(5)]
        for session in sessions:
            session.reset("push")
            session.ask(observation(0))
        assert all(session.answer().actions.shape == (4, 7) for session in sessions)
    assert sum(policy.together) == 5 and max(policy.together) > 1


def test_a_policy_that_remembers_its_subtask_serves_one_session_at_a_time() -> None:
    with running(always(StillPolicy(CALVIN_RELATIVE))) as found:
        with robot(found) as first, robot(found) as second:
            for session in (first, second):
                session.reset("push")
            first.act(observation(0))
            with pytest.raises(NoAnswer, match="busy"):
                second.act(observation(0))
        with robot(found) as third:
            third.reset("push")
            third.act(observation(0))


# ----------------------------------------------------------------------------------------------------- the guards


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN])
def test_no_door_opens_without_the_token(counting: Running, token: str) -> None:
    for method, path in (("GET", "/metrics"), ("GET", "/v1/model"), ("POST", "/v1/act"), ("GET", "/anything")):
        status, reply = counting.http(method, path, b"{}" if method == "POST" else None, Authorization=token)
        assert status == 401 and b"Bearer TOKEN" in reply
    assert counting.http("GET", "/health")[0] == 200
    with pytest.raises(Mismatch, match="does not know this token"):
        RemotePolicy(counting.url, "wrong")
    assert "upvla_sessions 0.0" in counting.metrics()


@pytest.mark.parametrize(
    "path", ["/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../../etc/passwd", "/v1/act/"]
)
def test_paths_that_are_not_doors_are_not_found(counting: Running, path: str) -> None:
    status, reply = counting.call("GET", path)
    assert status in (404, 307) and b"root:" not in reply


def test_a_message_that_is_too_big_is_refused_unread(counting: Running) -> None:
    status, reply = counting.call("POST", "/v1/act", b"x" * 100_001)
    assert (status, json.loads(reply)["error"]["code"]) == (413, "too_large")
    with connect(f"{counting.url}/v1/act", additional_headers={"Authorization": f"Bearer {TOKEN}"}) as raw:
        raw.recv()
        with pytest.raises(ConnectionClosed) as caught:
            raw.send(b"x" * 100_001)
            raw.recv(timeout=50)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
    assert counting.http("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"instruction": ""}, "`instruction` is a text"),
        ({"instruction": "x" * 501}, "`instruction` is a text"),
        ({"instruction": 5}, "`instruction` is a text"),
        ({"begin": False}, "begins a subtask"),
        ({"id": float("nan")}, "`id` is a text"),
        ({"id": [1]}, "`id` is a text"),
        ({"deadline_ms": 1e9}, "deadline_ms"),
        ({"deadline_ms": True}, "deadline_ms"),
        ({"image_static": None}, "this model takes"),
        ({"image_extra": np.zeros((2, 2, 3), np.uint8)}, "this model takes"),
        ({"image_static": np.zeros((2, 2, 4), np.uint8)}, "expected uint8"),
        ({"image_static": np.zeros((2, 2, 3), np.float32)}, "expected uint8"),
        ({"image_static": np.zeros((0, 2, 3), np.uint8)}, "expected uint8"),
        ({"image_static": np.zeros((301, 2, 3), np.uint8)}, "1 to 300 px"),
        ({"state": np.array([np.nan], np.float32)}, "finite float32"),
        ({"state": np.zeros((2, 2), np.float32)}, "finite float32"),
    ],
)
def test_what_a_model_cannot_read_is_named_and_the_session_lives_on(
    counting: Running, changed: dict[str, Any], why: str
) -> None:
    seen = observation(0)
    whole: dict[str, Any] = {"id": 1, "begin": True, "instruction": "push", "deadline_ms": 9000, "state": seen.state}
    whole |= {f"image_{camera}": frame for camera, frame in seen.images.items()}
    with connect(f"{counting.url}/v1/act", additional_headers={"Authorization": f"Bearer {TOKEN}"}) as raw:
        raw.recv()
        for request, expected in ((whole | changed, why), (whole, "")):
            arrays = {name: value for name, value in request.items() if isinstance(value, np.ndarray)}
            header = {name: v for name, v in request.items() if not isinstance(v, np.ndarray) and v is not None}
            raw.send(wire.pack(header, arrays))
            reply = raw.recv(timeout=50)
            assert isinstance(reply, bytes)
            said = wire.unpack(reply)[0].get("error", {"message": ""})
            assert expected in said["message"] and bool(expected) == bool(said["message"])
        raw.send(b"\x80\x04nonsense")
        reply = raw.recv(timeout=50)
        assert isinstance(reply, bytes) and "wire" in wire.unpack(reply)[0]["error"]["message"]


def test_what_breaks_inside_a_policy_is_not_told_to_strangers() -> None:
    class Broken(Counting):
        def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
            raise RuntimeError("secret: /home/somebody")

    with running(always(Broken(0.0))) as found, robot(found) as remote:
        remote.reset("push")
        with pytest.raises(Mismatch, match="the policy failed") as caught:
            remote.act(observation(0))
        assert "secret" not in str(caught.value)
        assert 'upvla_act_total{outcome="internal"} 1.0' in found.metrics()


# ------------------------------------------------------------------------------------------- time, and being away


def test_a_late_answer_is_no_answer_and_does_not_answer_the_next_question() -> None:
    policy = Counting(0.1, wait_s=3.0)
    with running(always(policy)) as found, robot(found, 1.5) as remote:
        remote.reset("push")
        with pytest.raises(NoAnswer, match="deadline"):
            remote.act(observation(0))
        policy.wait_s, policy.value = 0.0, 0.9
        wait(lambda: 'upvla_act_total{outcome="deadline"} 1.0' in found.metrics())  # it has woken up
        assert remote.act(observation(1)).actions[0, 0] == np.float32(0.9)
        assert "upvla_act_seconds_bucket" in found.metrics()


def test_a_subtask_ends_with_the_model_it_began_with() -> None:
    newest: list[Any] = [Counting(0.1)]
    broken = threading.Event()

    def load(known: str) -> Served | None:
        if broken.is_set():
            raise Mismatch("the checkpoint is damaged")
        return None if newest[0].name == known else served(newest[0])

    with running(load, reload_every_s=0.05) as found, robot(found) as remote:
        remote.reset("push")
        assert remote.act(observation(0)).actions[0, 0] == np.float32(0.1)
        newest[0] = Counting(0.2)
        wait(lambda: 'upvla_reloads_total{outcome="ok"} 1.0' in found.metrics())
        assert remote.act(observation(0)).actions[0, 0] == np.float32(0.1)
        remote.reset("push")
        assert remote.act(observation(0)).actions[0, 0] == np.float32(0.2)
        assert remote.name == "counting-0.2"
        broken.set()
        wait(lambda: 'upvla_reloads_total{outcome="failed"}' in found.metrics())
        assert remote.act(observation(0)).actions[0, 0] == np.float32(0.2)
        assert json.loads(found.http("GET", "/health")[1]) == {"status": "ok", "model_id": "counting-0.2"}


def test_no_server_and_one_that_goes_are_named() -> None:
    with running(always(Counting(0.5))) as found:
        remote = robot(found)
        remote.reset("push")
        remote.act(observation(0))
    with pytest.raises(NoAnswer, match="away"):
        remote.act(observation(0))
    with pytest.raises(NoAnswer, match="upvla serve"):
        RemotePolicy(found.url, TOKEN)
    with pytest.raises(Mismatch, match="ws://HOST:PORT"):
        RemotePolicy("127.0.0.1:8600", TOKEN)


# ------------------------------------------------------------------------------------------------ the control loop


def drive(remote: RemotePolicy, steps: int, **more: Any) -> list[np.ndarray]:
    commanded: list[np.ndarray] = []

    def observe() -> Observation:
        return observation(len(commanded))

    control(remote, "push", observe, commanded.append, steps=steps, **more)
    return commanded


def test_the_control_loop_clips_to_the_limits_and_goes_on_over_chunks() -> None:
    with running(always(Counting(7.0, chunk=10))) as found, robot(found) as remote:
        began = time.monotonic()
        commanded = drive(remote, 24, patience_s=9.0)
        assert time.monotonic() - began >= 23 * remote.action_space.dt_s  # at the action space's rate, not faster
    assert len(commanded) == 24
    assert all((action == 1.0).all() for action in commanded)


def test_the_control_loop_leaves_out_actions_whose_time_has_passed() -> None:
    class Numbered(Counting):
        def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
            now = asks[0].observation.images["static"][0, 0, 0]
            rows = (np.arange(10) + float(now)) / 100
            return [Prediction(np.repeat(rows[:, None], 7, 1).astype(np.float32)) for _ in asks]

    def observe_at(step: int) -> Observation:
        frames = {name: np.full((4, 4, 3), step, np.uint8) for name in CAMERAS}
        return Observation(frames, np.zeros(15, np.float32))

    commanded: list[np.ndarray] = []
    with running(always(Numbered(0.0))) as found, robot(found) as remote:
        control(remote, "push", lambda: observe_at(len(commanded)), commanded.append, steps=30, patience_s=9.0)
    np.testing.assert_allclose([action[0] for action in commanded], np.arange(30) / 100, atol=1e-6)


def test_the_control_loop_stops_on_silence() -> None:
    class Falls(Counting):
        """Silent from its second chunk on, until it is woken."""

        woken = threading.Event()

        def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
            if len(self.together) >= 1:
                self.woken.wait(30)
            return super().act_many(asks)

    policy = Falls(0.5, chunk=6)
    commanded: list[np.ndarray] = []
    with running(always(policy)) as found, robot(found) as remote:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="silence"):
            control(remote, "push", lambda: observation(0), commanded.append, steps=100)
        assert time.monotonic() - began < 20.0  # long before the deadline, and before anybody woke it
        policy.woken.set()
    assert len(commanded) == 6  # what was known is executed, and not one action more


def test_a_robot_needs_none_of_our_heavy_dependencies() -> None:
    heavy = ("torch", "pydantic", "mlflow", "ray", "prefect", "pyarrow", "mujoco", "starlette", "cv2")
    code = f"import sys, upvla.rollout.client; sys.exit(' '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def wait(happened: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
