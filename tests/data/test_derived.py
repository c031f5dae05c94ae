from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.test_table import make_episode, staged_of
from upvla.data.commit import commit
from upvla.data.derived import CodeTable, encode_codes
from upvla.data.shards import Layout
from upvla.data.table import Dataset
from upvla.errors import Mismatch, NotFound
from upvla.images import Resize, decode_image, resize
from upvla.store import Store, open_store

SIZE = Resize(size=8)


def encoder(frames: np.ndarray) -> np.ndarray:
    return frames.reshape(len(frames), -1)[:, :5].astype(np.int32) * 257


def _commit(store: Store, numbers: range) -> Dataset:
    layout = Layout(row_group_bytes=2_000, max_row_group_bytes=4_000, shard_bytes=20_000)
    staged = staged_of(store, [make_episode(number) for number in numbers], layout)
    return Dataset(store, commit(store, "d", [staged], validation_fraction=0.2, options={}))


def _encode(dataset: Dataset, **options: object) -> list[str]:
    return encode_codes(dataset, encoder, cameras=["static"], resize_to=SIZE, tokenizer_id="t", batch=5, **options)  # type: ignore[arg-type]


def test_codes_are_those_of_their_frames(store: Store) -> None:
    dataset = _commit(store, range(5))
    assert len(_encode(dataset)) == len(dataset.manifest.shards) > 1
    table = CodeTable(dataset, "t", ["static"], SIZE)
    assert (table.num_codes, table.cameras) == (5, ("static",))
    for row, episode in enumerate(dataset.episodes):
        frames = dataset.read(row, range(episode.length), ["image_static"])["image_static"]
        expected = encoder(np.stack([resize(decode_image(frame), SIZE) for frame in frames]))
        assert np.array_equal(table.get(row, range(episode.length), "static"), expected)
        assert np.array_equal(table.get(row, [7, 2], "static"), expected[[7, 2]])
    with pytest.raises(Mismatch, match="not 'gripper'"):
        table.get(0, [0], "gripper")


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = _commit(store, range(5))
    with pytest.raises(NotFound, match="encode it first"):
        CodeTable(first, "t", ["static"], SIZE)
    one, *rest = (shard.key for shard in first.manifest.shards)
    assert len(_encode(first, shards=[one])) == 1
    assert len(_encode(first)) == len(rest)
    assert _encode(first) == []
    second = _commit(store, range(5, 8))
    with pytest.raises(NotFound):
        CodeTable(second, "t", ["static"], SIZE)
    fresh = len(second.manifest.shards) - len(first.manifest.shards)
    assert len(_encode(second)) == fresh > 0
    CodeTable(second, "t", ["static"], SIZE)


def test_codes_of_other_cameras_or_another_resize_are_refused(tmp_path: Path) -> None:
    dataset = _commit(open_store(str(tmp_path)), range(3))
    _encode(dataset)
    other = Resize(size=8, filter="linear")
    says = r"filter='area'.*asks for \['static'\] with \(.*filter='linear'\): .* back to those, or delete .*codes-t "
    with pytest.raises(Mismatch, match=says):
        CodeTable(dataset, "t", ["static"], other)
    with pytest.raises(Mismatch, match=says):
        encode_codes(dataset, encoder, cameras=["static"], resize_to=other, tokenizer_id="t")
    with pytest.raises(Mismatch, match=r"made of cameras \['static'\].*asks for \['gripper'\]"):
        CodeTable(dataset, "t", ["gripper"], SIZE)


def test_codes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dataset = _commit(open_store(str(tmp_path)), range(2))
    for bad in (-1, 70000):
        table = np.full((1000, 2), bad)
        with pytest.raises(Mismatch, match=str(bad)):
            encode_codes(
                dataset,
                lambda frames, table=table: table[: len(frames)],
                cameras=["static"],
                resize_to=SIZE,
                tokenizer_id="x",
            )
    assert not dataset.root.list("derived/")
