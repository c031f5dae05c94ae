"""Questions and answers about a scene, made from the object poses that simulators record: no picture is copied.

Every topic states a fact that is true or false at a step ("the drawer is open", "the red block is left of the blue
block"). Each step for which it is true is paired with one for which it is false, and both are asked the same question:
no answer can be guessed from the words.
Left and right follow the task language (larger x is right); behind is larger y, away from the robot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

BLOCKS = ("red", "blue", "pink")
BLOCK_ORDER = {
    **dict.fromkeys(("playtable_A", "playtable_B", "playtable_C", "playtable_D"), BLOCKS),
    "calvin_scene_A": ("pink", "blue", "red"),
    "calvin_scene_B": ("red", "blue", "pink"),
    "calvin_scene_C": ("blue", "red", "pink"),
    "calvin_scene_D": ("red", "blue", "pink"),
}
"""In which order the scene state lists the blocks (calvin_env, conf/scene/*.yaml: it is not the same everywhere). In a
scene that is not listed nobody knows which block is which, and none is asked about."""
_WHETHER_EVERY = 6  # one question in so many is answered yes or no: nothing is learnt from it before words are
_SCENE_DIMS = 24  # of CALVIN's scene state; other simulators' are not understood here
_MIN_DISTANCE_M = 0.05  # one block's width: closer than that nobody could tell
_TABLE_Z_M = 0.43  # lower lies in the drawer, out of sight


class Templates(NamedTuple):
    """Wordings of one question. `{a}`, `{b}` are objects, `{word}` one of the two states."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


class State(NamedTuple):
    """A device whose reading is clearly one of two words, or in between and then not asked about."""

    column: int
    low: float  # at or below: words[0]
    high: float  # at or above: words[1]
    words: tuple[str, str]
    name: str


STATES = {
    "drawer": State(1, 0.04, 0.12, ("closed", "open"), "drawer"),
    "slider": State(0, 0.08, 0.2, ("right", "left"), "sliding door"),
    "bulb": State(4, 0.5, 0.5001, ("off", "on"), "light bulb"),
    "led": State(5, 0.5, 0.5001, ("off", "on"), "led"),
}
DRAWER_HANDLE_X = {"playtable_A": 0.14, "playtable_B": 0.06, "playtable_C": 0.15, "playtable_D": 0.10}
"""x of the middle of the drawer's handle in scenes of known furniture; others are not asked about it."""
_HANDLE = "drawer handle"
RELATIONS = {0: ("to the left of", "to the right of"), 1: ("in front of", "behind")}

_WHICH = Templates(
    (
        "is the {a} {x} or {y}?",
        "what is the state of the {a}, {x} or {y}?",
        "tell me whether the {a} is {x} or {y}.",
        "look at the {a}. is it {x} or {y}?",
    ),
    ("would you say the {a} is {x} or {y}?", "the {a}: {x} or {y}?"),
)
_WHETHER = Templates(
    ("is the {a} {word}?", "can you see that the {a} is {word}?", "is it true that the {a} is {word}?"),
    ("would you say the {a} is {word}?", "the {a} is {word}, right?"),
)
_WHERE = Templates(
    (
        "is the {a} {x} or {y} the {b}?",
        "where is the {a}, {x} or {y} the {b}?",
        "tell me whether the {a} is {x} or {y} the {b}.",
    ),
    ("would you say the {a} is {x} or {y} the {b}?", "the {a}: {x} or {y} the {b}?"),
)
_RELATED = Templates(
    (
        "is the {a} {word} the {b}?",
        "does the {a} lie {word} the {b}?",
        "is it true that the {a} is {word} the {b}?",
    ),
    ("would you say the {a} is {word} the {b}?", "the {a} is {word} the {b}, right?"),
)


class Question(NamedTuple):
    """One row of the question table."""

    episode_id: str
    step: int
    topic: str
    question: str
    answer: str
    split: Literal["train", "held_out", "both"]  # of the wording, not of the recording
    more: tuple[tuple[str, str], ...] = ()  # further rounds of the same conversation


class _Fact(NamedTuple):
    episode_id: str
    step: int
    truth: bool


def questions(scenes: Sequence[tuple[str, np.ndarray, str]], per_episode: int) -> list[Question]:
    """(episode id, scene state f32[T,Q], scene's name) of a set of recordings -> at most `per_episode` facts each on
    average, every fact asked once in a wording for training and once in a held-out one. A function of its arguments.

    All topics look at the same few steps of a recording: a conversation about one picture goes through most of them,
    and a picture seen again is what a small model learns to see from.
    """
    topics: dict[str, list[_Fact]] = {}
    for episode_id, scene, name in scenes:
        if scene.shape[1] != _SCENE_DIMS:
            continue
        truths = list(_truths(scene, _blocks(scene, name), DRAWER_HANDLE_X.get(name)))
        drawn = sorted(range(len(scene)), key=lambda step: _digest(episode_id, step))
        steps = drawn[: -(-per_episode // len(truths))]
        for topic, truth in truths:
            facts = [_Fact(episode_id, step, bool(truth[step])) for step in steps if truth[step] >= 0]
            topics.setdefault(topic, []).extend(facts)
    rows = []
    pairs = -(-per_episode * len(scenes) // (2 * max(len(topics), 1)))
    for topic, facts in sorted(topics.items()):
        order = sorted(facts, key=lambda fact: _digest(topic, fact.episode_id, fact.step))
        true, false = ([fact for fact in order if fact.truth is wanted] for wanted in (True, False))
        for pair in list(zip(true, false, strict=False))[:pairs]:  # asked in the same words, so the words tell nothing
            coin = _digest("wording", topic, pair[0].episode_id, pair[0].step)
            rows += [_ask(topic, fact, split, coin) for fact in pair for split in ("train", "held_out")]
    return sorted(rows)


def _blocks(scene: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Colour -> f32[T,3] position in m, of a scene whose order of blocks is known."""
    return {block: scene[:, 6 + 6 * i : 9 + 6 * i] for i, block in enumerate(BLOCK_ORDER.get(name, ()))}


def _truths(
    scene: np.ndarray, blocks: Mapping[str, np.ndarray], handle_x: float | None
) -> Iterable[tuple[str, np.ndarray]]:
    """(topic, i8[T]): 1 true, 0 false, -1 not to be asked about."""
    for topic, state in STATES.items():
        reading = scene[:, state.column]
        yield topic, np.where(reading >= state.high, 1, np.where(reading <= state.low, 0, -1))
    for a, b in combinations(BLOCKS if blocks else (), 2):
        first, second = blocks[a], blocks[b]
        visible = (first[:, 2] > _TABLE_Z_M) & (second[:, 2] > _TABLE_Z_M)
        for axis in RELATIONS:
            distance = first[:, axis] - second[:, axis]
            clear = visible & (np.abs(distance) >= _MIN_DISTANCE_M)
            yield f"{a}-{b}-{axis}", np.where(clear, (distance < 0).astype(int), -1)
    if handle_x is not None:
        for block, place in blocks.items():
            x, _, z = place.T
            clear = (z > _TABLE_Z_M) & (np.abs(x - handle_x) >= _MIN_DISTANCE_M)
            yield f"{block}-{_HANDLE}-0", np.where(clear, (x < handle_x).astype(int), -1)


def _ask(topic: str, fact: _Fact, split: Literal["train", "held_out"], coin: int) -> Question:
    swapped, whether, choice = bool(coin & 1), coin % _WHETHER_EVERY == 0, coin >> 8
    if topic in STATES:
        state = STATES[topic]
        words, named = state.words, {"a": state.name}
        open_wordings, closed_wordings = _WHICH, _WHETHER
    else:
        *blocks, axis = topic.split("-")
        names = [name if name == _HANDLE else f"{name} block" for name in blocks]
        words, named = RELATIONS[int(axis)], dict(zip("ab", names, strict=True))
        open_wordings, closed_wordings = _WHERE, _RELATED
    truth = words[fact.truth if topic in STATES else not fact.truth]
    x, y = words[::-1] if swapped else words
    templates = closed_wordings if whether else open_wordings
    wordings = templates.train if split == "train" else templates.held_out
    text = wordings[choice % len(wordings)].format(word=x, x=x, y=y, **named)
    answer = truth if not whether else "yes" if x == truth else "no"
    return Question(fact.episode_id, fact.step, topic, text, answer, split)


def _digest(*parts: str | int) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big")
