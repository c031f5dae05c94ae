"""T7, the whole way: whatever one recording holds, an ingest puts it into quarantine with a reason and keeps the
others; whatever a source says of itself, an ingest refuses it in our words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_sources import (
    bridge_episode,
    example_bytes,
    llava_row,
    pictures,
    write_bridge,
    write_lerobot_v21,
    write_libero,
    write_records,
)
from tests.factories import write_calvin
from tests.faults.test_bad_input import about_memory, npy_header
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.quality import REASONS, UNEXPECTED
from upvla.data.sources.calvin import CalvinSource
from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, Corrupt, UpvlaError
from upvla.images import encode_jpeg
from upvla.store import open_store
from upvla.types import Episode

Act = Callable[[Path], object]


def _ingested(tmp_path: Path, format: str, options: Mapping[str, Any]) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """(keys in the version, {key: (reason, detail)} in quarantine) of what lies in "raw"."""
    store = open_store(str(tmp_path / "store"))
    config = IngestConfig(format=format, dataset="table", options=dict(options), min_accept_ratio=0.1)
    found = ingest(store, config, str(tmp_path / "raw"))
    dataset = Dataset(store, load_manifest(store, "table"))
    rejected = {row.key: (row.reason, row.detail) for row in dataset.quarantine}
    assert found["quarantined"] == Counter(reason for reason, _ in rejected.values())
    assert all(reason in REASONS and detail for reason, detail in rejected.values())
    return [row.source_key for row in dataset.episodes], rejected


# ------------------------------------------------------------------------------------------------------- what is bad


def _calvin(*changes: Act) -> Act:
    def act(folder: Path) -> None:
        write_calvin(folder, (4, 5, 6), static=(24, 24, 3), gripper=(16, 16, 3))
        for change in changes:
            change(folder)

    return act


def _annotated(text: Any, start: Any = 4) -> Act:
    def act(folder: Path) -> None:
        annotations = {"language": {"ann": [text], "task": ["go"]}, "info": {"indx": [(start, 8)]}}
        np.save(folder / "lang_annotations/auto_lang_ann.npy", np.array(annotations, object), allow_pickle=True)

    return act


def _twice(folder: Path) -> None:
    write_calvin(folder, (5, 6, 5), static=(24, 24, 3), gripper=(16, 16, 3), scenes=("calvin_scene_A",))
    for step in range(5):
        (folder / f"episode_{step + 11:07d}.npz").write_bytes((folder / f"episode_{step:07d}.npz").read_bytes())
    (folder / "lang_annotations/auto_lang_ann.npy").unlink()


def _lerobot(column: str, value: Any) -> Act:
    """Another value in the first row of the first of three episodes."""

    def act(folder: Path) -> None:
        path = write_lerobot_v21(folder, (7, 8, 9)) / "data/chunk-000/episode_000000.parquet"
        table = pq.read_table(path)
        values = pa.array([value, *table[column].to_pylist()[1:]])
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), path)

    return act


def _rlds(change: Callable[[dict[str, Any]], object]) -> Act:
    def act(folder: Path) -> None:
        write_bridge(folder, [(7, 8, 9)])
        episodes = [bridge_episode(length, seed) for seed, length in enumerate((7, 8, 9))]
        change(episodes[1])
        write_records(next(folder.glob("*tfrecord*")), [example_bytes(episode) for episode in episodes])

    return act


def _libero(change: Callable[[h5py.File], object], **controller: Any) -> Act:
    """Two good demonstrations in one file, and what `change` makes of another file."""

    def act(folder: Path) -> None:
        for name, lengths in (("good", (5, 6)), ("other", (7,))):
            with h5py.File(write_libero(folder / f"{name}.hdf5", lengths, **controller), "a") as file:
                del file["mask/train"]
                file["mask/train"] = [f"demo_{number}".encode() for number in range(len(lengths))]
                if name == "other":
                    change(file)

    return act


def _no_group(file: h5py.File) -> None:
    del file["data"]
    file["data"] = np.zeros((3, 4))


def _no_demo(file: h5py.File) -> None:
    del file["data/demo_0"]
    file["data/demo_0"] = 1.0


def _mask_of_numbers(file: h5py.File) -> None:
    del file["mask/train"]
    file["mask/train"] = np.zeros(3)


def _settings(**changes: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        about = json.loads(file["data"].attrs["env_args"])
        about["env_kwargs"] |= changes
        file["data"].attrs["env_args"] = json.dumps(about)

    return change


def _llava(row: bytes) -> Act:
    def act(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.jpg").write_bytes(encode_jpeg(pictures(1)[0]))
        good = [json.dumps(llava_row("a.jpg", f"What {n}?", "A wave.")).encode() for n in range(2)]
        (folder / "rows.json").write_bytes(b"[" + b",\n".join([good[0], row, good[1]]) + b"]")

    return act


def _said(text: str, image: str = "a.jpg") -> bytes:
    return json.dumps(llava_row(image, "What?", text)).encode()


class Bad(NamedTuple):
    """How a recording is spoilt, and what an ingest must say of it. Two more are good."""

    format: str
    write: Act
    reason: str
    detail: str
    options: Mapping[str, Any] = {}


LEROBOT, BRIDGE = {"action_space": "calvin_relative"}, {"layout": "bridge_v2"}
BAD = {
    "calvin: half a character": Bad("calvin", _calvin(_annotated("go \ud800")), "text", r"go \\ud800"),
    "calvin: twice": Bad("calvin", _twice, "duplicate", "the same content as 0000000-0000004"),
    "calvin: no arrays": Bad(
        "calvin",
        _calvin(lambda folder: (folder / "episode_0000005.npz").write_bytes(b"PK\5\6" + bytes(18))),
        "missing_array",
        r"episode_0000005\.npz",
    ),
    "lerobot: first time": Bad("lerobot", _lerobot("timestamp", np.nan), "time", "timestamp is nan", LEROBOT),
    "lerobot: far time": Bad("lerobot", _lerobot("timestamp", 1e300), "unreadable_frame", "OverflowError", LEROBOT),
    "lerobot: no task": Bad("lerobot", _lerobot("task_index", None), "schema", "task_index has 1 empty", LEROBOT),
    "lerobot: no number": Bad("lerobot", _lerobot("frame_index", None), "schema", "frame_index has 1 empty", LEROBOT),
    "rlds: no number": Bad(
        "rlds", _rlds(lambda e: e["steps/action"].__setitem__((2, 3), np.nan)), "non_finite", "step 2", BRIDGE
    ),
    "rlds: no action": Bad("rlds", _rlds(lambda e: e.pop("steps/action")), "schema", "no feature 'steps/ac", BRIDGE),
    "rlds: no words": Bad(
        "rlds", _rlds(lambda e: e.update({"steps/language_instruction": np.zeros(8)})), "dtype", "not bytes", BRIDGE
    ),
    "hdf5: no group": Bad("hdf5", _libero(_no_group), "dtype", "'data' is no group"),
    "hdf5: no demo": Bad("hdf5", _libero(_no_demo), "schema", "AttributeError", {"layout": "libero"}),
    "hdf5: a mask of numbers": Bad(
        "hdf5", _libero(_mask_of_numbers), "dtype", "train lists no names", {"mask": "train"}
    ),
    "llava: Latin-1": Bad("llava", _llava(_said("x").replace(b'"x"', b'"\xe9"')), "text", "UnicodeDecodeError"),
    "llava: half a character": Bad("llava", _llava(_said("a \ud800")), "text", r"a \\ud800"),
    "llava: no path": Bad("llava", _llava(_said("x", "\ud800.jpg")), "text", "UnicodeEncodeError"),
    "llava: a number": Bad("llava", _llava(b"7"), "schema", "no conversations"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_is_in_quarantine_and_the_good_ones_in_the_version(name: str, tmp_path: Path) -> None:
    bad = BAD[name]
    bad.write(tmp_path / "raw")
    good, rejected = _ingested(tmp_path, bad.format, bad.options)
    ((key, (reason, detail)),) = rejected.items()
    assert len(good) == 2 and key not in good
    assert reason == bad.reason and re.search(bad.detail, detail), detail


def test_a_name_that_is_no_text_is_in_quarantine_as_it_can_be_written(tmp_path: Path) -> None:
    _libero(_settings())(tmp_path / "raw")
    (tmp_path / "raw/other.hdf5").rename(tmp_path / "raw/\udcff.hdf5")
    for _ in range(2):
        good, rejected = _ingested(tmp_path, "hdf5", {})
        assert len(good) == 2 and rejected.keys() == {r"\udcff.hdf5/demo_0"}
        assert rejected[r"\udcff.hdf5/demo_0"][0] == "bad_id"


# ---------------------------------------------------------------------------------------------- what is bad as a whole


def _info(**changes: Any) -> Act:
    def act(folder: Path) -> None:
        path = write_lerobot_v21(folder) / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


def _episodes(**changes: Any) -> Act:
    """Something else about the first episode."""

    def act(folder: Path) -> None:
        path = write_lerobot_v21(folder) / "meta/episodes.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]))

    return act


def _tasks(folder: Path) -> None:
    (write_lerobot_v21(folder) / "meta/tasks.jsonl").write_text('{"task": "open it"}\n')


def _from_memory(folder: Path) -> None:
    """Annotations that make numpy take bytes for a pointer, if it is asked."""
    _calvin()(folder)
    payload = about_memory()["a hidden object, protocol 4"]
    (folder / "lang_annotations/auto_lang_ann.npy").write_bytes(npy_header() + payload)


REFUSED: dict[str, tuple[str, Act, Mapping[str, Any], type[UpvlaError], str]] = {
    "calvin: a text that is none": (
        "calvin",
        _calvin(_annotated(["go"])),
        {},
        Corrupt,
        "an annotation is list and str",
    ),
    "calvin: a frame far out": ("calvin", _calvin(_annotated("go", np.inf)), {}, Corrupt, r"auto_lang_ann\.npy is no"),
    "calvin: a pointer": ("calvin", _from_memory, {}, Corrupt, "'unsafe_pickle': 3"),
    "calvin: scenes": (
        "calvin",
        _calvin(lambda f: np.save(f / "scene_info.npy", np.array({"A": 3}, object), allow_pickle=True)),
        {},
        Corrupt,
        "raw cannot be listed.*TypeError.*; repair the description",
    ),
    "lerobot: no rate": ("lerobot", _info(fps=0), LEROBOT, Corrupt, r"info\.json.*fps is 0"),
    "lerobot: chunks": (
        "lerobot",
        _info(chunks_size="x"),
        LEROBOT,
        Corrupt,
        "data_path of meta/info.json does not fit",
    ),
    "lerobot: a feature": ("lerobot", _info(features={"action": 5}), LEROBOT, Corrupt, r"info\.json is no description"),
    "lerobot: no task_index": ("lerobot", _tasks, LEROBOT, Corrupt, "meta/tasks has no task_index and text"),
    "lerobot: tasks": (
        "lerobot",
        _episodes(tasks=[["x"]]),
        LEROBOT,
        Corrupt,
        "raw cannot be listed.*TypeError.*repair",
    ),
    "lerobot: a length": ("lerobot", _episodes(length=float("inf")), LEROBOT, Corrupt, "raw cannot be.*OverflowError"),
    "llava: nested": ("llava", _llava(b"[" * 100_000), {}, Corrupt, r"rows\.json: byte \d+: a row of more lists"),
    "hdf5: no rate": (
        "hdf5",
        _libero(_settings(control_freq=0)),
        {},
        ConfigError,
        "ZeroDivisionError.*action_space",
    ),
    "hdf5: a short list": (
        "hdf5",
        _libero(_settings(), output_max=[1]),
        {},
        ConfigError,
        "IndexError.*action_space",
    ),
    "hdf5: no list": ("hdf5", _libero(_settings(controller_configs=[])), {}, ConfigError, "IndexError.*action_space"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_says_nonsense_is_refused_by_name(name: str, tmp_path: Path) -> None:
    format, write, options, kind, message = REFUSED[name]
    write(tmp_path / "raw")
    with pytest.raises(kind, match=message) as caught:
        _ingested(tmp_path, format, options)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", [*UNEXPECTED, UnicodeDecodeError, ZeroDivisionError])
def test_whatever_a_reader_raises_over_a_recording_is_said_of_it(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = kind("utf-8", b"\xff", 0, 1, "no") if kind is UnicodeDecodeError else kind("no \ud800")
    read, bad = CalvinSource.read, "0000004-0000008"

    def raising(self: CalvinSource, key: str) -> Episode:
        if key == bad:
            raise error
        return read(self, key)

    _calvin()(tmp_path / "raw")
    monkeypatch.setattr(CalvinSource, "read", raising)
    good, rejected = _ingested(tmp_path, "calvin", {})
    assert len(good) == 2 and re.search(f"{bad}: {kind.__name__}: .*no", rejected[bad][1])
