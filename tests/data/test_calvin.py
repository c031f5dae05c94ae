from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import write_calvin
from upvla.data.sources import open_source
from upvla.data.sources.pickles import read_object_npy
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound
from upvla.images import decode_image
from upvla.types import CALVIN_RELATIVE, KnowsLengths, Span


def test_recordings_carry_what_the_files_hold(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path / "training", (5, 20))
    source = open_source("calvin", str(folder))
    assert source.keys() == ["0000000-0000004", "0000005-0000024"]
    episode = source.read("0000005-0000024")
    assert isinstance(source, KnowsLengths) and source.num_steps("0000005-0000024") == len(episode) == 20
    assert episode.scene == "calvin_scene_B" and episode.action_space == CALVIN_RELATIVE
    frame = np.load(folder / "episode_0000008.npz")
    assert np.array_equal(episode.actions[3], frame["rel_actions"].astype(np.float32))
    assert episode.absolute_actions is not None and episode.scene_state is not None
    assert np.array_equal(episode.absolute_actions[3], frame["actions"].astype(np.float32))
    assert np.array_equal(episode.state[3], frame["robot_obs"].astype(np.float32))
    assert np.array_equal(episode.scene_state[3], frame["scene_obs"].astype(np.float32))
    assert episode.timestamps[3] == pytest.approx(0.1)
    for camera, size in (("static", 200), ("gripper", 84)):
        decoded = decode_image(episode.images[camera][3])
        assert decoded.shape == (size, size, 3)
        assert abs(decoded.astype(int) - frame[f"rgb_{camera}"]).mean() < 3


def test_span_ends_are_an_option(tmp_path: Path) -> None:
    write_calvin(tmp_path / "training", (5, 20))
    exclusive, inclusive = (
        open_source("calvin", str(tmp_path), split="training", span_end=end).read("0000005-0000024").spans
        for end in ("exclusive", "inclusive")
    )
    assert exclusive[0] == Span(0, 16, "press the button to turn on the led", "turn_on_led")
    assert [(span.start, span.end) for span in exclusive] == [(0, 16), (4, 20)]
    assert [(span.start, span.end) for span in inclusive] == [(0, 17), (4, 21)]
    with pytest.raises(ConfigError, match="span_end"):
        open_source("calvin", str(tmp_path), split="training", span_end="maybe")
    with pytest.raises(ConfigError, match="'calvin'"):
        open_source("calvin", str(tmp_path), spam=1)
    with pytest.raises(ConfigError, match="there is: calvin, lerobot, rlds, hdf5, llava"):
        open_source("tape", str(tmp_path))
    with pytest.raises(NotFound, match="split's folder"):
        open_source("calvin", str(tmp_path))


def test_plain_and_compressed_frames_read_alike_from_any_url(tmp_path: Path) -> None:
    import fsspec

    plain = write_calvin(tmp_path / "plain", (4,))
    compressed = write_calvin(tmp_path / "compressed", (4,), compressed=True)
    fsspec.filesystem("memory").put(str(plain), "/calvin-test", recursive=True)
    urls = [str(plain), str(compressed), "memory://calvin-test"]
    one, *others = (open_source("calvin", url).read("0000000-0000003") for url in urls)
    for other in others:
        assert other.images == one.images and np.array_equal(other.state, one.state) and other.spans == one.spans


def test_arrays_in_either_order_read_alike(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (3,))
    before = open_source("calvin", str(folder)).read("0000000-0000002")
    path = folder / "episode_0000001.npz"
    np.savez(path, **{name: np.asfortranarray(array) for name, array in np.load(path).items()})
    after = open_source("calvin", str(folder)).read("0000000-0000002")
    assert after.images == before.images and np.array_equal(after.state, before.state)


def test_tokens_follow_frames_and_annotations(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (3, 3))

    def tokens(**options: str) -> list[str]:
        source = open_source("calvin", str(tmp_path), **options)
        return list(map(source.token, source.keys()))

    before = tokens()
    os.utime(folder / "episode_0000004.npz", ns=(1, 1))
    assert [a == b for a, b in zip(before, tokens(), strict=True)] == [True, False]
    assert not set(before) & set(tokens(span_end="inclusive"))


def _break(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":  # inside the pixels: only the archive's checksum can tell
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "array gone":
        np.savez(path, rel_actions=np.zeros(7))
    elif how == "short vector":
        np.savez(path, **{**np.load(path), "rel_actions": np.zeros(6)})
    elif how == "grey":
        np.savez(path, **{**np.load(path), "rgb_static": np.zeros((200, 200), np.uint8)})
    elif how == "other size":
        np.savez(path, **{**np.load(path), "rgb_static": np.zeros((32, 32, 3), np.uint8)})
    elif how == "pickled":
        np.savez(path, **{**np.load(path), "rel_actions": np.array([_Bomb(path.parent / "fired")], object)})
    elif how == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rel_actions.npy", bytes(65 << 20))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "unreadable_frame"),
        ("flipped", "unreadable_frame"),
        ("empty", "unreadable_frame"),
        ("gone", "missing_frame"),
        ("array gone", "missing_array"),
        ("short vector", "shape"),
        ("grey", "shape"),
        ("other size", "shape"),
        ("pickled", "unsafe_pickle"),
        ("bomb", "zip_bomb"),
    ],
)
def test_a_bad_frame_spoils_its_recording_and_is_named(tmp_path: Path, how: str, reason: str) -> None:
    folder = write_calvin(tmp_path, (3, 3), static=(64, 64, 3))
    _break(folder / "episode_0000004.npz", how)
    source = open_source("calvin", str(folder))
    with pytest.raises(BadEpisode, match=r"episode_0000004\.npz") as caught:
        source.read("0000003-0000005")
    assert caught.value.reason == reason
    assert len(source.read("0000000-0000002")) == 3
    assert not (folder / "fired").exists()


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


class _Quiet:
    """Imports something harmless; still nothing that a data set needs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1",))


@pytest.mark.parametrize("key", ["lang_annotations/auto_lang_ann.npy", "scene_info.npy"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, key: str) -> None:
    folder = write_calvin(tmp_path / "training", (3,))
    for bomb in (_Bomb(tmp_path / "fired"), {"language": _Bomb(tmp_path / "fired")}, [_Quiet()]):
        np.save(folder / key, np.array(bomb, object), allow_pickle=True)
        with pytest.raises(BadEpisode, match="nothing of it was run") as caught:
            open_source("calvin", str(folder)).read("0000000-0000002")
        assert caught.value.reason == "unsafe_pickle"
    assert not (tmp_path / "fired").exists()
    with pytest.raises(FileExistsError):  # the same file does fire where pickles are trusted
        np.save(folder / key, np.array(_Bomb(folder), object), allow_pickle=True)
        np.load(folder / key, allow_pickle=True)


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_of_any_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    value = {"ann": ["añ"], "emb": np.ones((2, 1, 3), np.float32), "indx": [(np.int64(1), 2)], "names": np.array(["x"])}
    cube, shared = np.arange(24.0).reshape(2, 3, 4), np.array(["añ", "b"])
    arrays = {
        "turned": cube.transpose(1, 0, 2),
        "columns": np.asfortranarray(cube[0]),
        "parts": cube[:, ::2],
        "other order": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 2)),
        "bits": np.array([True, False]),
        "bytes": np.array([b"ab", b"c"]),
        "many": [shared, shared],
    }
    scalars = [np.float32(0.5), np.bool_(True), np.str_("añ"), np.str_(""), np.bytes_(b"x"), np.uint8(7)]
    objects = np.array([[1, "x"], [None, np.ones(2)]], object)
    value |= {"arrays": arrays, "scalars": scalars, "objects": objects}
    header = tmp_path / "header.npy"
    np.save(header, np.array(value, object), allow_pickle=True)
    data = header.read_bytes()
    body = pickle.dumps(np.array(value, object), protocol)
    read = read_object_npy(data[: data.index(b"\n") + 1] + body, "x.npy")
    assert read["ann"] == ["añ"] and read["indx"] == [(1, 2)] and read["names"].tolist() == ["x"]
    assert np.array_equal(read["emb"], value["emb"]) and read["emb"].dtype == np.float32
    assert read["arrays"].keys() == arrays.keys() and read["scalars"] == scalars
    for name, array in arrays.items():
        assert np.array_equal(read["arrays"][name], array), name
    assert read["objects"].shape == (2, 2) and read["objects"][0].tolist() == [1, "x"]
    assert read["objects"][1, 1].tolist() == [1, 1] and read["arrays"]["many"][0] is read["arrays"]["many"][1]


def test_annotations_and_frames_outside_of_recordings_are_ignored_and_counted(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (4, 4, 3))
    np.save(folder / "ep_start_end_ids.npy", np.array([[4, 7], [9, 9]]))
    source = open_source("calvin", str(folder))
    assert list(source.keys()) == ["0000004-0000007", "0000009-0000009"]
    assert [(span.start, span.end) for span in source.read("0000004-0000007").spans] == [(0, 4), (0, 4)]
    assert source.notes == {"annotations outside of every recording": 4}
    assert len({source.token(key) for key in source.keys()}) == 2
    frames = {"frames outside of every recording": 6}  # 0 to 3, 8 and 10
    assert source.notes == {"annotations outside of every recording": 4} | frames


def test_a_recording_in_two_scenes_is_in_none(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (4, 4))
    np.save(folder / "scene_info.npy", {"calvin_scene_A": [0, 5], "calvin_scene_B": [4, 7]}, allow_pickle=True)  # type: ignore[arg-type]
    source = open_source("calvin", str(folder))
    assert [source.read(key).scene for key in source.keys()] == ["calvin_scene_A", "unknown"]
    assert source.notes == {"recordings in two scenes of scene_info.npy": 1}


def test_recordings_without_language_are_read(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (4,))
    (folder / "lang_annotations" / "auto_lang_ann.npy").unlink()
    assert open_source("calvin", str(folder)).read("0000000-0000003").spans == ()


def test_annotations_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path, (4,))
    for value in ({"language": {}}, {"language": {"ann": ["a"], "task": []}, "info": {"indx": []}}, ["text"]):
        np.save(folder / "lang_annotations" / "auto_lang_ann.npy", np.array(value, object), allow_pickle=True)
        with pytest.raises(Corrupt, match=r"auto_lang_ann\.npy"):
            open_source("calvin", str(folder))


def test_the_public_environments_recordings(calvin_mini: Path) -> None:
    source = open_source("calvin", str(calvin_mini / "training"), span_end="inclusive")
    episodes = list(map(source.read, source.keys()))
    assert [len(episode) for episode in episodes] == [121, 199, 126]
    assert [episode.scene for episode in episodes] == ["calvin_scene_A", "calvin_scene_B", "calvin_scene_C"]
    assert [len(episode.spans) for episode in episodes] == [3, 3, 3]
    assert episodes[0].spans[0].task == "lift_blue_block_slider" and episodes[0].spans[-1].end == 121
