from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.test_sources import UPVLA, write_my_robot
from tests.factories import write_calvin
from tests.launch.conftest import RayHead
from upvla.config import RunConfig, SiteConfig, load
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.sources.calvin import CalvinSource
from upvla.errors import JobFailed
from upvla.launch.ingest import run_ingest
from upvla.launch.pretrain import Pretraining
from upvla.store import open_store
from upvla.types import Episode

CONFIG = IngestConfig(format="calvin", dataset="table", recordings_per_task=2, validation_fraction=0.3)


class Mortal(CalvinSource):
    """Beside a file `deadly` its process is killed at the third recording: once, or while the file says `always`."""

    def read(self, key: str) -> Episode:
        deadly = Path(self.store.url, "deadly")
        if key == self.keys()[2] and deadly.exists():
            if deadly.read_text() != "always":
                deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(key)


@pytest.mark.seam
def test_ray_tasks_give_the_same_dataset(ray_head: RayHead, tmp_path: Path) -> None:
    recordings = write_calvin(tmp_path / "raw", (6, 8, 5, 7, 6), static=(48, 48, 3), gripper=(32, 32, 3))
    seen: list[tuple[int, int]] = []
    expected = ingest(open_store(str(tmp_path / "here")), CONFIG, str(recordings))
    found = run_ingest(open_store(str(tmp_path / "ray")), CONFIG, str(recordings), lambda *step: seen.append(step))
    assert found["content_id"] == expected["content_id"]
    assert seen[-1] == (5, 5) and len(seen) == 3


@pytest.mark.seam
def test_ray_tasks_find_a_format_that_lies_in_the_working_directory(ray_head: RayHead, tmp_path: Path) -> None:
    """Typed as a person does, from a folder that the cluster does not know."""
    write_my_robot(tmp_path / "raw")
    (tmp_path / "mine_here.py").write_text((ROOT / "examples" / "my_robot.py").read_text())
    command = (
        "ingest --format mine_here:MyRobot --source raw --dataset mine --root store --recordings-per-task 1 --json"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [UPVLA, *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recordings"] == 2


@pytest.mark.seam
def test_the_data_report_is_an_artifact_of_the_versions_run(tmp_path: Path) -> None:
    site = SiteConfig(
        home=tmp_path, store_url=str(tmp_path / "store"), tracking_url=f"sqlite:///{tmp_path}/mlflow.db", experiment="t"
    )
    line = Pretraining(site, load("pretrain/ci", RunConfig, ["data.ingest.options.span_end=exclusive"]))
    line.logbook.tracker.client.create_experiment("t", artifact_location=f"{tmp_path}/artifacts")
    recordings = write_calvin(tmp_path / "raw", (6, 8), static=(48, 48, 3), gripper=(32, 32, 3))
    for _ in range(2):  # the second time it is the same run
        found = line.ingest(str(recordings))
        run_id = line.logbook.tracker.run_id(f"dataset/{found['content_id']}", "")
        (page,) = line.logbook.tracker.artifacts(run_id, "data")
        assert (tmp_path / "artifacts" / run_id / "artifacts" / page).read_bytes() == Path(found["report"]).read_bytes()
    run = line.logbook.tracker.client.get_run(run_id)
    assert run.info.run_name == f"dataset {found['dataset']}@1"
    assert run.data.tags["mlflow.parentRunId"] == line.logbook.pipeline_id()


@pytest.mark.slow
@pytest.mark.seam
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_portion_only(ray_head: RayHead, tmp_path: Path) -> None:
    recordings = write_calvin(tmp_path / "raw", (6, 8, 5, 7, 6), static=(48, 48, 3), gripper=(32, 32, 3))
    config = CONFIG.model_copy(update={"format": f"{__name__}:{Mortal.__name__}"})
    expected = ingest(open_store(str(tmp_path / "calm")), config, str(recordings))
    (recordings / "deadly").write_text("once")
    found = run_ingest(open_store(str(tmp_path / "once")), config, str(recordings))
    assert (found["version"], found["content_id"]) == (1, expected["content_id"])
    assert not (recordings / "deadly").exists()  # it did happen
    (recordings / "deadly").write_text("always")
    store = open_store(str(tmp_path / "always"))
    with pytest.raises(JobFailed, match=r"WorkerCrashedError.*run it again"):
        run_ingest(store, config, str(recordings))
    assert store.list("datasets/table/_manifest") == []
    (recordings / "deadly").unlink()
    assert run_ingest(store, config, str(recordings))["content_id"] == expected["content_id"]
