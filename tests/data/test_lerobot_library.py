"""What we export, opened by the LeRobot library itself in a Python of its own (docs/data-format.md).

UPVLA_LEROBOT names that Python; without it the test makes the environment where UPVLA_LEROBOT=build, else it skips.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.factories import write_calvin
from upvla.data.export import export_lerobot
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset, load_manifest
from upvla.images import decode_image
from upvla.store import open_store

_READ = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

dataset = LeRobotDataset("upvla/export", root=sys.argv[1])
rows = [dataset[i] for i in range(len(dataset))]
frames = {key: np.stack([row[key].numpy() for row in rows]) for key in rows[0] if key.startswith("observation.images.")}
np.savez(
    sys.argv[2],
    episodes=dataset.num_episodes,
    fps=dataset.fps,
    task=np.array([row["task"] for row in rows]),
    **{key.replace(".", "_"): np.rint(f.transpose(0, 2, 3, 1) * 255).astype(np.uint8) for key, f in frames.items()},
    **{key.rpartition(".")[2]: np.stack([row[key].numpy() for row in rows]) for key in ("action", "observation.state")},
    **{key: np.array([row[key].item() for row in rows]) for key in ("timestamp", "frame_index", "episode_index")},
)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("UPVLA_LEROBOT", "")
    if not named:
        pytest.skip(
            "LeRobot: set UPVLA_LEROBOT to the Python that holds it, or to 'build' (infra/lerobot.txt, gigabytes)"
        )
    if named != "build":
        return named
    folder = tmp_path_factory.mktemp("lerobot")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / "infra" / "lerobot.txt"], check=True)
    return python


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lerobot_library_reads_the_export_frame_for_frame(library: str, tmp_path: Path) -> None:
    store, sizes = open_store(str(tmp_path / "store")), {"static": (64, 64, 3), "gripper": (32, 32, 3)}
    raw = write_calvin(tmp_path / "raw", (20, 24, 18), **sizes)  # type: ignore[arg-type]
    ingest(store, IngestConfig(format="calvin", dataset="d", qa_per_episode=0), str(raw))
    dataset = Dataset(store, load_manifest(store, "d"))
    export_lerobot(dataset, open_store(str(tmp_path / "out")))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": ""}
    command = [library, "-c", _READ, str(tmp_path / "out"), str(tmp_path / "seen.npz")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, start = np.load(tmp_path / "seen.npz"), 0
    assert (int(seen["episodes"]), float(seen["fps"]), len(seen["task"])) == (3, 30.0, 62)
    for number, row in enumerate(dataset.episodes):
        part = slice(start, start + row.length)
        found = dataset.read(number, range(row.length), ["action", "state", "image_static", "image_gripper"])
        assert np.array_equal(seen["action"][part], found["action"])
        assert np.array_equal(seen["state"][part], found["state"])
        assert (seen["episode_index"][part] == number).all()
        assert np.array_equal(seen["frame_index"][part], np.arange(row.length))
        assert np.allclose(seen["timestamp"][part], np.arange(row.length) / 30, atol=1e-5)
        for camera in ("static", "gripper"):
            shown = np.stack([decode_image(frame) for frame in found[f"image_{camera}"]])
            error = np.abs(seen[f"observation_images_{camera}"][part].astype(int) - shown)
            assert error.max() <= 2  # another JPEG decoder
        texts = ["no instruction"] * row.length
        for span in reversed(row.spans):
            texts[span.start : span.end] = [span.text] * (span.end - span.start)
        assert seen["task"][part].tolist() == texts
        start += row.length
