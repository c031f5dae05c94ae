"""The README's code runs, in its order, as a reader would type it, the demo at its CI size; and a demo that is finished
does nothing when it is run again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HERE = ("make test",)  # this very command runs the tests
WRITTEN_AGAIN = ("mixtures/", "reports/")  # small and named by content, or the answer to who asked
STATE = """
import json, os
from upvla import stack
os.environ.update(stack.environment(stack.load_site("local")))
from ray.job_submission import JobSubmissionClient
from upvla.launch.pretrain import open_pretraining
from upvla.tracking import Registry

line = open_pretraining("pretrain/ci", "local")
os.environ["RAY_API_SERVER_ADDRESS"] = line.site.ray_jobs_url
tracker = line.logbook.tracker
here = [tracker.experiment_id()]
raw = [path for path in line.site.raw_folder.rglob("*") if path.is_file()]
print("STATE", json.dumps({
    "objects": line.store.modified(),
    "recordings": {str(path): path.stat().st_mtime_ns for path in raw},
    "jobs": {job.submission_id: job.end_time for job in JobSubmissionClient().list_jobs() if job.submission_id},
    "runs": {run.info.run_id: run.data.metrics for run in tracker.client.search_runs(here, max_results=5000)},
    "models": {model.model_id: "" for model in tracker.client.search_logged_models(here)},
    "versions": {version.version: version.alias for version in Registry(tracker).versions(line.model_name)},
}))
"""


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A shell in the checkout. A stack that stands at UPVLA_HOME is used and left; one started here is stopped."""
    home, tmp_path = os.environ.get("UPVLA_HOME"), tmp_path_factory.mktemp("reader")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    yield {**os.environ, "DEMO": "ci", "PATH": path, "UPVLA_HOME": home or str(tmp_path / "home")}
    if home is None:
        left = {**os.environ, "UPVLA_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-m", "upvla.cli", "down"], env=left, cwd=ROOT, check=True, timeout=120)


@pytest.mark.e2e
@pytest.mark.timeout(1600)
def test_every_code_block_of_the_readme_executes(reader: dict[str, str]) -> None:
    listed = blocks()
    assert {language for language, _ in listed} == {"bash", "python"}
    script = ["set -euo pipefail"]
    for language, code in listed:
        if language == "python":
            script += ["python - <<'END'", code.rstrip(), "END"]
        else:
            script += [line for line in code.splitlines() if not line.startswith(HERE)]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env=reader, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "(1, 10, 7)" in done.stdout


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_finished_demo_does_no_work_again(reader: dict[str, str]) -> None:
    """After the README's: nothing is recorded, written, trained, judged, logged or registered a second time."""
    before = state(reader)
    assert before["objects"] and before["recordings"] and before["versions"]
    again = [sys.executable, "-m", "upvla.cli", "demo", "--size", "ci"]
    done = subprocess.run(again, env=reader, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = state(reader)
    for what, was in before.items():
        now = after[what]
        changed = {name for name in was | now if was.get(name) != now.get(name)}
        assert not [name for name in changed if not name.startswith(WRITTEN_AGAIN)], what


def state(reader: dict[str, str]) -> dict[str, Any]:
    """What a line has left behind, and when: objects, files, jobs, runs, models, versions."""
    told = subprocess.run(
        [sys.executable, "-c", STATE], env=reader, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return dict(json.loads(told.stdout.rpartition("STATE ")[2]))
