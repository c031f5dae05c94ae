"""What a person types: help with an example for every verb, and errors in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from upvla.cli import app

ROOT = Path(__file__).parents[1]
VERBS = (
    "up", "down", "status", "env", "doctor",
    "collect", "ingest", "mix", "train", "evaluate", "weights import", "demo",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert re.search(rf"Example: .*upvla {verb}", shown.output)


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
    code = "import upvla.cli as c; c.app.command('stop')(lambda: (_ for _ in ()).throw(KeyboardInterrupt)); c.main()"
    done = subprocess.run([sys.executable, "-c", code, "stop"], capture_output=True, text=True, timeout=120, cwd=ROOT)
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
