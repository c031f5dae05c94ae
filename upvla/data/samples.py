"""A mixture position -> one decoded row, and rows -> a batch.

A robot row at step t of a span [start, end) with chunk C: the frame at t, the frame at min(t + C, end - 1), and the
actions from t on; where the span ends early the chunk is filled by standing still with the last gripper value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from upvla.data.derived import CodeTable
from upvla.data.descriptions import DescriptionTable
from upvla.data.features import FeatureTable
from upvla.data.mixture import Mixture
from upvla.errors import BadEpisode, ConfigError, Corrupt
from upvla.images import Resize, decode_image, resize
from upvla.types import ActionSpace, Batch, MixtureSource, Sample, SampleRef, Span

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
        self._maps = [mixture.action_map(number) for number in range(len(mixture.plan.sources))]
        for source in mixture.plan.sources:
            manifest, robot = mixture.datasets[source.dataset].manifest, source.kind == "robot"
            wanted = {source.cameras.get(camera, camera) for camera in self.cameras} - {""}
            missing = sorted((wanted | set(self.code_cameras if robot else ())) - set(manifest.cameras))
            if missing:
                raise ConfigError(
                    f"dataset {manifest.dataset} has no camera {missing}; it has {manifest.cameras}: map them in the "
                    "mixture source's cameras"
                )
            if self.codes and robot and manifest.dataset not in self.codes:
                raise ConfigError(f"dataset {manifest.dataset} has no table of image codes; encode it first")
        if bool(self.codes) != bool(self.code_cameras):
            raise ConfigError("image codes need both their tables and the cameras to take (codes, code_cameras)")
        self._stored = [
            {camera: f"image_{found}" for camera in self.cameras if (found := source.cameras.get(camera, camera))}
            for source in mixture.plan.sources
        ]
        self._columns: dict[str, dict[str, Sequence[int]]] = {}  # of every dataset: all that any of its rows needs
        for source, stored in zip(mixture.plan.sources, self._stored, strict=True):
            names = [*(["action"] if source.kind == "robot" else []), *(stored.values() if not self.features else ())]
            self._columns.setdefault(source.dataset, {}).update(dict.fromkeys(names, ()))

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

    def read_rows(self, places: Sequence[tuple[SampleRef, int]], memory: Callable[[int], np.ndarray]) -> Rows:
        """Rows at (reference, position), robot rows first, their frames decoded into one `memory(bytes)` of u8."""
        places = sorted(places, key=lambda place: (place[0].kind != "robot", place[1]))
        if self.features:
            return Rows(self.read(ref, position) for ref, position in places)
        shape = (len(places), len(self.cameras), *self._frame)
        frames = memory(int(np.prod(shape))).reshape(shape)
        rows = Rows(self.read(ref, position, out) for (ref, position), out in zip(places, frames, strict=True))
        rows.frames = frames
        return rows

    def fetch(self, ref: SampleRef) -> None:
        """Have in memory what reading this sample will want from the table."""
        dataset = self.mixture.datasets[self.mixture.plan.sources[ref.source].dataset]
        wanted = self._wanted(ref)
        if any(len(steps) for steps in wanted.values()):
            dataset.fetch(ref.episode, wanted)

    def read(self, ref: SampleRef, position: int, out: np.ndarray | None = None) -> Sample:
        """One sample; its frames are decoded into `out` u8[K,H,W,3] where that is given.

        `Corrupt` names the sample whose picture does not decode: nothing takes its place.
        """
        name = self.mixture.plan.sources[ref.source].dataset
        dataset = self.mixture.datasets[name]
        row = dataset.episodes[ref.episode]
        found = dataset.read_each(ref.episode, self._wanted(ref))
        try:
            images = self._images(name, ref, found, out)
        except BadEpisode as error:
            where = f"{name}@{dataset.manifest.version}, recording {row.source_key}, step {ref.step}, {row.shard}"
            raise Corrupt(f"sample {position} ({where}): {error}; take it out with `upvla data remove`") from error
        if ref.kind == "qa":
            turns = tuple(turn for asked in dataset.conversation(ref.qa) for turn in asked.turns)
            return Sample(position, "qa", images, None, None, None, None, "", turns)
        span, moves = row.spans[ref.span], found["action"]
        if (convert := self._maps[ref.source]) is not None:
            moves = convert(moves)
        actions, is_pad = fill_chunk(moves, self.chunk, self.action_space)
        codes = future_codes = None
        if self.codes:
            table, steps = self.codes[name], self._window(ref)
            codes, future_codes = (
                np.concatenate([table.get(ref.episode, [step], camera) for camera in self.code_cameras])
                for step in (steps.step, steps.future)
            )
        return Sample(
            position=position,
            kind="robot",
            images=images,
            codes=codes,
            future_codes=future_codes,
            actions=actions,
            action_is_pad=is_pad,
            text=self._wording(self.mixture.plan.sources[ref.source], span, position),
            turns=(),
            description=self.descriptions[name].get(ref.episode, ref.step) if self.descriptions else "",
        )

    def _window(self, ref: SampleRef) -> Window:
        dataset = self.mixture.datasets[self.mixture.plan.sources[ref.source].dataset]
        span = dataset.episodes[ref.episode].spans[ref.span]
        return window(span.start, span.end, ref.step, self.chunk, published=self.published_windows)

    def _wanted(self, ref: SampleRef) -> dict[str, Sequence[int]]:
        """Which steps of which columns. Rows of one dataset name the same columns, so a row group is read once."""
        wanted = dict(self._columns[self.mixture.plan.sources[ref.source].dataset])
        if ref.kind == "robot":
            wanted["action"] = range(ref.step, self._window(ref).action_end)
        if not self.features:
            wanted |= dict.fromkeys(self._stored[ref.source].values(), (ref.step,))
        return wanted

    def _images(
        self, name: str, ref: SampleRef, found: Mapping[str, Sequence[bytes]], out: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        if self.features:
            return self.features[name].get(ref.episode, ref.step, self.cameras)
        stored, images = self._stored[ref.source], {}
        for view, camera in enumerate(self.cameras):
            place = None if out is None else out[view]
            if camera in stored:
                images[camera] = resize(decode_image(found[stored[camera]][0]), self.resize, place)
            else:  # a view that this source lacks is black
                images[camera] = np.empty(self._frame, np.uint8) if place is None else place
                images[camera][:] = 0
        return images

    def _wording(self, source: MixtureSource, span: Span, position: int) -> str:
        wordings = source.paraphrases.get(span.task, ())
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
