"""What a person mistypes is answered in one sentence that names it: no traceback, nothing started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from upvla.checkpoint import registered_name
from upvla.cli import app
from upvla.cli_eval import _resolved
from upvla.errors import ConfigError, StackError, UpvlaError
from upvla.stack import load_site

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "typed",
    [
        "serve s3://m --port 99999",
        "serve s3://m --port -1",
        "serve s3://m --deadline-ms 0",
        "serve s3://m --threads 0",
        "serve s3://m --reload-every-s 0",
        "evaluate still --suite playtable-d --workers 0",
        "evaluate still --suite playtable-d --chains 0",
        "evaluate still --suite playtable-d --lanes 0",
        "evaluate still --suite playtable-d --replan 0",
        "evaluate still --suite playtable-d --videos -1",
        "collect --env metaworld-mt10 --chains 0",
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_range(typed: str) -> None:
    done = CliRunner().invoke(app, typed.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.exception
    assert re.search(rf"Invalid value for '{typed.split()[-2]}': .* or equal to \d", done.output), done.output


@pytest.mark.parametrize(
    ("typed", "kind", "said"),
    [
        ("predict ./m --instruction x --image a=README.md --state 1,x", ConfigError, r"--state '1,x': .*with commas"),
        (
            "mix --config pretrain/ci --set mixture=[",
            ConfigError,
            r"override 'mixture=\[': the value is not valid YAML",
        ),
        (
            "weights import clip . --to x --set backbone.blocks=y",
            ConfigError,
            r"'backbone\.blocks' in --set: .*integer",
        ),
        ("weights import clip . --to x --set backbone=[", ConfigError, r"override 'backbone=\[': .* not valid YAML"),
    ],
)
def test_a_value_that_cannot_be_read_is_named(
    typed: str, kind: type[UpvlaError], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UPVLA_SITE", "compose")  # whose servers are the environment's: none is looked for
    monkeypatch.setenv("UPVLA_STORE_URL", str(tmp_path))
    if typed.startswith("predict"):
        monkeypatch.setattr("upvla.images.decode_image", lambda data: data)
    done = CliRunner().invoke(app, typed.split())
    assert isinstance(done.exception, kind), done.exception
    with pytest.raises(kind, match=said):
        raise done.exception


@pytest.mark.parametrize("verb", ["up", "down"])
def test_a_home_that_cannot_be_is_named_with_the_variable_that_moves_it(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPVLA_HOME", "/dev/null/x")
    done = CliRunner().invoke(app, [verb])
    assert isinstance(done.exception, StackError), done.exception
    assert "/dev/null/x cannot be used (Not a directory): set UPVLA_HOME" in str(done.exception)
    assert CliRunner().invoke(app, ["status"]).exit_code == 0
    assert "run `upvla up`" in str(CliRunner().invoke(app, ["env"]).exception)


def test_ports_are_explained_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for ports, said in (
        ("mlflow=abc", r"^'mlflow' in UPVLA_PORTS: Input should be a valid integer.*\(got 'abc'\)$"),
        ("mlfow=5002", r"^unknown key 'mlfow' in UPVLA_PORTS; did you mean 'mlflow'\?$"),
    ):
        monkeypatch.setenv("UPVLA_PORTS", ports)
        with pytest.raises(ConfigError, match=said):
            load_site()


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("models:/m@champion", "m@champion"), ("models:/m/3", "m@3"), ("m@3", "m@3"), ("m", "m"),
        ("s3://models/m", ""), ("./m", ""), ("/a/m@3", ""), ("ws://127.0.0.1:1", ""),
    ],
)  # fmt: skip
def test_every_verb_knows_a_registered_model_by_the_same_names(typed: str, name: str) -> None:
    from upvla.cli_model import _newest
    from upvla.launch.line import Line

    assert registered_name(typed) == name
    version = SimpleNamespace(checkpoint=SimpleNamespace(url="s3://it", model_id="0123"), tags={"stats_id": "4567"})
    asked: list[str] = []
    line: Any = SimpleNamespace(version=lambda known: asked.append(known) or version)
    assert Line.checkpoint_url(line, typed) == ("s3://it" if name else typed)
    assert _resolved(typed, lambda: line)[0] == ("s3://it" if name else typed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("upvla.cli_model.open_line", lambda *about: line)
        assert _newest(typed, "local")() == (version if name else typed)
    assert asked == [name] * 3 if name else asked == []


def test_deploying_without_a_prefect_server_is_refused_by_name(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**kept, "PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "UPVLA_SITE": "compose"}
    done = subprocess.run(
        [sys.executable, "-m", "upvla.cli", "deploy"], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "PREFECT_API_URL names no Prefect server: set it" in done.stderr
    assert not list(tmp_path.glob("*.db"))
