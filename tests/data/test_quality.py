from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.factories import write_calvin
from upvla.data.actions import NO_ACTIONS
from upvla.data.quality import REASONS, QualityLimits, check
from upvla.data.sources import open_source
from upvla.errors import BadEpisode
from upvla.images import encode_jpeg
from upvla.types import Episode, Span, Talk


@pytest.fixture(scope="module")
def episode(tmp_path_factory: pytest.TempPathFactory) -> Episode:
    folder = write_calvin(tmp_path_factory.mktemp("calvin"), (20,), static=(32, 32, 3), gripper=(16, 16, 3))
    return open_source("calvin", str(folder)).read("0000000-0000019")


def _with(values: np.ndarray, step: int, dim: int, value: float) -> np.ndarray:
    changed = values.copy()
    changed[step, dim] = value
    return changed


def _spoilt(episode: Episode, how: str) -> Episode:
    images, times = dict(episode.images), episode.timestamps.copy()
    static = list(images["static"])
    changes: dict[str, Any] = {
        "nan": lambda: {"actions": _with(episode.actions, 3, 2, np.nan)},
        "infinite state": lambda: {"state": _with(episode.state, 3, 2, np.inf)},
        "nan scene": lambda: {"scene_state": _with(episode.scene_state, 3, 2, np.nan)},  # type: ignore[arg-type]
        "too far": lambda: {"actions": _with(episode.actions, 3, 2, -1.1)},
        "half open": lambda: {"actions": _with(episode.actions, 3, 6, 0.3)},
        "six dims": lambda: {"actions": episode.actions[:, :6]},
        "double": lambda: {"actions": episode.actions.astype(np.float64)},
        "time stands": lambda: {"timestamps": np.r_[times[:5], times[4], times[6:]]},
        "time jumps": lambda: {"timestamps": np.r_[times[:5], times[5:] + 1]},
        "nan time": lambda: {"timestamps": np.r_[times[:5], np.nan, times[6:]]},
        "beyond the end": lambda: {"spans": (Span(0, 21, "go", "go"),)},
        "nothing": lambda: {"spans": (Span(3, 3, "go", "go"),)},
        "silence": lambda: {"spans": (Span(0, 3, "  ", "go"),)},
        "no picture": lambda: {"images": images | {"static": [*static[:-1], b"not a picture"]}},
        "other size": lambda: {"images": images | {"static": [*static[:-1], images["gripper"][-1]]}},
        "slower": lambda: {"rate_hz": 10.0},
        "no rate": lambda: {"rate_hz": np.nan},
        "infinite start": lambda: {"timestamps": np.r_[-np.inf, times[1:]]},
        "half a character": lambda: {"spans": (Span(0, 3, "go \ud800", "go"),)},
        "half a scene": lambda: {"scene": "\udcff"},
        "half an answer": lambda: {"talks": (Talk(0, "x", (("what?", "\ud800"),)),)},
        "a late question": lambda: {"talks": (Talk(20, "x", (("what?", "that"),)),)},
        "no question": lambda: {"talks": (Talk(0, "x", ()),)},
        "no camera": lambda: {"images": {}},
        "no pixels": lambda: {"images": images | {"static": np.zeros((20, 0, 8, 3), np.uint8)}},
        "float picture": lambda: {"images": images | {"static": np.zeros((20, 8, 8, 3))}},
        "bad name": lambda: {"id": f"{episode.id}\0"},
        "way out": lambda: {"id": f"a/../{episode.id}"},
        "frozen": lambda: {"images": images | {"static": static[:1] * 20}},
    }
    return replace(episode, **changes[how]())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "non_finite"),
        ("infinite state", "non_finite"),
        ("nan scene", "non_finite"),
        ("too far", "action_bounds"),
        ("half open", "gripper_value"),
        ("six dims", "shape"),
        ("double", "dtype"),
        ("time stands", "time"),
        ("time jumps", "time"),
        ("nan time", "time"),
        ("beyond the end", "span_range"),
        ("nothing", "span_range"),
        ("silence", "empty_language"),
        ("no picture", "unreadable_image"),
        ("other size", "shape"),
        ("slower", "time"),
        ("no rate", "time"),
        ("infinite start", "time"),
        ("half a character", "text"),
        ("half a scene", "text"),
        ("half an answer", "text"),
        ("a late question", "span_range"),
        ("no question", "empty_language"),
        ("no camera", "no_image"),
        ("no pixels", "shape"),
        ("float picture", "dtype"),
        ("bad name", "bad_id"),
        ("way out", "bad_id"),
        ("frozen", "frozen_camera"),
    ],
)
def test_each_fault_has_its_reason(episode: Episode, how: str, reason: str) -> None:
    limits = QualityLimits(frozen_steps=20)
    check(episode, limits)
    with pytest.raises(BadEpisode, match=episode.id) as caught:
        check(_spoilt(episode, how), limits)
    assert caught.value.reason == reason and reason in REASONS


def test_a_rate_says_nothing_of_a_picture() -> None:
    frame = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    none = np.zeros((1, 0), np.float32)
    picture = Episode(
        "p", "llava", "none", "picture", NO_ACTIONS, 25.0, np.zeros(1), {"image": [frame]}, none, none, ()
    )
    check(picture, QualityLimits())
    with pytest.raises(BadEpisode, match="time: p: recorded at inf Hz"):
        check(replace(picture, rate_hz=np.inf), QualityLimits())


def test_limits_are_limits(episode: Episode) -> None:
    with pytest.raises(BadEpisode, match="the limit is 21"):
        check(episode, QualityLimits(min_steps=21))
    check(_spoilt(episode, "frozen"), QualityLimits(frozen_steps=21))
    with pytest.raises(BadEpisode, match="frame_count"):
        replace(episode, state=episode.state[:-1])
