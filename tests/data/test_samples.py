from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.data.test_mixture import mixture
from upvla.data.derived import CodeTable, encode_codes
from upvla.data.mixture import Mixture, MixtureConfig
from upvla.data.samples import IGNORED, Collator, RowShape, SampleReader, Window, fill_chunk, window
from upvla.data.table import Dataset
from upvla.errors import ConfigError
from upvla.images import Resize, decode_image, resize
from upvla.types import CALVIN_RELATIVE

SIZE = Resize(size=24)


def encoder(frames: np.ndarray) -> np.ndarray:
    """Codes that can be recognised: four pixels of each frame."""
    return frames[:, ::12, ::12, 0].reshape(len(frames), -1).astype(np.int64) * 7


def encode_turns(turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    ids = [byte for question, answer in turns for byte in (question + answer).encode()]
    labels = [n for question, answer in turns for n in (*[IGNORED] * len(question), *answer.encode())]
    return ids, labels


@pytest.mark.parametrize(
    ("t", "ours", "published"),
    [
        (0, Window(0, 10, 10), Window(0, 10, 10)),
        (9, Window(9, 19, 19), Window(9, 19, 19)),
        (10, Window(10, 20, 19), Window(10, 19, 19)),
        (15, Window(15, 20, 19), Window(15, 19, 19)),
        (19, Window(19, 20, 19), Window(19, 20, 19)),
    ],
)
def test_windows(t: int, ours: Window, published: Window) -> None:
    assert window(0, 20, t, 10) == ours
    assert window(0, 20, t, 10, published=True) == published
    assert window(5, 25, t + 5, 10) == Window(*(value + 5 for value in ours))


def test_windows_stay_in_their_span() -> None:
    for t in (-1, 20):
        with pytest.raises(IndexError, match=r"\[0, 20\)"):
            window(0, 20, t, 10)


def test_short_chunks_stand_still_with_the_gripper_as_it_was() -> None:
    actions = np.arange(14, dtype=np.float32).reshape(2, 7)
    filled, is_pad = fill_chunk(actions, 4, CALVIN_RELATIVE)
    assert np.array_equal(filled[:2], actions)
    assert np.array_equal(filled[2:], [[0, 0, 0, 0, 0, 0, 13]] * 2)
    assert is_pad.tolist() == [False, False, True, True]
    assert filled.dtype == np.float32 and np.array_equal(actions, np.arange(14).reshape(2, 7))


@pytest.fixture(scope="module")
def reader(dataset: Dataset) -> SampleReader:
    encode_codes(dataset, encoder, cameras=["static", "gripper"], resize_to=SIZE, tokenizer_id="four")
    return SampleReader(
        mixture(dataset, 3, 1),
        chunk=10,
        cameras=["static", "gripper"],
        resize=SIZE,
        codes={"table": CodeTable(dataset, "four", ["static", "gripper"], SIZE)},
        code_cameras=["gripper", "static"],
    )


def test_robot_rows_hold_their_window(dataset: Dataset, reader: SampleReader) -> None:
    for position in range(40):
        ref = reader.mixture.sample_at(position)
        if ref.kind != "robot":
            continue
        sample = reader.read(ref, position)
        span = dataset.episodes[ref.episode].spans[ref.span]
        assert (sample.position, sample.kind, sample.text, sample.turns) == (position, "robot", span.text, ())
        steps = range(ref.step, min(ref.step + 10, span.end))
        actions = dataset.read(ref.episode, steps, ["action"])["action"]
        assert sample.actions is not None and sample.action_is_pad is not None
        assert np.array_equal(sample.actions[: len(actions)], actions)
        assert sample.action_is_pad.sum() == 10 - len(actions)
        future = min(ref.step + 10, span.end - 1)
        for codes, step in ((sample.codes, ref.step), (sample.future_codes, future)):
            shown = [_shown(dataset, ref.episode, step, camera) for camera in ("gripper", "static")]
            assert np.array_equal(codes, encoder(np.stack(shown)))  # type: ignore[arg-type]
        assert np.array_equal(sample.images["static"], _shown(dataset, ref.episode, ref.step, "static"))


def _shown(dataset: Dataset, episode: int, step: int, camera: str) -> np.ndarray:
    frame = dataset.read(episode, [step], [f"image_{camera}"])[f"image_{camera}"][0]
    return resize(decode_image(frame), SIZE)


def test_batches_hold_both_kinds(reader: SampleReader) -> None:
    samples = [reader.read(reader.mixture.sample_at(p), p) for p in range(16)]
    collate = Collator(reader.shape, lambda text: list(text.encode()), encode_turns, pad_id=300)
    batch = collate(samples)
    rows = [sample for sample in samples if sample.kind == "robot"]
    asked = [sample for sample in samples if sample.kind == "qa"]
    assert (len(rows), len(asked)) == (12, 4)
    assert batch.images.shape == (12, 2, 24, 24, 3) and batch.images.dtype == np.uint8
    assert batch.codes.shape == batch.future_codes.shape == (12, 2, 4) and batch.codes.dtype == np.int64
    assert batch.actions.shape == (12, 10, 7) and batch.actions.dtype == np.float32
    assert batch.action_is_pad.shape == (12, 10) and batch.action_is_pad.dtype == np.bool_
    assert batch.positions.tolist() == [sample.position for sample in (*rows, *asked)]
    for ids, length, sample in zip(batch.text_ids, batch.text_len, rows, strict=True):
        assert bytes(ids[:length].tolist()).decode() == sample.text and (ids[length:] == 300).all()
    for ids, labels, sample in zip(batch.qa_ids, batch.qa_labels, asked, strict=True):
        assert bytes(ids[ids < 300].tolist()).decode() == "".join(map("".join, sample.turns))
        assert bytes(labels[labels != IGNORED].tolist()).decode() == "".join(answer for _, answer in sample.turns)


def test_a_question_row_asks_everything_about_its_frame(dataset: Dataset, reader: SampleReader) -> None:
    asked = {}
    for position in range(80):
        ref = reader.mixture.sample_at(position)
        if ref.kind == "qa":
            drawn = dataset.qa[ref.qa]
            asked[ref.qa] = turns = reader.read(ref, position).turns
            same = [q for q in dataset.qa if q[:2] == drawn[:2] and q.template_split == drawn.template_split]
            assert turns[0] == (drawn.question, drawn.answer)
            assert sorted(turns) == sorted((q.question, q.answer) for q in same)
    assert max(map(len, asked.values())) > 2


def test_batches_of_one_kind_keep_the_other_empty(reader: SampleReader) -> None:
    samples = [reader.read(reader.mixture.sample_at(p), p) for p in range(16)]
    collate = Collator(reader.shape, lambda text: list(text.encode()), encode_turns, pad_id=300)
    asked = collate([sample for sample in samples if sample.kind == "qa"])
    assert (asked.images.shape, asked.codes.shape, asked.actions.shape) == ((0, 2, 24, 24, 3), (0, 2, 4), (0, 10, 7))
    assert asked.text_ids.shape == (0, 0) and asked.qa_images.shape == (4, 2, 24, 24, 3)
    moved = collate([sample for sample in samples if sample.kind == "robot"])
    assert moved.qa_images.shape == (0, 2, 24, 24, 3) and moved.qa_ids.shape == (0, 0)


def test_without_code_tables_rows_have_none(dataset: Dataset) -> None:
    plain = SampleReader(mixture(dataset, 1), chunk=4, cameras=["static"], resize=SIZE)
    sample = plain.read(plain.mixture.sample_at(0), 0)
    assert sample.codes is None and plain.shape == RowShape(1, 24, 0, 0, 4, 7)
    batch = Collator(plain.shape, lambda text: [1], encode_turns, 0)([sample])
    assert batch.codes.shape == (1, 0, 0)


def test_an_instruction_is_told_in_its_paraphrases_and_any_other_in_its_own_words(dataset: Dataset) -> None:
    words = {task: [*(f"{task} {i}" for i in range(4))] for task in ("open_drawer", "turn_on_led")}
    words["open_drawer"].append("pull the handle to open the drawer")  # as it was recorded; the led's is not listed

    def told(**more: object) -> list[tuple[str, str, str]]:
        source = {"dataset": "table", "kind": "robot", "weight": 1} | more
        settings = {"sources": [source], "global_batch": 16}
        found = Mixture(MixtureConfig.model_validate(settings).plan(dataset.store), {"table": dataset})
        reader = SampleReader(found, chunk=4, cameras=["static"], resize=SIZE)
        refs = [(position, found.sample_at(position)) for position in range(60)]
        spans = [dataset.episodes[ref.episode].spans[ref.span] for _, ref in refs]
        return [(s.task, s.text, reader.read(ref, p).text) for s, (p, ref) in zip(spans, refs, strict=True)]

    assert all(text == recorded for _, recorded, text in told())
    found = told(paraphrases=words)
    assert found == told(paraphrases=words)
    assert {text for task, _, text in found if task == "open_drawer"} == set(words["open_drawer"])
    assert all(text == recorded for task, recorded, text in found if task != "open_drawer")


def test_what_the_data_lacks_is_named(dataset: Dataset) -> None:
    found = mixture(dataset, 1)
    with pytest.raises(ConfigError, match=r"no camera \['wrist'\]"):
        SampleReader(found, chunk=4, cameras=["wrist"], resize=SIZE)
    with pytest.raises(ConfigError, match="both their tables and the cameras"):
        SampleReader(found, chunk=4, cameras=["static"], resize=SIZE, code_cameras=["static"])
