"""A mixture position -> one decoded row, and rows -> a batch.

A robot row at step t of a span [start, end) with chunk C: the frame at t, the frame at min(t + C, end - 1), and the
actions from t on; where the span ends early the chunk is filled by standing still with the last gripper value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from upvla.data.actions import ActionMap
from upvla.data.derived import CodeTable
from upvla.data.descriptions import DescriptionTable
from upvla.data.features import FeatureTable
from upvla.data.mixture import Mixture
from upvla.data.rowgroups import Held
from upvla.data.table import Dataset
from upvla.errors import BadEpisode, ConfigError, Corrupt
from upvla.images import Resize, decode_image, resize
from upvla.types import ActionSpace, Batch, Sample, SampleRef, Span

IGNORED = -100  # label of an unsupervised token


class Window(NamedTuple):
    """Steps of a recording that make one robot row: actions of `[step, action_end)`, frames at `step` and `future`."""

    step: int
    action_end: int
    future: int


def window(start: int, end: int, t: int, chunk: int, *, published: bool = False) -> Window:
    """The window at step `t` of the span `[start, end)`.

    `published` reproduces the reference code, whose chunk stops before the future frame: the last action of a span
    is used only by the window at the last step (method, section 4.2).
    """
    if not start <= t < end:
        raise IndexError(f"step {t} lies outside of the span [{start}, {end})")
    future = min(t + chunk, end - 1)
    return Window(t, max(future, t + 1) if published else min(t + chunk, end), future)


def fill_chunk(actions: np.ndarray, chunk: int, space: ActionSpace) -> tuple[np.ndarray, np.ndarray]:
    """f32[n,A], 1 <= n <= C -> (f32[C,A], bool[C] is padding). Relative dimensions stand still, absolute ones hold.

    A chunk that is whole is returned itself.
    """
    if len(actions) == chunk:
        return actions, np.zeros(chunk, np.bool_)
    filled = np.repeat(actions[-1:], chunk, axis=0)
    filled[:, [dim.mode == "relative" for dim in space.dims]] = 0.0
    filled[: len(actions)] = actions
    return filled, np.arange(chunk) >= len(actions)


class RowShape(NamedTuple):
    """Sizes of every row of a batch, known before any row is."""

    num_cameras: int
    image_size: int
    num_views: int
    num_codes: int
    chunk: int
    action_dim: int
    features: tuple[int, int] | None = None  # [P,D] a camera where patch features are read in place of frames


class Rows(list[Sample]):
    """Samples of one micro-batch, robot rows before questions. `frames` u8[n,K,H,W,3] has all their images, row by row;
    it is None where features take the place of frames."""

    frames: np.ndarray | None = None


class Fetched(NamedTuple):
    """A sample whose row groups are in memory: what is left to do needs no store."""

    ref: SampleRef
    position: int
    steps: Window | None  # of a robot row
    held: Held | None  # of its dataset's table, if it wants anything


class _Source(NamedTuple):
    """What every sample of one source of the mixture has in common.

    columns: of its dataset, all that any row needs. Rows name the same ones, so a row group is read once.
    """

    dataset: Dataset
    columns: Mapping[str, Sequence[int]]
    frames: Mapping[str, str]  # the model's camera -> the column
    convert: ActionMap | None
    paraphrases: Mapping[str, Sequence[str]]
    only: str  # "prediction": actions are not read


class SampleReader:
    """Reads and decodes samples; threads may share it.

    cameras, resize: frames of the understanding encoder. codes, code_cameras: tables of image codes by dataset name
    and the views taken from them; without tables rows carry no codes. descriptions: what a model said of the scenes,
    by dataset name. features: patch features by dataset name, which take the place of frames.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        chunk: int,
        cameras: Sequence[str],
        resize: Resize,
        codes: Mapping[str, CodeTable] | None = None,
        code_cameras: Sequence[str] = (),
        published_windows: bool = False,
        descriptions: Mapping[str, DescriptionTable] | None = None,
        features: Mapping[str, FeatureTable] | None = None,
    ):
        self.mixture, self.chunk, self.cameras, self.resize = mixture, chunk, tuple(cameras), resize
        self.codes, self.code_cameras = dict(codes or {}), tuple(code_cameras)
        self.descriptions, self.features = dict(descriptions or {}), dict(features or {})
        self.published_windows = published_windows
        self.action_space = mixture.action_space
        self._frame = (resize.size, resize.width or resize.size, 3)
        if bool(self.codes) != bool(self.code_cameras):
            raise ConfigError("image codes need both their tables and the cameras to take (codes, code_cameras)")
        columns: dict[str, dict[str, Sequence[int]]] = {name: {} for name in mixture.datasets}
        self._sources = [self._opened(number, columns) for number in range(len(mixture.plan.sources))]

    def _opened(self, number: int, columns: Mapping[str, dict[str, Sequence[int]]]) -> _Source:
        """Source `number`; what its rows need joins the columns of its dataset."""
        source = self.mixture.plan.sources[number]
        dataset, robot = self.mixture.datasets[source.dataset], source.kind == "robot"
        named = {camera: source.cameras.get(camera, camera) for camera in self.cameras}
        frames = {camera: f"image_{stored}" for camera, stored in named.items() if stored}
        wanted = {*named.values()} - {""} | set(self.code_cameras if robot else ())
        if missing := sorted(wanted - set(dataset.manifest.cameras)):
            raise ConfigError(
                f"dataset {source.dataset} has no camera {missing}; it has {dataset.manifest.cameras}: map them in the "
                "mixture source's cameras"
            )
        if self.codes and robot and source.dataset not in self.codes:
            raise ConfigError(f"dataset {source.dataset} has no table of image codes; encode it first")
        shared, acts = columns[source.dataset], robot and source.only != "prediction"
        names = [*(["action"] if acts else []), *(frames.values() if not self.features else ())]
        shared.update(dict.fromkeys(names, ()))
        convert = self.mixture.action_map(number)
        return _Source(dataset, shared, frames, convert, source.paraphrases, source.only)

    @property
    def shape(self) -> RowShape:
        num_codes = next(iter(self.codes.values())).num_codes if self.codes else 0
        return RowShape(
            len(self.cameras),
            self.resize.size,
            len(self.code_cameras),
            num_codes,
            self.chunk,
            len(self.action_space),
            next(iter(self.features.values())).shape if self.features else None,
        )

    def fetch(self, ref: SampleRef, position: int) -> Fetched:
        """Have in memory what the sample wants from its dataset's table."""
        source, steps = self._sources[ref.source], None
        wanted = dict(source.columns)
        if ref.kind == "robot":
            span = source.dataset.episodes[ref.episode].spans[ref.span]
            steps = window(span.start, span.end, ref.step, self.chunk, published=self.published_windows)
            if source.only != "prediction":
                wanted["action"] = range(steps.step, steps.action_end)
        if not self.features:
            wanted |= dict.fromkeys(source.frames.values(), (ref.step,))
        return Fetched(ref, position, steps, source.dataset.hold(ref.episode, wanted) if wanted else None)

    def decode(self, fetched: Fetched, out: np.ndarray | None = None) -> Sample:
        """The sample; its frames are decoded into `out` u8[K,H,W,3] where that is given.

        `Corrupt` names the sample whose picture does not decode: nothing takes its place.
        """
        ref, position, steps, held = fetched
        source = self._sources[ref.source]
        found = held.read() if held else {}
        images = self._images(source, fetched, found, out)
        if steps is None:
            turns = tuple(turn for asked in source.dataset.conversation(ref.qa) for turn in asked.turns)
            return Sample(position, "qa", images, None, None, None, None, "", turns)
        return self._robot_row(source, fetched, steps, images, found.get("action"))

    def decode_rows(self, fetched: Sequence[Fetched], memory: Callable[[int], np.ndarray]) -> Rows:
        """Robot rows first, each kind by position, their frames decoded into one `memory(bytes)` of u8."""
        fetched = sorted(fetched, key=lambda found: (found.ref.kind != "robot", found.position))
        if self.features:
            return Rows(map(self.decode, fetched))
        shape = (len(fetched), len(self.cameras), *self._frame)
        frames = memory(int(np.prod(shape))).reshape(shape)
        rows = Rows(map(self.decode, fetched, frames))
        rows.frames = frames
        return rows

    def read(self, ref: SampleRef, position: int) -> Sample:
        """One sample."""
        return self.decode(self.fetch(ref, position))

    def _images(
        self, source: _Source, fetched: Fetched, found: Mapping[str, Sequence[bytes]], out: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        ref, dataset = fetched.ref, source.dataset
        if self.features:
            return self.features[dataset.manifest.dataset].get(ref.episode, ref.step, self.cameras)
        images = {}
        try:
            for view, camera in enumerate(self.cameras):
                place = None if out is None else out[view]
                if camera in source.frames:
                    images[camera] = resize(decode_image(found[source.frames[camera]][0]), self.resize, place)
                else:  # a view that this source lacks is black
                    images[camera] = np.empty(self._frame, np.uint8) if place is None else place
                    images[camera][:] = 0
        except BadEpisode as error:
            row, version = dataset.episodes[ref.episode], f"{dataset.manifest.dataset}@{dataset.manifest.version}"
            where = f"{version}, recording {row.source_key}, step {ref.step}, {row.shard}"
            raise Corrupt(
                f"sample {fetched.position} ({where}): {error}; take it out with `upvla data remove`"
            ) from error
        return images

    def _robot_row(
        self,
        source: _Source,
        fetched: Fetched,
        steps: Window,
        images: Mapping[str, np.ndarray],
        moves: np.ndarray | None,
    ) -> Sample:
        ref, name = fetched.ref, source.dataset.manifest.dataset
        if moves is None:  # they do not count
            actions, is_pad = np.zeros((self.chunk, len(self.action_space)), np.float32), np.ones(self.chunk, np.bool_)
        else:
            moves = moves if source.convert is None else source.convert(moves)
            actions, is_pad = fill_chunk(moves, self.chunk, self.action_space)
        codes = future_codes = None
        if self.codes:
            table, both = self.codes[name], (steps.step, steps.future)
            views = [table.get(ref.episode, both, camera) for camera in self.code_cameras]
            codes, future_codes = np.stack(views, axis=1)
        span = source.dataset.episodes[ref.episode].spans[ref.span]
        return Sample(
            position=fetched.position,
            kind="robot",
            images=images,
            codes=codes,
            future_codes=future_codes,
            actions=actions,
            action_is_pad=is_pad,
            text=self._wording(source.paraphrases, span, fetched.position),
            turns=(),
            description=self.descriptions[name].get(ref.episode, ref.step) if self.descriptions else "",
            only=source.only,
        )

    def _wording(self, paraphrases: Mapping[str, Sequence[str]], span: Span, position: int) -> str:
        wordings = paraphrases.get(span.task, ())
        if span.text not in wordings:
            return span.text
        key = f"paraphrase/{self.mixture.plan.seed}/{position}".encode()
        return wordings[int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % len(wordings)]


class Collator:
    """Samples -> `Batch` of numpy arrays. The tokenizer comes as two functions, so this room needs none of its own.

    encode_text: text -> ids. encode_turns: rounds of (question, answer) -> (ids, labels), labels -100 where not
    supervised. condition: (ids of a description, ids of an instruction) -> ids of the prompt made of both.
    """

    def __init__(
        self,
        shape: RowShape,
        encode_text: Callable[[str], Sequence[int]],
        encode_turns: Callable[[Sequence[tuple[str, str]]], tuple[Sequence[int], Sequence[int]]],
        pad_id: int,
        condition: Callable[[Sequence[int], Sequence[int]], Sequence[int]] | None = None,
    ):
        self._condition = condition
        self._shape, self._encode_text, self._encode_turns = shape, encode_text, encode_turns
        self._pad_id = pad_id

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        robot = [sample for sample in samples if sample.kind == "robot"]
        asked = [sample for sample in samples if sample.kind == "qa"]
        frames = samples.frames if isinstance(samples, Rows) else None
        shape = self._shape
        texts = [self._prompt(sample) for sample in robot]
        turns = [self._encode_turns(sample.turns) for sample in asked]
        codes = (shape.num_views, shape.num_codes)
        return Batch(
            text_ids=_padded(texts, self._pad_id),
            text_len=np.array([len(ids) for ids in texts], np.int64),
            images=self._images(robot) if frames is None else frames[: len(robot)],
            codes=_stacked([s.codes for s in robot], codes, np.int64),
            future_codes=_stacked([s.future_codes for s in robot], codes, np.int64),
            actions=_stacked([s.actions for s in robot], (shape.chunk, shape.action_dim), np.float32),
            action_is_pad=_stacked([s.action_is_pad for s in robot], (shape.chunk,), np.bool_),
            pre_mask=np.array([s.only != "action" for s in robot], np.bool_),
            act_mask=np.array([s.only != "prediction" for s in robot], np.bool_),
            qa_images=self._images(asked) if frames is None else frames[len(robot) :],
            qa_ids=_padded([ids for ids, _ in turns], self._pad_id),
            qa_labels=_padded([labels for _, labels in turns], IGNORED),
            positions=np.array([sample.position for sample in (*robot, *asked)], np.int64),
        )

    def _prompt(self, sample: Sample) -> Sequence[int]:
        instruction = self._encode_text(sample.text)
        if self._condition is None:
            return instruction
        return self._condition(self._encode_text(sample.description), instruction)

    def _images(self, samples: Sequence[Sample]) -> np.ndarray:
        size, features = self._shape.image_size, self._shape.features
        one: tuple[int, ...] = features or (size, size, 3)
        images = np.empty((len(samples), self._shape.num_cameras, *one), np.float32 if features else np.uint8)
        for row, sample in zip(images, samples, strict=True):
            for view, frame in zip(row, sample.images.values(), strict=True):
                view[:] = frame
        return images


def _stacked(rows: Sequence[np.ndarray | None], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """[n, *shape]; rows without the value (no code tables) become empty ones."""
    present = [row for row in rows if row is not None]
    return np.stack(present).astype(dtype) if present else np.zeros((len(rows), *shape), dtype)


def _padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows), default=0)), value, np.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return filled
