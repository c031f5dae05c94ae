"""What a usable recording is. Every rejection has a reason code; the recording goes to quarantine under it."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from upvla.data.actions import fits_rate, gripper_values
from upvla.errors import BadEpisode
from upvla.images import verify_image
from upvla.types import Episode

_SAFE_ID = re.compile(r"[\w.+=,@:-][\w.+=,@: /-]{0,511}")  # no control characters; '..' is looked for apart

REASONS = {
    "bad_id": "a name that is no safe path: empty, too long, '..', control characters",
    "text": "text that is no UTF-8, or that UTF-8 cannot hold (half of a surrogate pair)",
    "schema": "a column, feature or field that should be there is not",
    "dtype": "an array of another type than its format says",
    "unsafe_pickle": "a pickled file that wants to run something",
    "no_image": "a conversation without a picture, or a recording without a camera",
    "missing_frame": "a frame of the recording is not there",
    "missing_array": "a frame lacks an array",
    "unreadable_frame": "a frame's file is damaged, or holds what no reader expects",
    "unreadable_image": "an encoded image does not decode",
    "zip_bomb": "an archive, a picture or an array claims to hold more than any recording does",
    "shape": "an array of another shape than its format says",
    "frame_count": "the arrays of one recording differ in length",
    "too_short": "fewer steps than the limit",
    "non_finite": "NaN or infinity among the numbers",
    "action_bounds": "an action outside its declared range",
    "gripper_value": "a gripper command that is neither open nor close",
    "time": "timestamps that are no numbers, do not increase or jump, or a rate that is not its actions'",
    "frozen_camera": "a camera that shows one picture all the time",
    "span_range": "a language span that is empty or leaves the recording",
    "empty_language": "a language span without words",
    "duplicate": "the same content under another key",
    "removed": "taken out on purpose; it stays out until its content changes",
    "damaged": "its stored bytes could not be read any more; ingesting its source again brings it back",
}


UNEXPECTED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)
"""What code raises over content that nobody foresaw. An `OSError` or a `MemoryError` may be the machine's fault."""


class QualityLimits(BaseModel):
    """Where `check` draws its lines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_steps: int = Field(default=2, gt=0)
    action_tolerance: float = 1e-3
    max_gap: float = 1.5  # of one period, between neighbouring timestamps
    frozen_steps: int = Field(default=60, gt=1)  # recordings at least this long must not show one picture only


def check(episode: Episode, limits: QualityLimits) -> None:
    """Raise `BadEpisode` with the first reason found; its detail names the step and the dimension."""
    steps, least = len(episode), limits.min_steps if len(episode.action_space) else 1
    if not _SAFE_ID.fullmatch(episode.id) or ".." in episode.id.split("/"):
        raise BadEpisode("bad_id", f"{episode.id[:80]!r} is no safe name")
    if steps < least:
        raise BadEpisode("too_short", f"{episode.id}: {steps} steps, the limit is {least}")
    if not episode.images:
        raise BadEpisode("no_image", f"{episode.id}: no camera")
    _check_text(episode)
    _check_numbers(episode, limits)
    _check_time(episode, limits)
    for span in episode.spans:
        if not 0 <= span.start < span.end <= steps:
            raise BadEpisode("span_range", f"{episode.id}: span [{span.start}, {span.end}) of {steps} steps")
        if not span.text.strip():
            raise BadEpisode("empty_language", f"{episode.id}: span [{span.start}, {span.end}) has no words")
    for talk in episode.talks:
        if not 0 <= talk.step < steps:
            raise BadEpisode("span_range", f"{episode.id}: a conversation about step {talk.step} of {steps}")
        if not talk.turns:
            raise BadEpisode("empty_language", f"{episode.id}: a conversation in which nothing is said")
    for camera, frames in episode.images.items():
        _check_camera(episode.id, camera, frames, limits)


def unexpected(key: str, error: Exception) -> BadEpisode:
    """The recording `key`, in which something brought a reader or `check` down with an error of `UNEXPECTED`."""
    reasons: dict[type[Exception] | tuple[type[Exception], ...], str] = {
        UnicodeError: "text",
        (LookupError, AttributeError): "schema",
        TypeError: "dtype",
    }
    reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), "unreadable_frame")
    return BadEpisode(reason, f"{key}: {type(error).__name__}: {error!s:.500}")


def _check_text(episode: Episode) -> None:
    texts = [episode.source, episode.embodiment, episode.scene]
    texts += [text for span in episode.spans for text in (span.text, span.task)]
    texts += [text for talk in episode.talks for turn in talk.turns for text in (talk.topic, *turn)]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadEpisode("text", f"{episode.id}: {text!r:.80}: {error.reason}") from error


def _check_numbers(episode: Episode, limits: QualityLimits) -> None:
    numbers = {
        "actions": episode.actions,
        "absolute_actions": episode.absolute_actions,
        "state": episode.state,
        "scene_state": episode.scene_state,
    }
    for name, values in numbers.items():
        if values is None:
            continue
        if values.dtype != np.float32:
            raise BadEpisode("dtype", f"{episode.id}: {name} is {values.dtype}, must be float32")
        if values.ndim != 2:
            raise BadEpisode("shape", f"{episode.id}: {name} is {values.shape}, must be (T, D)")
        if not np.isfinite(values).all():
            step, dim = np.argwhere(~np.isfinite(values))[0]
            raise BadEpisode("non_finite", f"{episode.id}: {name} at step {step}, dimension {dim}")
    dims = episode.action_space.dims
    if episode.actions.shape[1] != len(dims):
        raise BadEpisode("shape", f"{episode.id}: {episode.actions.shape[1]} action dimensions, declared {len(dims)}")
    for i, dim in enumerate(dims):
        column = episode.actions[:, i]
        outside = (column < dim.low - limits.action_tolerance) | (column > dim.high + limits.action_tolerance)
        if outside.any():
            step = int(np.argmax(outside))
            detail = f"{dim.name} = {column[step]:g} at step {step}, declared [{dim.low:g}, {dim.high:g}]"
            raise BadEpisode("action_bounds", f"{episode.id}: {detail}")
        if dim.unit == "gripper" and not gripper_values(dim)[2]:
            between = np.minimum(abs(column - dim.low), abs(column - dim.high)) > limits.action_tolerance
            if between.any():
                step = int(np.argmax(between))
                raise BadEpisode("gripper_value", f"{episode.id}: {dim.name} = {column[step]:g} at step {step}")


def _check_time(episode: Episode, limits: QualityLimits) -> None:
    rate_hz, space = episode.rate_hz, episode.action_space
    if not (0 < rate_hz < float("inf") and fits_rate(space, rate_hz)):
        detail = f"recorded at {rate_hz:g} Hz, but an action of {space.name} holds for {space.dt_s:g} s"
        raise BadEpisode("time", f"{episode.id}: {detail}")
    if not np.isfinite(episode.timestamps).all():
        step = int(np.argmin(np.isfinite(episode.timestamps)))
        raise BadEpisode("time", f"{episode.id}: the timestamp of step {step} is {episode.timestamps[step]}")
    gaps = np.diff(episode.timestamps)
    wrong = ~((gaps > 0) & (gaps * episode.rate_hz <= limits.max_gap))
    if wrong.any():
        step = int(np.argmax(wrong))
        detail = f"{gaps[step]:g} s after step {step} at {episode.rate_hz:g} Hz"
        raise BadEpisode("time", f"{episode.id}: {detail}")


def _check_camera(key: str, camera: str, frames: np.ndarray | Sequence[bytes], limits: QualityLimits) -> None:
    """Every encoded frame is decoded, but those that `encode_jpeg` made."""
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8:
            raise BadEpisode("dtype", f"{key}: {camera} is {frames.dtype}, not uint8")
        if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise BadEpisode("shape", f"{key}: {camera} is {frames.shape}, not (T, H, W, 3)")
    else:
        sizes: list[tuple[int, int]] = []
        for step, frame in enumerate(frames):
            try:
                sizes.append(verify_image(frame))
            except BadEpisode as error:
                raise BadEpisode(error.reason, f"{key}: {camera} at step {step}: {error.detail}") from error
            if sizes[step] != sizes[0]:
                raise BadEpisode("shape", f"{key}: {camera} changes from {sizes[0]} to {sizes[step]} at step {step}")
    same = np.array_equal if isinstance(frames, np.ndarray) else operator.eq
    if len(frames) >= limits.frozen_steps and all(same(frames[0], frame) for frame in frames[1:]):
        raise BadEpisode("frozen_camera", f"{key}: {camera} shows one picture in all {len(frames)} steps")
