from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import ROOT, S3Server
from tests.factories import write_calvin
from upvla.data.actions import LIBERO
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.quality import QualityLimits, check
from upvla.data.sources import detect_format, open_source
from upvla.data.sources.lerobot import LeRobotSource
from upvla.data.sources.tfrecord import RecordFile, _example_class, crc32c, masked_crc32c, parse_example
from upvla.data.table import Dataset, load_manifest
from upvla.errors import BadEpisode, ConfigError, Corrupt, Mismatch, NotFound, StoreError
from upvla.images import decode_image, encode_jpeg
from upvla.store import open_store
from upvla.store.readonly import FsspecStore
from upvla.types import CALVIN_RELATIVE, KnowsLengths, Span

STEPS = 12
UPVLA = Path(sys.executable).with_name("upvla")  # the console script: its path lacks the working directory


def pictures(steps: int = STEPS, size: int = 32, seed: int = 0) -> list[np.ndarray]:
    rows, columns = np.mgrid[:size, :size]
    waves = [np.sin(rows / 5 + 0.3 * (t + seed)) + np.cos(columns / 7) for t in range(steps)]
    return [np.stack([120 + 50 * wave, 100 + 20 * wave, 90 - 30 * wave], -1).astype(np.uint8) for wave in waves]


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------- LeRobot


def shared(name: str) -> Path:
    folder = Path(os.environ.get("UPVLA_SHARED", ROOT.parent / "shared"), "data", name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: set UPVLA_SHARED to the folder that holds data/{name}")
    return folder


def test_lerobot_v3_frames_are_the_public_librarys() -> None:
    folder = shared("lerobot_v3_image")
    source = open_source("lerobot", str(folder), action_space="calvin_relative")
    assert len(source.keys()) == 4
    table = pq.read_table(folder / "data")
    start = 0
    for number, key in enumerate(source.keys()):
        episode = source.read(key)
        check(episode, QualityLimits())
        rows = table.slice(start, len(episode))
        assert set(rows["episode_index"].to_pylist()) == {number}
        assert np.array_equal(episode.actions, np.array(rows["action"].to_pylist(), np.float32))
        assert np.array_equal(episode.state, np.array(rows["observation.state"].to_pylist(), np.float32))
        assert episode.images["static"] == [value["bytes"] for value in rows["observation.images.static"].to_pylist()]
        start += len(episode)
    assert start == len(table) == 154
    assert source.read("episode_000000").spans[0].text == "pick up the blue block in the sliding cabinet"


def test_lerobot_v3_video_shows_the_same_frames_as_its_twin_of_pictures() -> None:
    videos = open_source("lerobot", str(shared("lerobot_v3_video")), action_space="calvin_relative")
    images = open_source("lerobot", str(shared("lerobot_v3_image")), action_space="calvin_relative")
    for key in ("episode_000003", "episode_000001"):  # in any order
        seen, meant = videos.read(key), images.read(key)
        assert np.array_equal(seen.actions, meant.actions) and seen.spans == meant.spans
        for camera in ("static", "gripper"):
            mine, theirs = (np.stack([decode_image(f) for f in e.images[camera]]).astype(int) for e in (seen, meant))
            error = np.abs(mine - theirs).mean((1, 2, 3))
            assert error.max() < 12  # what AV1 and JPEG lose
            moves = theirs[1:] - theirs[:-1]  # where pictures change, the video changes with them, not a frame later
            best = [
                float(np.sum((mine[2:-1] - mine[1:-2]) * moves[1 + lag : len(moves) - 1 + lag])) for lag in (-1, 0, 1)
            ]
            assert best[1] == max(best)


def test_lerobot_says_nothing_of_actions_so_it_is_asked() -> None:
    folder = shared("lerobot_v3_image")
    with pytest.raises(ConfigError, match=r"action_space.*dt_s.*convention"):
        open_source("lerobot", str(folder))
    with pytest.raises(ConfigError, match=r"shape \[7\].*none 0 dimensions"):
        open_source("lerobot", str(folder), action_space="none")
    with pytest.raises(ConfigError, match=r"no feature 'tactile'; there is: observation\.images\.static"):
        open_source("lerobot", str(folder), action_space="calvin_relative", cameras={"static": "tactile"})


def test_lerobot_at_another_rate_than_its_actions_is_refused(tmp_path: Path) -> None:
    path = write_lerobot_v21(tmp_path / "set") / "meta/info.json"
    path.write_text(path.read_text().replace('"fps": 30', '"fps": 10'))
    with pytest.raises(
        ConfigError, match=r"set runs at 10 Hz, the action space calvin_relative holds for 0\.0333333 s"
    ):
        open_source("lerobot", str(tmp_path / "set"), action_space="calvin_relative")


def test_a_declared_space_does_not_contradict_the_one_that_a_lerobot_set_carries(tmp_path: Path) -> None:
    path = write_lerobot_v21(tmp_path / "set") / "meta/info.json"
    info = json.loads(path.read_text()) | {"upvla": {"action_space": CALVIN_RELATIVE.to_json()}}
    path.write_text(json.dumps(info))
    for declared in ({}, {"action_space": "calvin_relative"}):
        source = open_source("lerobot", str(tmp_path / "set"), **declared)
        assert source.read("episode_000000").action_space == CALVIN_RELATIVE
    turned = CALVIN_RELATIVE.to_json()
    turned["dims"][6]["convention"] = "-1=open,+1=close"
    both = r"dimension 6 \(gripper\) differs in 'convention': the option action_space has '-1=open,\+1=close', LeRobot"
    with pytest.raises(Mismatch, match=f"{both}.*set has '\\+1=open,-1=close'; leave the option out"):
        open_source("lerobot", str(tmp_path / "set"), action_space=turned)
    with pytest.raises(Mismatch, match=r"dimension 0 \(dx\).*leave the option out"):
        open_source("lerobot", str(tmp_path / "set"), action_space="libero")
    path.write_text(json.dumps(info | {"upvla": {"action_space": {"name": "x"}}}))
    with pytest.raises(ConfigError, match=r"upvla\.action_space of meta/info\.json\): action_space: dims"):
        open_source("lerobot", str(tmp_path / "set"), action_space="calvin_relative")


def write_lerobot_v21(folder: Path, lengths: Sequence[int] = (STEPS, 9), codec: str = "mpeg4") -> Path:
    (folder / "meta").mkdir(parents=True)
    features: dict[str, Any] = {
        "observation.images.top": {"dtype": "video", "shape": [32, 32, 3]},
        "observation.state": {"dtype": "float32", "shape": [3]},
        "action": {"dtype": "float32", "shape": [7]},
    }
    info = {"codebase_version": "v2.1", "fps": 30, "robot_type": "so100", "features": features, "chunks_size": 1}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = ["open it", "close it"]
    lines = [json.dumps({"task_index": i, "task": task}) for i, task in enumerate(tasks)]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    rows = [json.dumps({"episode_index": i, "tasks": tasks, "length": n}) for i, n in enumerate(lengths)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(rows) + "\n")
    for number, length in enumerate(lengths):
        columns = {
            "observation.state": np.full((length, 3), number, np.float32).tolist(),
            "action": np.c_[np.sin(np.arange(length * 6)).reshape(length, 6), np.ones(length)].tolist(),
            "timestamp": np.arange(length, dtype=np.float32) / np.float32(30),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "task_index": (np.arange(length) >= 5).astype(int),
        }
        path = folder / info["data_path"].format(episode_chunk=number, episode_index=number)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path)
        video = Path(
            folder,
            info["video_path"].format(episode_chunk=number, episode_index=number, video_key="observation.images.top"),
        )
        video.parent.mkdir(parents=True)
        write_video(video, pictures(length, seed=10 * number), codec)
    return folder


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str = "mpeg4") -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 4_000_000  # type: ignore[attr-defined]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]


def test_lerobot_v21_has_a_file_an_episode(tmp_path: Path) -> None:
    folder = write_lerobot_v21(tmp_path / "set")
    fsspec.filesystem("memory").put(str(folder), "/lerobot-v21", recursive=True)
    for url in (str(folder), "memory://lerobot-v21"):
        assert detect_format(url) == "lerobot"
        source = open_source("lerobot", url, action_space=CALVIN_RELATIVE.to_json())
        assert source.keys() == ["episode_000000", "episode_000001"]
        for number, key in enumerate(source.keys()):
            episode = source.read(key)
            check(episode, QualityLimits())
            assert isinstance(source, KnowsLengths) and source.num_steps(key) == len(episode)
            assert episode.embodiment == "so100" and (episode.state == number).all()
            assert episode.spans == (Span(0, 5, "open it", "open it"), Span(5, len(episode), "close it", "close it"))
            for mine, theirs in zip(episode.images["top"], pictures(len(episode), seed=10 * number), strict=True):
                assert np.abs(decode_image(mine).astype(int) - theirs).mean() < 8


def test_a_new_task_is_nothing_to_the_lerobot_episodes_that_were_there(tmp_path: Path) -> None:
    folder = write_lerobot_v21(tmp_path / "set")

    def tokens() -> list[str]:
        source = open_source("lerobot", str(folder), action_space=CALVIN_RELATIVE.to_json())
        return [source.token(key) for key in source.keys()]

    before, tasks = tokens(), folder / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text() + json.dumps({"task_index": 2, "task": "wipe it"}) + "\n")
    assert tokens() == before
    seen = set(before)
    for old, new in (("close it", "shut it"), ("shut it", "shut it up")):  # the episodes still say "close it"
        tasks.write_text(tasks.read_text().replace(old, new))
        assert not set(tokens()) & seen
        seen |= set(tokens())


def write_lerobot_v30(folder: Path, files: Sequence[Sequence[int]]) -> Path:
    """Numbers without pictures: data files of several episodes each, whose actions are their numbers."""
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    numbers = {"dtype": "float32", "shape": [7]}
    info = {"codebase_version": "v3.0", "fps": 30, "features": {"observation.state": numbers, "action": numbers}}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    (folder / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.table({"task_index": [0], "task": ["open it"]}), folder / "meta/tasks.parquet")
    episodes: list[dict[str, int]] = []
    start = 0
    for file, lengths in enumerate(files):
        tables = []
        for length in lengths:
            columns = {
                "observation.state": np.full((length, 7), len(episodes), np.float32).tolist(),
                "action": np.full((length, 7), len(episodes), np.float32).tolist(),
                "timestamp": np.arange(length, dtype=np.float32) / np.float32(30),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, len(episodes)),
                "task_index": np.zeros(length, int),
            }
            tables.append(pa.table(columns))
            where = {"data/chunk_index": 0, "data/file_index": file, "dataset_from_index": start}
            episodes.append({"episode_index": len(episodes), "length": length} | where)
            start += length
        pq.write_table(pa.concat_tables(tables), folder / f"data/chunk-000/file-{file:03d}.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def test_lerobot_v3_episodes_are_found_without_looking_through_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [[3, 9, 4] * 4, [5, 2] * 5]
    source = open_source("lerobot", str(write_lerobot_v30(tmp_path / "set", lengths)), action_space="calvin_relative")
    asked: list[int] = []
    data_key = LeRobotSource._data_key

    def counted(self: LeRobotSource, row: Mapping[str, Any]) -> str:
        asked.append(int(row["episode_index"]))
        return data_key(self, row)

    monkeypatch.setattr(LeRobotSource, "_data_key", counted)
    for number, (key, length) in enumerate(zip(source.keys(), [*lengths[0], *lengths[1]], strict=True)):
        episode = source.read(key)
        assert episode.actions.shape == (length, 7) and (episode.actions == number).all()
    assert sorted(asked) == sorted([*range(22), *range(22)])  # once for itself, once to learn where its file begins


def test_lerobot_episodes_may_be_described_in_columns_of_others(tmp_path: Path) -> None:
    path = write_lerobot_v30(tmp_path / "set", [[3, 4]]) / "meta/episodes/chunk-000/file-000.parquet"
    table, seen = pq.read_table(path), set[str]()
    for values in ([1.0, 2.0], [1.0, np.nan], [datetime(2026, 1, 1)] * 2, [datetime(2026, 1, 2)] * 2, [b"\xff"] * 2):
        pq.write_table(table.append_column("recorded", pa.array(values)), path)
        source = open_source("lerobot", str(tmp_path / "set"), action_space="calvin_relative")
        seen |= {source.token(key) for key in source.keys()}
        assert [len(source.read(key)) for key in source.keys()] == [3, 4]
    assert len(seen) == 9  # the first episode's 1.0 is said twice


def test_a_video_of_huge_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("lerobot", str(write_lerobot_v21(tmp_path / "set")), action_space="calvin_relative")
    monkeypatch.setattr("upvla.data.sources.lerobot.MAX_PIXELS", 32 * 32 - 1)
    with pytest.raises(BadEpisode, match=r"episode_000000: .*mp4 claims frames of 32x32 pixels") as caught:
        source.read("episode_000000")
    assert caught.value.reason == "zip_bomb"


def _broken_lerobot(folder: Path, how: str) -> None:
    data = folder / "data/chunk-000/episode_000000.parquet"
    video = folder / "videos/chunk-000/observation.images.top/episode_000000.mp4"
    table = pq.read_table(data)
    if how == "no data":
        data.unlink()
    elif how == "cut data":
        data.write_bytes(data.read_bytes()[:-20])
    elif how == "fewer rows":
        pq.write_table(table.slice(0, 5), data)
    elif how == "another's rows":
        pq.write_table(pq.read_table(folder / "data/chunk-001/episode_000001.parquet"), data)
        lines = (folder / "meta/episodes.jsonl").read_text().replace(f'"length": {STEPS}', '"length": 9')
        (folder / "meta/episodes.jsonl").write_text(lines)
    elif how == "no column":
        pq.write_table(table.drop_columns(["observation.state"]), data)
    elif how == "words":
        words = pa.array(["x"] * len(table))
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", words), data)
    elif how == "ragged":
        lists = pa.array([[0.0] * (6 if i else 8) if i < 2 else [0.0] * 7 for i in range(len(table))])
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", lists), data)
    elif how == "no video":
        video.unlink()
    elif how == "cut video":
        video.write_bytes(video.read_bytes()[:400])
    elif how == "short video":
        write_video(video, pictures(4))
    elif how == "late rows":
        late = pa.array(np.arange(len(table), dtype=np.float32) / np.float32(30) + np.float32(0.05))
        pq.write_table(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", late), data)
    elif how == "unknown task":
        strange = pa.array([7] * len(table))
        pq.write_table(table.set_column(table.schema.get_field_index("task_index"), "task_index", strange), data)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no data", "missing_frame"),
        ("cut data", "unreadable_frame"),
        ("fewer rows", "frame_count"),
        ("another's rows", "frame_count"),
        ("no column", "schema"),
        ("words", "dtype"),
        ("ragged", "shape"),
        ("no video", "missing_frame"),
        ("cut video", "unreadable_image"),
        ("short video", "missing_frame"),
        ("late rows", "time"),
        ("unknown task", "schema"),
    ],
)
def test_a_broken_lerobot_episode_is_named_and_the_next_is_read(tmp_path: Path, how: str, reason: str) -> None:
    folder = write_lerobot_v21(tmp_path / "set")
    _broken_lerobot(folder, how)
    source = open_source("lerobot", str(folder), action_space="calvin_relative")
    with pytest.raises(BadEpisode, match="episode_000000") as caught:
        source.read("episode_000000")
    assert caught.value.reason == reason
    assert len(source.read("episode_000001")) == 9


# ------------------------------------------------------------------------------------------------------------- RLDS


def test_crc32c_has_its_published_value_and_lanes_agree_with_bytes() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, has the zeros
    assert crc32c(bytes(32)) == 0x8A9136AA
    rng = np.random.Generator(np.random.Philox(0))
    for size in (1024 * 16, 1024 * 16 + 1, 100_001):
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        slow = 0xFFFFFFFF
        for byte in data:
            slow ^= byte
            for _ in range(8):
                slow = slow >> 1 ^ (0x82F63B78 if slow & 1 else 0)
        assert crc32c(data) == slow ^ 0xFFFFFFFF


def test_a_hand_made_example_is_parsed() -> None:
    """Bytes written out after the protobuf encoding: map entries of key 1 and value 2."""
    floats = b"\x12\x0a\x0a\x08" + struct.pack("<2f", 1.5, -2.0)  # Feature.float_list, packed
    ints = b"\x1a\x04\x0a\x02\x03\x04"  # Feature.int64_list, packed
    text = b"\x0a\x04\x0a\x02hi"  # Feature.bytes_list
    entries = b""
    for key, value in ((b"f", floats), (b"i", ints), (b"t", text)):
        entry = b"\x0a\x01" + key + b"\x12" + bytes([len(value)]) + value
        entries += b"\x0a" + bytes([len(entry)]) + entry
    found = parse_example(b"\x0a" + bytes([len(entries)]) + entries, "x")
    assert found["f"].tolist() == [1.5, -2.0] and found["i"].tolist() == [3, 4] and found["t"] == [b"hi"]
    with pytest.raises(BadEpisode):
        parse_example(b"\x0a\xff\xff", "x")


def example_bytes(features: Mapping[str, Any]) -> bytes:
    message = _example_class()()
    for key, values in features.items():
        feature = message.features.feature[key]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        else:
            feature.float_list.value.extend(np.ravel(values).tolist())
    return bytes(message.SerializeToString())


def write_records(path: Path, records: Sequence[bytes]) -> None:
    parts = []
    for data in records:
        header = struct.pack("<Q", len(data))
        parts += [header, struct.pack("<I", masked_crc32c(header)), data, struct.pack("<I", masked_crc32c(data))]
    path.write_bytes(b"".join(parts))


def bridge_episode(steps: int, seed: int) -> dict[str, Any]:
    rng = np.random.Generator(np.random.Philox(seed))
    action = rng.uniform(-0.05, 0.05, (steps, 7))
    action[:, 6] = rng.uniform(0, 1, steps)
    return {
        "steps/observation/image_0": [encode_jpeg(frame) for frame in pictures(steps, seed=seed)],
        "steps/observation/state": rng.normal(0, 1, (steps, 7)),
        "steps/action": action,
        "steps/language_instruction": [b"put the carrot on the plate"] * steps,
        "episode_metadata/file_path": [b"/raw/traj0"],
    }


def write_bridge(folder: Path, shards: Sequence[Sequence[int]] = ((7, 8), (9,))) -> Path:
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    seed = 0
    for number, lengths in enumerate(shards):
        records = []
        for length in lengths:
            records.append(example_bytes(bridge_episode(length, seed)))
            seed += 1
        write_records(folder / f"bridge_dataset-train.tfrecord-{number:05d}-of-{len(shards):05d}", records)
    return folder


def test_rlds_episodes_come_through_the_declared_layout(tmp_path: Path) -> None:
    folder = write_bridge(tmp_path / "1.0.0")
    assert detect_format(str(folder)) == "rlds"
    source = open_source("rlds", str(folder), layout="bridge_v2", split="train")
    assert [key.rpartition("/")[2] for key in source.keys()] == ["000000", "000001", "000000"]
    for seed, (key, length) in enumerate(zip(source.keys(), (7, 8, 9), strict=True)):
        episode, meant = source.read(key), bridge_episode(length, seed)
        check(episode, QualityLimits())
        assert episode.images["static"] == meant["steps/observation/image_0"]
        assert np.allclose(episode.actions, meant["steps/action"]) and episode.embodiment == "widowx"
        assert episode.spans == (Span(0, length, "put the carrot on the plate", "put the carrot on the plate"),)
    with pytest.raises(NotFound, match="split 'val'"):
        open_source("rlds", str(folder), layout="bridge_v2", split="val")


def write_known(folder: Path, frames: Sequence[str], numbers: Mapping[str, int], words: str) -> Path:
    """A set of one episode of six steps: pictures under the names `frames`, columns of a width each under `numbers`,
    and under `words` an instruction that changes half-way."""
    features: dict[str, Any] = {
        name: [encode_jpeg(picture) for picture in pictures(6, seed=place)] for place, name in enumerate(frames)
    }
    for place, (name, width) in enumerate(numbers.items()):
        features[name] = np.full((6, width), 0.125 * place) + np.arange(6)[:, None] / 64
    features[words] = [b"pick the can"] * 3 + [b""] + [b"open the drawer"] * 2
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    write_records(folder / "known-train.tfrecord-00000-of-00001", [example_bytes(features)])
    return folder


_STEPS, _SEEN = "steps", "steps/observation"
FRACTAL_ACTIONS = {
    "name": "fractal",
    "dt_s": 1 / 3,
    "dims": [
        *({"name": f"d{n}", "unit": "m", "frame": "world", "mode": "relative"} for n in "xyz"),
        *(
            {"name": f"r{n}", "unit": "rad", "frame": "world", "mode": "relative", "convention": "euler_xyz"}
            for n in "xyz"
        ),
        {
            "name": "gripper",
            "unit": "gripper",
            "frame": "none",
            "mode": "absolute",
            "convention": "-1=open,+1=close,continuous",
        },
    ],
}


@pytest.mark.parametrize(
    ("layout", "space", "frames", "state", "action", "words", "robot"),
    [
        (
            "droid",
            None,
            {"static": f"{_SEEN}/exterior_image_1_left", "gripper": f"{_SEEN}/wrist_image_left"},
            {f"{_SEEN}/cartesian_position": 6, f"{_SEEN}/gripper_position": 1, f"{_SEEN}/joint_position": 7},
            {f"{_STEPS}/action_dict/cartesian_position": 6, f"{_STEPS}/action_dict/gripper_position": 1},
            f"{_STEPS}/language_instruction",
            ("franka_panda", 15, "droid", "absolute"),
        ),
        (
            "fractal",
            FRACTAL_ACTIONS,
            {"static": f"{_SEEN}/image"},
            {f"{_SEEN}/base_pose_tool_reached": 7, f"{_SEEN}/gripper_closed": 1},
            {
                f"{_STEPS}/action/world_vector": 3,
                f"{_STEPS}/action/rotation_delta": 3,
                f"{_STEPS}/action/gripper_closedness_action": 1,
            },
            f"{_SEEN}/natural_language_instruction",
            ("google_robot", 3, "fractal", "relative"),
        ),
    ],
)
def test_known_layouts_are_read_as_their_sets_have_them(
    tmp_path: Path,
    layout: str,
    space: dict[str, Any] | None,
    frames: dict[str, str],
    state: dict[str, int],
    action: dict[str, int],
    words: str,
    robot: tuple[str, float, str, str],
) -> None:
    folder = write_known(tmp_path / "set", [*frames.values(), "steps/observation/depth"], state | action, words)
    source = open_source("rlds", str(folder), layout=layout, **({"action_space": space} if space else {}))
    (key,) = source.keys()
    episode = source.read(key)
    check(episode, QualityLimits())
    dims = episode.action_space.dims
    assert (episode.embodiment, episode.rate_hz, episode.action_space.name, dims[0].mode) == robot
    assert [dim.unit for dim in dims] == ["m"] * 3 + ["rad"] * 3 + ["gripper"]
    assert list(episode.images) == list(frames)
    for place, camera in enumerate(frames):
        assert episode.images[camera] == [encode_jpeg(picture) for picture in pictures(6, seed=place)]
    places = np.repeat(np.arange(len(state | action)), list((state | action).values()))
    meant = 0.125 * places + np.arange(6)[:, None] / 64
    assert np.allclose(np.c_[episode.state, episode.actions], meant)
    assert episode.state.shape == (6, sum(state.values())) and episode.actions.shape == (6, 7)
    assert episode.spans == (
        Span(0, 3, "pick the can", "pick the can"),
        Span(4, 6, "open the drawer", "open the drawer"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"option layout: one of bridge_v2, droid, fractal.*cameras, state, action"),
        ({"layout": "fractal"}, "does not say what its actions mean"),
        ({"layout": {"cameras": {}, "state": ["s"], "action": ["a"], "rate_hz": 5}}, "layout: cameras"),
        ({"layout": "bridge_v2", "action_space": "libero"}, "runs at 5 Hz, the action space libero"),
    ],
)
def test_rlds_that_is_not_declared_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source("rlds", str(write_bridge(tmp_path / "set")), **options)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flip", "unreadable_frame"),
        ("flip length", "unreadable_frame"),
        ("cut", "unreadable_frame"),
        ("no feature", "schema"),
        ("bytes", "dtype"),
        ("short", "frame_count"),
    ],
)
def test_a_damaged_record_is_one_bad_episode(tmp_path: Path, how: str, reason: str) -> None:
    folder = write_bridge(tmp_path / "set", [(7, 8)])
    path = next(folder.glob("*tfrecord*"))
    data = bytearray(path.read_bytes())
    first, second = bridge_episode(7, 0), bridge_episode(8, 1)
    if how in ("flip", "flip length", "cut"):
        second_start = len(data) - len(example_bytes(second)) - 16
        if how == "cut":
            data = data[:-30]
        else:
            data[second_start + (3000 if how == "flip" else 2)] ^= 4
        path.write_bytes(data)
    else:
        changes = {
            "no feature": {"steps/action": None},
            "bytes": {"steps/action": [b"x"]},
            "short": {"steps/action": second["steps/action"][:7]},
        }
        broken = {k: v for k, v in (second | changes[how]).items() if v is not None}
        write_records(path, [example_bytes(first), example_bytes(broken)])
    source = open_source("rlds", str(folder), layout="bridge_v2")
    good, bad = source.keys()
    assert len(source.read(good)) == 7
    with pytest.raises(BadEpisode) as caught:
        source.read(bad)
    assert caught.value.reason == reason


def test_records_are_read_in_any_order(tmp_path: Path) -> None:
    write_records(tmp_path / "r", [bytes([n]) * (n + 1) for n in range(5)])
    file = RecordFile(open_store(str(tmp_path)), "r")
    assert [file.read(n)[0] for n in (4, 0, 2)] == [4, 0, 2] and file.count() == 5


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(object, bytes) of every request to a store that is neither a folder nor S3, from now on."""
    seen: list[tuple[str, int]] = []
    plain = {name: getattr(FsspecStore, name) for name in ("read", "read_ranges")}

    def read(self: FsspecStore, key: str) -> bytes:
        seen.append((key, self.size(key)))
        return bytes(plain["read"](self, key))

    def read_ranges(self: FsspecStore, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        seen.extend((key, end - start) for start, end in ranges)
        return list(plain["read_ranges"](self, key, ranges))

    monkeypatch.setattr(FsspecStore, "read", read)
    monkeypatch.setattr(FsspecStore, "read_ranges", read_ranges)
    return seen


def test_a_remote_rlds_set_is_listed_from_its_description_and_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = write_bridge(tmp_path / "set", [(7, 8, 6), (9, 5)]), count_requests(monkeypatch)
    meant = [
        open_source("rlds", str(folder), layout="bridge_v2").read(f"{path.name}/000000")
        for path in sorted(folder.glob("*tfrecord*"))
    ]
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/rlds-plain", recursive=True)
    walked = open_source("rlds", "memory://rlds-plain", layout="bridge_v2").keys()
    described = {"splits": [{"name": "train", "shardLengths": ["3", "2"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(described))
    files.put(str(folder), "/rlds-described", recursive=True)
    seen.clear()
    source = open_source("rlds", "memory://rlds-described", layout="bridge_v2")
    assert source.keys() == walked == open_source("rlds", str(folder), layout="bridge_v2").keys()
    assert [key for key, _ in seen] == ["dataset_info.json"]
    seen.clear()
    assert [len(source.read(key)) for key in source.keys()] == [7, 8, 6, 9, 5]
    assert len(seen) <= 4  # a header and a block a file
    for key, episode in zip((walked[0], walked[3]), meant, strict=True):
        assert source.read(key).images == episode.images
    described["splits"][0]["shardLengths"] = ["3", "1"]
    files.pipe_file("/rlds-described/dataset_info.json", json.dumps(described).encode())
    with pytest.raises(Corrupt, match=r"goes on after the 1 records that dataset_info.json says; correct or remove"):
        open_source("rlds", "memory://rlds-described", layout="bridge_v2").read(walked[3])


def test_an_rlds_file_that_its_description_does_not_know_is_walked(tmp_path: Path) -> None:
    folder = write_bridge(tmp_path / "set", [(7, 8)])
    keys = open_source("rlds", str(folder), layout="bridge_v2").keys()
    assert len(keys) == 2
    for text in (
        "{}",
        "no JSON",
        '{"splits": [{"name": "train", "shardLengths": ["1", "1"]}]}',
        '{"splits": [{"name": "x"}]}',
    ):
        (folder / "dataset_info.json").write_text(text)
        assert open_source("rlds", str(folder), layout="bridge_v2").keys() == keys


def test_a_remote_hdf5_file_is_fetched_once_to_read_it_and_not_to_list_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [40] * 12
    files, seen = fsspec.filesystem("memory"), count_requests(monkeypatch)
    for name in ("a", "b"):
        path = write_libero(tmp_path / f"{name}.hdf5", lengths)
        files.pipe_file(f"/hdf5-remote/{name}.hdf5", path.read_bytes())
    source = open_source("hdf5", "memory://hdf5-remote")
    keys = source.keys()
    size = path.stat().st_size
    assert keys == open_source("hdf5", str(tmp_path)).keys() and len(keys) == 24
    assert sum(length for _, length in seen) < size / 2 and max(length for _, length in seen) < size / 10
    seen.clear()
    for key in keys:
        source.read(key)
    assert seen == [("a.hdf5", size), ("b.hdf5", size)]

    def away(store: FsspecStore, key: str, ranges: object) -> Sequence[bytes]:
        raise StoreError("away")

    monkeypatch.setattr(FsspecStore, "read_ranges", away)
    with pytest.raises(StoreError, match="away"):  # and not a file that does not open
        source.keys()


def test_a_record_beyond_the_limit_is_one_bad_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bridge(tmp_path / "set", [(20, 5)])
    monkeypatch.setattr("upvla.data.sources.tfrecord._MAX_RECORD_BYTES", len(example_bytes(bridge_episode(5, 1))) + 4)
    source = open_source("rlds", str(folder), layout="bridge_v2")
    large, small = source.keys()
    with pytest.raises(BadEpisode, match=r"record 0 has \d+ bytes, the most is") as caught:
        source.read(large)
    assert caught.value.reason == "zip_bomb" and len(source.read(small)) == 5


# ------------------------------------------------------------------------------------------------------------- HDF5

CONTROLLER = {
    "type": "OSC_POSE",
    "control_delta": True,
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05] * 3 + [0.5] * 3,
}


def write_libero(path: Path, lengths: Sequence[int] = (STEPS, 9, *([5] * 9)), **controller: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        settings = {"controller_configs": CONTROLLER | controller, "control_freq": 20}
        data.attrs["env_args"] = json.dumps({"env_name": "Libero", "env_kwargs": settings})
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["turn on the stove"]})
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            actions = np.sin(np.arange(length * 7.0).reshape(length, 7))
            actions[:, 6] = np.sign(actions[:, 6])
            demo["actions"] = actions
            frames = np.stack(pictures(length, seed=number))
            demo["obs/agentview_rgb"] = frames[:, ::-1]
            demo["obs/eye_in_hand_rgb"] = frames[:, ::-1]
            for name, width in (("ee_states", 6), ("gripper_states", 2), ("joint_states", 7)):
                demo[f"obs/{name}"] = np.full((length, width), float(number))
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
    return path


def test_libero_demonstrations_stand_upright_and_say_what_they_do(tmp_path: Path) -> None:
    path = write_libero(tmp_path / "kitchen" / "stove_demo.hdf5")
    assert detect_format(str(tmp_path)) == "hdf5"
    source = open_source("hdf5", str(tmp_path))
    assert [key.rpartition("/")[2] for key in source.keys()] == [f"demo_{n}" for n in range(11)]
    episode = source.read("kitchen/stove_demo.hdf5/demo_1")
    check(episode, QualityLimits())
    assert episode.scene == "stove_demo" and episode.spans[0].text == "turn on the stove" and episode.rate_hz == 20
    assert [dim.scale for dim in episode.action_space.dims[:6]] == [dim.scale for dim in LIBERO.dims[:6]]
    assert (episode.state == 1).all() and episode.state.shape == (9, 15)
    for mine, theirs in zip(episode.images["static"], pictures(9, seed=1), strict=True):
        assert np.abs(decode_image(mine).astype(int) - theirs).mean() < 3
    assert len(open_source("hdf5", str(path)).keys()) == 11
    fsspec.filesystem("memory").pipe_file("/kitchen/stove_demo.hdf5", path.read_bytes())
    remote = open_source("hdf5", "memory://kitchen/stove_demo.hdf5")
    assert remote.keys() == [key.removeprefix("kitchen/") for key in source.keys()]
    assert np.array_equal(remote.read("stove_demo.hdf5/demo_1").actions, episode.actions)
    with pytest.raises(ConfigError, match=r"stove_demo\.hdf5 holds no format that is known; declare one of"):
        detect_format("memory://kitchen/stove_demo.hdf5")
    assert [key[-7:] for key in open_source("hdf5", str(tmp_path), mask="train").keys()] == ["/demo_0", "demo_10"]


def test_robomimic_demonstrations_are_told_by_their_arrays(tmp_path: Path) -> None:
    with h5py.File(write_libero(tmp_path / "lift.hdf5", [STEPS, 9]), "a") as file:  # as robomimic writes them
        del file["data"].attrs["problem_info"]
        for number, demo in enumerate(file["data"].values()):
            frames = demo["obs/agentview_rgb"][:]
            del demo["obs"]
            for name in ("agentview_image", "robot0_eye_in_hand_image"):
                demo[f"obs/{name}"] = frames[:, ::-1] if name == "agentview_image" else frames
            for place, (name, width) in enumerate((("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))):
                demo[f"obs/robot0_{name}"] = np.full((len(frames), width), 10.0 * number + place)
            demo["states"] = np.zeros((len(frames), 32))
    assert detect_format(str(tmp_path)) == "hdf5"
    source = open_source("hdf5", str(tmp_path), instruction="lift the cube")
    episode = source.read("lift.hdf5/demo_1")
    check(episode, QualityLimits())
    assert (episode.embodiment, episode.rate_hz, episode.action_space.name) == ("franka_panda", 20, "osc_pose")
    assert [dim.scale for dim in episode.action_space.dims[:6]] == [0.05] * 3 + [0.5] * 3
    assert episode.spans == (Span(0, 9, "lift the cube", "lift the cube"),)
    assert (episode.state == [10] * 3 + [11] * 4 + [12] * 2).all() and np.abs(episode.actions).max() <= 1
    for camera, turn in (("static", 1), ("gripper", -1)):  # pictures are taken as they stand
        for mine, theirs in zip(episode.images[camera], pictures(9, seed=1), strict=True):
            assert np.abs(decode_image(mine).astype(int) - theirs[::turn]).mean() < 3


def test_a_controller_without_deltas_has_to_be_declared(tmp_path: Path) -> None:
    path = write_libero(tmp_path / "a.hdf5", [5], type="JOINT_VELOCITY")
    with pytest.raises(ConfigError, match="does not say what its actions mean"):
        open_source("hdf5", str(tmp_path)).read("a.hdf5/demo_0")
    assert len(open_source("hdf5", str(path), action_space="libero").read("a.hdf5/demo_0")) == 5
    with pytest.raises(ConfigError, match=r"a\.hdf5 .*runs at 20 Hz, the action space calvin_relative holds"):
        open_source("hdf5", str(path), action_space="calvin_relative").read("a.hdf5/demo_0")


def test_a_declared_space_does_not_contradict_a_controllers_settings(tmp_path: Path) -> None:
    write_libero(tmp_path / "a.hdf5", [5])
    episode = open_source("hdf5", str(tmp_path), action_space="libero").read("a.hdf5/demo_0")
    assert episode.action_space == LIBERO  # whose gripper is never in between, which the settings leave open
    both = r"dimension 0 \(dx\) differs in 'scale': the option action_space has 0\.02, HDF5 file .*a\.hdf5 has 0\.05"
    with pytest.raises(Mismatch, match=f"{both}; leave the option out"):
        open_source("hdf5", str(tmp_path), action_space="calvin_relative").read("a.hdf5/demo_0")
    write_libero(tmp_path / "b.hdf5", [5], input_min=-2)
    with pytest.raises(Mismatch, match=r"dimension 0 \(dx\) differs in 'low'.*b\.hdf5 has -2\.0"):
        open_source("hdf5", str(tmp_path), action_space="libero").read("b.hdf5/demo_0")
    write_libero(tmp_path / "c.hdf5", [5], output_max=[float("nan")] * 6)
    with pytest.raises(ConfigError, match=r"c\.hdf5 .*all of them finite.*does not say what its actions mean"):
        open_source("hdf5", str(tmp_path)).read("c.hdf5/demo_0")


def test_broken_hdf5_spoils_its_own_demonstrations_only(tmp_path: Path) -> None:
    write_libero(tmp_path / "a.hdf5", [5, 6])
    write_libero(tmp_path / "b.hdf5", [5])
    cut = (tmp_path / "b.hdf5").read_bytes()
    (tmp_path / "b.hdf5").write_bytes(cut[: len(cut) // 2])
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = np.zeros((5, 8, 8, 3), np.float32)
    source = open_source("hdf5", str(tmp_path), layout="libero")
    assert source.keys() == ["a.hdf5/demo_0", "a.hdf5/demo_1", "b.hdf5/unreadable"]
    for key, reason in (("a.hdf5/demo_0", "dtype"), ("b.hdf5/unreadable", "unreadable_frame")):
        with pytest.raises(BadEpisode) as caught:
            source.read(key)
        assert caught.value.reason == reason
    assert len(source.read("a.hdf5/demo_1")) == 6


def test_hdf5_is_what_begins_as_hdf5(tmp_path: Path) -> None:
    (tmp_path / "notes.hdf5").write_bytes(b"no demonstrations")
    (tmp_path / "empty.h5").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds no format that is known"):
        detect_format(str(tmp_path))
    for url in (tmp_path, tmp_path / "notes.hdf5"):
        with pytest.raises(NotFound, match=r"holds no HDF5 files, \d are only called so"):
            open_source("hdf5", str(url))
    write_libero(tmp_path / "recorded on monday", [5])
    assert detect_format(str(tmp_path)) == "hdf5"
    for url in (tmp_path, tmp_path / "recorded on monday"):
        source = open_source("hdf5", str(url))
        assert source.keys() == ["recorded on monday/demo_0"] and len(source.read(source.keys()[0])) == 5
        assert source.notes == ({"files called HDF5 that are none": 2} if url == tmp_path else {})


@pytest.mark.parametrize(
    ("path", "shape", "chunks"),
    [
        ("actions", (10**9, 7), (1000, 7)),
        ("obs/ee_states", (10**9, 6), (1000, 6)),
        ("obs/agentview_rgb", (10**8, 64, 64, 3), (1, 64, 64, 3)),
        ("obs/agentview_rgb", (5, 8000, 8000, 3), (1, 100, 100, 3)),
        ("obs/agentview_rgb", (5, 64, 64, 3), (5000, 300, 300, 3)),
    ],
)
def test_shapes_that_no_demonstration_has_are_refused_unread(
    tmp_path: Path, path: str, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    write_libero(tmp_path / "a.hdf5", [5, 6])
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        demo = file["data/demo_0"]
        dtype = demo[path].dtype
        del demo[path]
        most = tuple(max(sizes) for sizes in zip(shape, chunks, strict=True))
        demo.create_dataset(path, shape, dtype, chunks=chunks, maxshape=most)  # a kilobyte: nothing is written
    source = open_source("hdf5", str(tmp_path))
    with pytest.raises(BadEpisode, match=f"{path} claims") as caught:
        source.read("a.hdf5/demo_0")
    assert caught.value.reason == "zip_bomb" and len(source.read("a.hdf5/demo_1")) == 6


# ------------------------------------------------------------------------------------------------------------ LLaVA


def llava_row(image: str | None, *turns: str, **more: Any) -> dict[str, Any]:
    said = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(turns)]
    return {"id": "x", **({} if image is None else {"image": image}), "conversations": said} | more


def write_llava(folder: Path) -> Path:
    folder.mkdir(parents=True)
    frame = pictures(1)[0]
    (folder / "a.jpg").write_bytes(encode_jpeg(frame))
    Image.fromarray(frame).save(folder / "gif.tmp", "gif")
    (folder / "gif.tmp").rename(folder / "b.jpg")
    (folder / "c.jpg").write_bytes(b"no picture")
    rows = [
        llava_row("a.jpg", '<image>\nWhat is thère? "[{"', "A wave.", "Which colour?", "Ochre."),
        llava_row("b.jpg", "What?\n<image>", "A gif."),
        llava_row(None, "What is 2 + 2?", "4"),
        llava_row("missing.jpg", "What?", "Nothing."),
        llava_row("c.jpg", "What?", "Noise."),
        llava_row("../secret.jpg", "What?", "A secret."),
        llava_row("a.jpg", "What?", " "),
        llava_row("a.jpg", "Who answers?"),
        {"id": "y", "image": "a.jpg"},
    ]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return folder


def test_llava_rows_become_questions_or_have_a_reason(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "llava")
    assert detect_format(str(folder)) == "llava"
    source = open_source("llava", str(folder / "rows.json"))
    reasons: list[str] = []
    for key in source.keys():
        try:
            check(source.read(key), QualityLimits())
        except BadEpisode as error:
            reasons.append(error.reason)
    assert reasons == ["no_image", "missing_frame", "unreadable_image", "bad_id", "empty_language", "schema", "schema"]
    store = open_store(str(tmp_path / "store"))
    found = ingest(
        store, IngestConfig(format="llava", dataset="qa", min_accept_ratio=0.1, validation_fraction=0.5), str(folder)
    )
    assert (found["recordings"], found["steps"], sum(found["quarantined"].values())) == (2, 2, 7)
    assert isinstance(source, KnowsLengths) and {source.num_steps(key) for key in source.keys()} == {1}
    dataset = Dataset(store, load_manifest(store, "qa"))
    assert {row.turns for row in dataset.qa} == {
        (('What is thère? "[{"', "A wave."), ("Which colour?", "Ochre.")),
        (("What?", "A gif."),),
    }
    first = dataset.read(0, [0], ["image_image"])["image_image"][0]
    assert decode_image(first).shape == (32, 32, 3)


def test_a_long_list_is_walked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upvla.data.sources.llava._PIECE_BYTES", 37)
    source = open_source("llava", str(write_llava(tmp_path / "llava")))
    assert len(source.keys()) == 9 and source.read("00000001").talks[0].turns == (("What?", "A gif."),)
    path = tmp_path / "llava" / "rows.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(Corrupt, match=r"rows\.json: byte \d+"):
        open_source("llava", str(tmp_path / "llava")).keys()


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_huge_picture_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = write_llava(tmp_path / "llava")
    Image.fromarray(pictures(1)[0]).save(folder / f"huge.{kind}")
    (folder / "rows.json").write_text(json.dumps([llava_row(f"huge.{kind}", "What?", "Noise.")]))
    for module in ("images", "data.sources.llava"):
        monkeypatch.setattr(f"upvla.{module}.MAX_PIXELS", 32 * 32 - 1)
    with pytest.raises(BadEpisode, match=f"00000000: huge.{kind} claims 32x32 pixels") as caught:
        open_source("llava", str(folder)).read("00000000")
    assert caught.value.reason == "zip_bomb"


# ------------------------------------------------------------------------------------------------- the robot at home


def write_my_robot(folder: Path, names: Sequence[str] = ("one", "two")) -> Path:
    for name in names:
        (folder / name / "front").mkdir(parents=True)
        rows = np.tile([0.5, 0, -0.5, 1, 0.1, 0.2, 0.3], (6, 1)) + np.array([0, 0, 0, 0, 0, 0, len(name) / 10])
        np.savetxt(folder / name / "log.csv", rows, delimiter=",")
        (folder / name / "task.txt").write_text(f"task {name}\n")
        for step, frame in enumerate(pictures(6, seed=ord(name[0]))):
            (folder / name / "front" / f"{step:06d}.jpg").write_bytes(encode_jpeg(frame))
    return folder


def test_the_documented_example_ingests(tmp_path: Path) -> None:
    write_my_robot(tmp_path / "raw")
    (tmp_path / "raw" / "two" / "front" / "000003.jpg").unlink()
    store = open_store(str(tmp_path / "store"))
    config = IngestConfig(format="examples.my_robot:MyRobot", dataset="mine")
    found = ingest(store, config, str(tmp_path / "raw"))
    assert (found["recordings"], found["steps"], found["quarantined"]) == (1, 6, {"unreadable_frame": 1})
    assert len((ROOT / "examples" / "my_robot.py").read_text().splitlines()) < 50
    with pytest.raises(ConfigError, match="cannot be imported"):
        open_source("examples.my_robot:Nobody", str(tmp_path))


def test_the_documented_command_runs_where_a_person_copied_the_example_to(tmp_path: Path) -> None:
    write_my_robot(tmp_path / "raw")
    text = (ROOT / "examples" / "my_robot.py").read_text()
    (tmp_path / "my_robot.py").write_text(text)
    (command,) = re.findall(r"^    (upvla ingest .*)$", text, re.MULTILINE)
    words = command.replace("RECORDINGS", "raw").replace("STORE", "store").split()[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [UPVLA, *words, "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recordings"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_thing", "No module named 'no_such_thing' \\(.*mine_broken.py, line 1\\)"),
        ("x = 1\ny = 1 / 0", "ZeroDivisionError: division by zero \\(.*mine_broken.py, line 2\\)"),
        ("def broken(:", "SyntaxError"),
        ("MyRobot = 5", "is a int, not a class"),
        ("", "has no attribute 'MyRobot'"),
    ],
)
def test_a_format_that_cannot_be_imported_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine_broken", raising=False)
    (tmp_path / "mine_broken.py").write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_source("mine_broken:MyRobot", str(tmp_path))
    with pytest.raises(ConfigError, match=r"No module named 'mine_absent'; start in the folder that holds it"):
        open_source("mine_absent:MyRobot", str(tmp_path))


@pytest.mark.seam
@pytest.mark.parametrize(
    ("format", "write", "options"),
    [
        ("calvin", lambda folder: write_calvin(folder, (3, 4), static=(24, 24, 3), gripper=(16, 16, 3)), {}),
        ("lerobot", write_lerobot_v21, {"action_space": "calvin_relative"}),
        ("rlds", write_bridge, {"layout": "bridge_v2"}),
        ("hdf5", lambda folder: write_libero(folder / "kitchen" / "stove.hdf5", (5, 4)), {}),
        ("llava", write_llava, {}),
    ],
)
def test_a_source_on_s3_is_the_source_in_its_folder(
    tmp_path: Path, s3_server: S3Server, format: str, write: Callable[[Path], object], options: dict[str, Any]
) -> None:
    folder, url = tmp_path / "set", s3_server.url()
    write(folder)
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    assert detect_format(url) == format
    here, there = (open_source(format, where, **options) for where in (str(folder), url))
    again = open_source(format, url, **options)
    assert here.keys() == there.keys() == again.keys()
    assert [there.token(key) for key in there.keys()] == [again.token(key) for key in again.keys()]
    read = 0
    for key in here.keys():
        try:
            meant = here.read(key)
        except BadEpisode as error:
            with pytest.raises(BadEpisode) as caught:
                there.read(key)
            assert caught.value.reason == error.reason
        else:
            found = there.read(key)
            check(found, QualityLimits())
            assert found.images == meant.images and (found.spans, found.talks) == (meant.spans, meant.talks)
            assert np.array_equal(found.state, meant.state) and np.array_equal(found.actions, meant.actions)
            read += 1
    assert read >= 2


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("lerobot", {"action_space": 5}, "action_space is 5, neither a known name nor a mapping"),
        (
            "lerobot",
            {"action_space": "calvin_relative", "cameras": 5},
            r"\(action_space='calvin_relative', cameras=5\): ",
        ),
        ("rlds", {"layout": "bridge_v2", "action_space": 5}, "action_space is 5, neither"),
        (
            "calvin",
            {"cameras": 5},
            r"options of format 'calvin' \(cameras=5\): 'int' object is not iterable; there is: spl",
        ),
    ],
)
def test_an_option_of_a_wrong_kind_is_named(tmp_path: Path, format: str, options: dict[str, Any], said: str) -> None:
    write = {"lerobot": write_lerobot_v21, "rlds": write_bridge, "calvin": lambda folder: write_calvin(folder, (3,))}
    with pytest.raises(ConfigError, match=said):
        open_source(format, str(write[format](tmp_path / "set")), **options)


def test_what_lies_there_decides_or_nothing_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no format that is known; declare one of: calvin"):
        detect_format(str(tmp_path))
    with pytest.raises(ConfigError, match=r"options of format 'hdf5'.*layout, action_space, instruction, mask"):
        open_source("hdf5", str(tmp_path), spam=1)
