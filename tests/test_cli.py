"""What a person types: help with an example for every verb, and errors in one sentence."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.factories import write_calvin
from tests.rollout.test_policy import observation
from upvla.cli import app
from upvla.errors import UpvlaError
from upvla.images import encode_jpeg
from upvla.rollout.client import RemotePolicy

ROOT = Path(__file__).parents[1]
VERBS = (
    "up", "down", "status", "env", "doctor",
    "collect", "ingest", "mix", "train", "evaluate", "weights import", "demo",
    "finetune", "stop", "export", "predict", "promote", "serve", "deploy",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert re.search(rf"Example: .*upvla {verb}", shown.output)
    assert ("--json" in shown.output) is (verb not in ("demo", "serve"))


def test_a_shell_completes_verbs_and_options(tmp_path: Path) -> None:
    """`upvla --install-completion` tells a shell to ask like this."""
    for typed, offered in (("upvla fin", "finetune"), ("upvla data re", "remove"), ("upvla train --si", "--site")):
        asked = {"_UPVLA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = CliRunner().invoke(app, [], env=asked, prog_name="upvla")
        assert offered in done.output.split(), (typed, done.output)


def test_where_the_stack_is_can_be_read_by_a_program_and_stopping_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    known = {"identities": [{"credentials": [{"accessKey": "a", "secretKey": "b"}]}]}
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/s3.json").write_text(json.dumps(known))
    assert _run("env", "--json")["AWS_SECRET_ACCESS_KEY"] == "b"
    left = CliRunner().invoke(app, ["down", "--json"])
    assert [part["pid"] for part in json.loads(left.stdout)] == [None] * 5


def test_an_error_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    environment = {**os.environ, "UPVLA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "upvla.cli", "mix", "--config", "pretrain/ful"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "upvla: stack: no stack was ever started" in done.stderr


def test_ctrl_c_says_that_nothing_is_lost() -> None:
    code = "import upvla.cli as c; c.app.command('wait')(lambda: (_ for _ in ()).throw(KeyboardInterrupt)); c.main()"
    done = subprocess.run([sys.executable, "-c", code, "wait"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 130
    assert done.stderr.strip().endswith("run the same command again to go on")


def test_the_stacks_addresses_are_set_before_ray_is_imported() -> None:
    """Ray reads its environment at import: a verb that imports it first talks to the wrong address."""
    code = "import sys, upvla.cli, upvla.config, upvla.stack; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_every_command_that_the_readme_shows_exists() -> None:
    """Deployments, make targets and verbs: a README that promises more than there is fails here."""
    text = (ROOT / "README.md").read_text()
    deployments = set(re.findall(r"`([a-z]+/[a-z]+)`", text))
    flows = {(ROOT / "flows" / f"{name.split('/')[0]}.py").is_file() for name in deployments}
    assert deployments and flows == {True}
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    verbs = set(re.findall(r"`upvla ([a-z]+)", text))
    assert verbs and all(CliRunner().invoke(app, [verb, "--help"]).exit_code == 0 for verb in verbs)


def _run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout) if done.stdout.startswith("{") else {}


@pytest.mark.parametrize(
    "verb", ["ls", "show", "diff", "verify", "repair", "remove", "tag", "stats", "gc", "export", "report"]
)
def test_help_of_every_data_verb_has_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, ["data", verb, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and re.search(rf"Example: upvla data {verb}", shown.output)
    assert "--json" in shown.output or verb == "stats"  # which has verbs of its own


def test_recordings_go_in_and_out_by_command(tmp_path: Path) -> None:
    raw = write_calvin(tmp_path / "raw", (5, 6, 7), static=(32, 32, 3), gripper=(16, 16, 3))
    (raw / "episode_0000007.npz").unlink()
    root = ["--root", str(tmp_path / "store")]
    command = ["ingest", "--format", "auto", "--source", str(raw), "--dataset", "mine", *root, "--json"]
    found = _run(*command, "--option", "span_end=exclusive")
    assert found["quarantined"] == {"missing_frame": 1} and found["seconds"] >= 0
    assert [found[key] for key in ("version", "recordings", "segments", "steps")] == [1, 2, 4, 12]
    assert _run(*command, "--option", "span_end=exclusive")["version"] == 1
    assert _run("data", "show", "mine", *root, "--json")["quarantine"][0]["reason"] == "missing_frame"
    assert _run("data", "verify", "mine", *root, "--json")["damaged"] == []
    assert _run("data", "tag", "mine@1", "golden", *root, "--json")["tag"] == "golden"
    changed = _run("data", "remove", "mine@1", "--where", "max_steps=5", "--because", "short", *root, "--json")
    assert (changed["version"], changed["recordings"]) == (2, 1)
    old = _refused("data", "remove", "mine@1", "--where", "max_steps=6", "--because", "short", *root)
    assert "v1 is not the newest, v2" in old and old.endswith("say mine or mine@2")
    assert len(_run("data", "diff", "mine@golden", "mine", *root, "--json")["removed"]) == 1
    assert _run("data", "gc", "mine", "--keep-versions", "1", *root, "--json")["versions"] == []  # 1 has a tag
    assert "findings" in _run("data", "stats", "check", "mine", *root, "--json")
    out = str(tmp_path / "out")
    assert _run("data", "export", "mine@golden", "--to", out, *root, "--json")["steps"] == 12
    page = _run("data", "report", "mine", "--out", str(tmp_path / "page.html"), *root, "--json")
    assert page["page"] == str(tmp_path / "page.html") and page["train"] + page["validation"] == 1
    assert "missing_frame" in (tmp_path / "page.html").read_text()
    again = ["ingest", "--format", "lerobot", "--source", out, "--dataset", "back", *root, "--json"]
    assert _run(*again)["steps"] == 12
    wrong = CliRunner().invoke(app, ["ingest", "--format", "tape", "--source", out, "--dataset", "x", *root])
    assert wrong.exit_code == 1 and "there is: calvin, lerobot" in str(wrong.exception)
    none = _refused(*command, "--recordings-per-task", "0")
    assert none == "'recordings_per_task' in the options of `upvla ingest`: Input should be greater than 0 (got 0)"


def _refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, UpvlaError), (done.output, done.exception)
    return str(done.exception)


def test_what_is_mistyped_about_an_ingest_is_answered_with_the_next_move(tmp_path: Path) -> None:
    raw = write_calvin(tmp_path / "raw" / "training", (5,), static=(32, 32, 3), gripper=(16, 16, 3))
    root = ["--dataset", "mine", "--root", str(tmp_path / "store")]
    (tmp_path / "list.yaml").write_text("[a, b]")
    calvin = ["ingest", "--format", "calvin", "--source", str(raw)]
    lerobot = ["ingest", "--format", "lerobot", "--source", str(raw)]
    for command, said in (
        (
            [*calvin, *root, "--option", "cameras=5"],
            r"options of format 'calvin' \(cameras=5\): .*there is: split, span_end",
        ),
        ([*calvin, *root, "--options", str(tmp_path / "list.yaml")], r"list.yaml holds a list, not a mapping"),
        ([*calvin, *root, "--min-accept-ratio", "3"], r"'min_accept_ratio' in .*less than or equal to 1 \(got 3.0\)$"),
        ([*calvin, "--dataset", "My Data"], r"'dataset' in .* match pattern .* \(got 'My Data'\)$"),
        ([*calvin, "--dataset", "x", "--root", str(tmp_path / "list.yaml")], r"cannot be a folder: a file is there"),
        (["ingest", "--source", str(tmp_path / "raw"), *root], rf"; or name a folder in it: {raw} \(calvin\)$"),
        (["ingest", "--source", str(tmp_path / "rwa"), *root], r"; or correct the URL: no file lies below it$"),
        (["ingest", "--source", "nosuch://bar/x", *root], r"nosuch://bar/x cannot be opened: .*nosuch"),
        ([*lerobot, *root], r"root of a LeRobot data set"),
    ):
        assert re.search(said, _refused(*command)), (command, _refused(*command))
    assert not (tmp_path / "store" / "datasets").exists()


def test_what_is_mistyped_about_a_dataset_is_answered_with_the_next_move(tmp_path: Path) -> None:
    raw = write_calvin(tmp_path / "raw", (5, 6), static=(32, 32, 3), gripper=(16, 16, 3))
    root = ["--root", str(tmp_path / "store")]
    empty = CliRunner().invoke(app, ["data", "ls", *root])
    assert empty.exit_code == 0 and f"{tmp_path}/store holds no data sets" in empty.stderr
    _run("ingest", "--format", "calvin", "--source", str(raw), "--dataset", "mine", *root, "--json")
    _run("data", "tag", "mine", "golden", *root, "--json")
    because = ["--because", "dull"]
    for command, said in (
        (["show", "mine@9"], r"mine has no version 9; tags: golden; versions: 1$"),
        (["show", "mine@silver"], r"mine has no version or tag 'silver'; tags: golden; versions: 1$"),
        (["show", "other@1"], r"other has no version 1; it is no dataset, `upvla ingest` makes one$"),
        (["stats", "check"], r"`upvla data stats check` one after the word$"),
        (["stats", "mine", "other"], r"`upvla data stats` takes one dataset"),
        (
            ["remove", "mine", "--where", "colour=red", *because],
            r"^unknown key 'colour' in --where; known: embodiments, keys",
        ),
        (["remove", "other", "--where", "scenes=A", *because], r"other holds no dataset"),
        (["gc", "other"], r"other holds no dataset"),
        (
            ["report", "mine", "--out", str(tmp_path / "no" / "x.html")],
            r"No such file .*; name a file in a folder that exists",
        ),
    ):
        assert re.search(said, _refused("data", *command, *root)), (command, _refused("data", *command, *root))
    assert [folder.name for folder in (tmp_path / "store" / "datasets").iterdir()] == ["mine"]


def test_a_benchmark_needs_no_stack_nor_looks_for_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    left_behind = {"identities": [{"credentials": [{"accessKey": "a", "secretKey": "b"}]}]}
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/s3.json").write_text(json.dumps(left_behind))
    assert _run("evaluate", "still", "--suite", "playtable-a", "--chains", "1", "--json")["average_length"] == 0
    assert "RAY_ADDRESS" not in os.environ


def test_a_benchmark_is_judged_by_command_and_compared_under_one_protocol_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    command = ["evaluate", "still", "--suite", "playtable-a", "--chains", "1", "--json"]
    first = _run(*command)
    assert first["average_length"] == 0 and len(first["success"]) == 5 and len(first["fingerprint"]) == 16
    assert set(first["references"]) == {"random", "expert"} and first["failures"] == {"never_moved": 1}
    assert first["self_test"]["steps"] > 0 and first["speed"]["env_steps_per_s"] > 0
    (tmp_path / "first.json").write_text(json.dumps(first))
    expert = ["evaluate", "expert", "--suite", "playtable-a", "--chains", "1"]
    compared = _run(*expert, "--compare", str(tmp_path / "first.json"), "--json")["compared"]
    assert compared["with"] == "still" and compared["average_length"]["value"] >= 1
    shown = CliRunner().invoke(app, expert)
    assert "1 chains, protocol" in shown.output and "still" in shown.output and "env steps/s" in shown.output
    other = CliRunner().invoke(app, [*command, "--replan", "5", "--compare", str(tmp_path / "first.json")])
    assert other.exit_code == 1 and "control.replan: 10 and 5" in str(other.exception)
    wrong = CliRunner().invoke(app, ["evaluate", "still", "--suite", "playtable-e"])
    assert wrong.exit_code == 1 and "did you mean 'playtable-" in str(wrong.exception)


# ------------------------------------------------------------------------------------------------ a model in use


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.rollout.test_policy import make_bundle
    from upvla.checkpoint import export
    from upvla.store import open_store

    return export(open_store(str(tmp_path_factory.mktemp("models"))), "one", make_bundle()).url


def test_a_checkpoint_is_exported_and_asked(checkpoint: str, tmp_path: Path) -> None:
    copied = _run("export", checkpoint, "--to", str(tmp_path / "copy"), "--json")
    assert _run("export", checkpoint, "--to", str(tmp_path / "copy"), "--json") == copied
    for camera in ("static", "gripper"):
        image = np.zeros((50, 60, 3), np.uint8)
        image[10:30, 20:40] = 200
        (tmp_path / f"{camera}.jpg").write_bytes(encode_jpeg(image))
    images = [part for camera in ("static", "gripper") for part in ("--image", f"{camera}={tmp_path}/{camera}.jpg")]
    asked = ["predict", copied["url"], "--instruction", "open the drawer", *images, "--json"]
    answer = _run(*asked)
    assert answer["dims"][-1] == "gripper" and np.shape(answer["actions"]) == (4, 7)
    (tmp_path / "copy" / "meta-0.json").write_text("{}")  # a file that no marker names is nobody's business
    (weights,) = (tmp_path / "copy").glob("model-*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    spoilt = CliRunner().invoke(app, asked)
    assert spoilt.exit_code == 1 and "sha256 is not the marker's" in str(spoilt.exception)
    wrong = CliRunner().invoke(app, [*asked[:4], "--image", "static=nowhere.png"])
    assert "with a file that exists" in str(wrong.exception)


def test_serve_listens_on_loopback_with_a_token_of_its_own_and_ends_when_told(checkpoint: str, tmp_path: Path) -> None:
    environment = {**os.environ, "UPVLA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("UPVLA_POLICY_TOKEN", None)
    command = [sys.executable, "-m", "upvla.cli", "serve", checkpoint, "--port", "0", "--deadline-ms", "60000"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = [server.stderr.readline(), server.stderr.readline()]
        path = tmp_path / "secrets/policy_token"
        assert str(path) in lines[0] and oct(path.stat().st_mode)[-3:] == "600"
        url = lines[1].split()[-1]
        assert url.startswith("ws://127.0.0.1:")
        token = path.read_text()
        with RemotePolicy(url, token, deadline_s=None, timeout_s=60) as policy:
            policy.reset("open the drawer")
            assert policy.act(observation(0)).actions.shape == (4, 7)
        server.terminate()
        assert server.wait(120) in (0, -15)
        assert token not in "".join(lines) + server.stderr.read()


def test_doctor_names_what_is_missing_with_the_next_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPVLA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/ray_token").write_text("readable")
    (tmp_path / "secrets/ray_token").chmod(0o644)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("UPVLA_PORTS", f"mlflow={taken.getsockname()[1]}")
        done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1, done.exception
    found = {row["what"]: row for row in json.loads(done.stdout)}
    assert (found["torch"]["state"], found["disk"]["state"]) == ("ok", "ok")
    for what, move in (
        ("c++ compiler", "apt-get install -y g++"),
        ("secret ray_token", "chmod 600"),
        ("port of mlflow", "UPVLA_PORTS=mlflow=NUMBER"),
    ):
        assert found[what]["state"] == "broken" and move in found[what]["next_move"], found[what]
    assert found["servers"]["next_move"] == "`upvla up` starts it"
    assert found["rendering"]["state"] == "ok" and found["rendering"]["detail"].startswith("renderer ")


def test_promote_wants_one_thing() -> None:
    for arguments in ([], ["s3://models/x", "--to", "3"]):
        done = CliRunner().invoke(app, ["promote", *arguments])
        assert "a candidate, or --to VERSION" in str(done.exception)
