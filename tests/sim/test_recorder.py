from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from upvla.data.quality import QualityLimits, check
from upvla.data.sources.calvin import CalvinSource
from upvla.errors import ConfigError
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.recorder import CollectConfig, collect
from upvla.sim.playtable.tasks import TASKS, succeeded

SMALL = CollectConfig(
    scenes=("A", "B"), tasks=("turn_on_led", "move_slider_left", "lift_red_block_table"), recordings_per_scene=1,
    tasks_per_recording=2, starts_per_task=1, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded")
    summary = collect(SMALL, out, workers=2)
    assert summary["recordings"] == 8  # a chain, and one start for each of three tasks, in two scenes
    assert all(tried == done for tried, done in summary["tasks"].values())
    return out


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "training").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def frames(split: Path, low: int, high: int) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(split / f"episode_{i:07d}.npz")) for i in range(low, high + 1)]


def test_a_killed_run_is_completed_with_identical_content(recorded: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        collect(SMALL, tmp_path, workers=1, progress=kill)
    (tmp_path / ".collect" / "00002.part").mkdir()  # as a kill in mid-recording leaves it
    seen = []
    collect(SMALL, tmp_path, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(3, 9)]
    assert digest(tmp_path) == digest(recorded)


def test_a_second_run_does_nothing_and_another_config_is_refused(recorded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*")}
    assert collect(SMALL, recorded)["recordings"] == 8
    assert {path: path.stat().st_mtime_ns for path in recorded.rglob("*")} == before
    with pytest.raises(ConfigError, match="choose another folder"):
        collect(SMALL.model_copy(update={"seed": 4}), recorded)


def test_layout_is_calvins(recorded: Path) -> None:
    """Against the small set of real CALVIN recordings where it is at hand."""
    shared = Path(os.environ.get("UPVLA_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    real = shared / "data" / "calvin_mini" / "training"
    if not real.exists():
        pytest.skip(f"no CALVIN recordings at {real}")
    ours, theirs = frames(recorded / "training", 0, 0)[0], frames(real, 0, 0)[0]
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    for name in ("ep_start_end_ids", "ep_lens"):
        a, b = np.load(recorded / "training" / f"{name}.npy"), np.load(real / f"{name}.npy")
        assert (a.dtype, a.ndim) == (b.dtype, b.ndim)
    a, b = (
        np.load(folder / "lang_annotations" / "auto_lang_ann.npy", allow_pickle=True).item()
        for folder in (recorded / "training", real)
    )
    assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
    assert a["language"]["emb"].shape[1:] == b["language"]["emb"].shape[1:]


def test_frames_hold_the_observation_before_the_action_and_the_pose_after_it(recorded: Path) -> None:
    low, high = np.load(recorded / "training" / "ep_start_end_ids.npy")[0]
    steps = frames(recorded / "training", low, high)
    for now, after in pairwise(steps):
        np.testing.assert_array_equal(now["actions"][:6], after["robot_obs"][:6])
        assert now["actions"][6] == now["rel_actions"][6] == after["robot_obs"][14]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_replayed_actions_repeat_the_recording(recorded: Path, dtype: type) -> None:
    """From the first frame's state alone, also after a trip through float32."""
    split = recorded / "training"
    ranges = np.load(split / "ep_start_end_ids.npy")
    language = np.load(split / "lang_annotations" / "auto_lang_ann.npy", allow_pickle=True).item()
    spans = list(zip(language["info"]["indx"], language["language"]["task"], strict=True))
    assert set(language["language"]["ann"]) <= {text for row in TASKS.values() for text in row.train}
    env = PlaytableEnv("A")
    for low, high in ranges[:4]:
        steps = frames(split, low, high)
        env.reset(steps[0]["robot_obs"].astype(dtype), steps[0]["scene_obs"].astype(dtype))
        if dtype is np.float64:
            np.testing.assert_array_equal(env.observe().images["static"], steps[0]["rgb_static"])
        starts = {first - low: (last - low, task) for (first, last), task in spans if low <= first <= high}
        assert starts
        for i, step in enumerate(steps):
            np.testing.assert_allclose(env.scene_state(), step["scene_obs"], atol=1e-9 if dtype is np.float64 else 1e-3)
            if i in starts:
                (last, task), before = starts[i], env.info()
            env.step(step["rel_actions"].astype(dtype))
            if i == last:
                assert succeeded(task, before, env.info())
    env.close()


def test_the_importer_takes_every_recording(recorded: Path) -> None:
    source = CalvinSource(str(recorded / "training"), span_end="inclusive")
    episodes = list(map(source.read, source.keys()))
    for episode in episodes:
        check(episode, QualityLimits())
    assert [len(episode.spans) for episode in episodes] == [2, 1, 1, 1, 2, 1, 1, 1]
    assert {episode.scene for episode in episodes} == {"playtable_A", "playtable_B"}
    shared = [episode for episode in episodes if len(episode.spans) == 1 and episode.scene == "playtable_A"]
    assert len({episode.spans[0].task for episode in shared}) == 3
    first = {(episode.state[0].tobytes(), bytes(episode.images["static"][0])) for episode in shared}
    assert len(first) == 1  # one initial state: only the instruction tells these apart


def test_unknown_scenes_and_tasks_are_refused() -> None:
    with pytest.raises(ValidationError, match="no scene 'Z'"):
        CollectConfig(scenes=("Z",))
    with pytest.raises(ValidationError, match="no task 'fly'"):
        CollectConfig(tasks=("fly",))
