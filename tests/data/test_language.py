from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from upvla.data.language import BLOCK_ORDER, BLOCKS, Question, questions
from upvla.data.sources import open_source


def _scenes(count: int = 40, steps: int = 40) -> list[tuple[str, np.ndarray, str]]:
    """Random but clear states: devices jump, blocks drift, some lie in the drawer."""
    scenes = []
    for number in range(count):
        rng = np.random.Generator(np.random.Philox(number))
        scene = np.zeros((steps, 24), np.float32)
        scene[:, 0] = rng.choice([0.0, 0.28], steps)
        scene[:, 1] = rng.choice([0.0, 0.08, 0.22], steps)
        scene[:, 4:6] = rng.random((steps, 2)) < 0.2  # lamps are mostly off: balance must come from us
        for block in range(3):
            scene[:, 6 + 6 * block : 9 + 6 * block] = rng.uniform((-0.3, -0.1, 0.46), (0.3, 0.1, 0.46), (steps, 3))
        scene[:, 8] = rng.choice([0.46, 0.38], steps)
        scenes.append(
            (
                f"{number:032x}",
                scene,
                ("playtable_A", "playtable_D", "calvin_scene_A", "calvin_scene_C", "elsewhere")[number % 5],
            )
        )
    return scenes


def _holds(question: Question, scene: np.ndarray, name: str) -> str:
    """Answer the question again, from its words alone."""
    text = question.question
    devices = {"drawer": ("closed", "open", scene[1] > 0.1), "led": ("off", "on", scene[5] > 0.5)}
    devices |= {"sliding door": ("right", "left", scene[0] > 0.1), "light bulb": ("off", "on", scene[4] > 0.5)}
    blocks = re.findall("|".join((*BLOCKS, "drawer handle")), text)
    if "block" in text:
        order = {"calvin_scene_A": ("pink", "blue", "red"), "calvin_scene_C": ("blue", "red", "pink")}.get(name, BLOCKS)
        assert name != "elsewhere"
        place = {colour: scene[6 + 6 * i : 9 + 6 * i] for i, colour in enumerate(order)}
        place["drawer handle"] = np.array(({"playtable_A": 0.14, "playtable_D": 0.10}.get(name, np.nan), np.nan, 0.5))
        first, second = (place[block] for block in blocks)
        named = re.findall("left|right|in front|behind", text.replace(", right?", ""))
        axis = 0 if named[0] in ("left", "right") else 1
        assert abs(first[axis] - second[axis]) >= 0.05 and min(first[2], second[2]) > 0.43
        truth = (("right", "left"), ("behind", "in front"))[axis][int(second[axis] > first[axis])]
        return (
            {"left": "to the left of", "right": "to the right of", "in front": "in front of"}.get(truth, truth)
            if (len(named) == 2)
            else ("yes" if named == [truth] else "no")
        )
    name = next(name for name in devices if name in text)
    low, high, reading = devices[name]
    rest = text.replace(name, "").replace(", right?", "")
    named = [word for word in (low, high) if re.search(rf"\b{word}\b", rest)]
    truth = high if reading else low
    return truth if len(named) == 2 else ("yes" if named == [truth] else "no")


def test_every_answer_is_true() -> None:
    scenes = _scenes()
    rows = questions(scenes, 16)
    found = {identity: (scene, name) for identity, scene, name in scenes}
    assert len(rows) > 300
    for row in rows:
        scene, name = found[row.episode_id]
        assert row.answer == _holds(row, scene[row.step], name), row


def test_no_wording_gives_its_answer_away() -> None:
    rows = questions(_scenes(), 16)
    by_wording: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_wording[row.topic, row.question][row.answer] += 1
    assert len(by_wording) > 60 and len({topic for topic, _ in by_wording}) == 13
    for answers in by_wording.values():
        assert len(answers) == 2 and len(set(answers.values())) == 1, by_wording


def test_held_out_wordings_are_never_trained_on() -> None:
    def shapes(split: str) -> set[str]:
        states = ("open", "closed", "on", "off", "left", "right", "in front", "behind")
        words = "|".join((*BLOCKS, *states, "drawer", "led", "handle", "block"))
        return {re.sub(rf"\b({words})\b", "_", row.question) for row in rows if row.split == split}

    rows = questions(_scenes(), 16)
    assert shapes("train") and shapes("held_out")
    assert not shapes("train") & shapes("held_out")
    assert Counter(row.split for row in rows)["train"] == len(rows) / 2


def test_a_picture_is_asked_about_in_most_topics_and_few_pictures_are() -> None:
    scenes = [scene for scene in _scenes() if scene[2].startswith("playtable")]
    asked: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for question in questions(scenes, 39):  # thirteen topics, three pictures
        asked[question.episode_id, question.step].add(question.topic)
    pictures = Counter(episode for episode, _ in asked)
    assert set(pictures.values()) == {3}
    assert np.mean([len(topics) for topics in asked.values()]) > 5


def test_the_same_scenes_give_the_same_questions() -> None:
    scenes = _scenes(6)
    assert questions(scenes, 8) == questions(scenes, 8)
    assert questions(scenes, 0) == [] == questions([], 8)


def test_the_order_of_blocks_is_the_public_environments(calvin_mini: Path) -> None:
    """Whatever block a task names is the one that moves."""
    source = open_source("calvin", str(calvin_mini / "training"))
    seen = set()
    for key in source.keys():
        episode = source.read(key)
        assert episode.scene_state is not None
        for span in episode.spans:
            colour = next((block for block in BLOCKS if f"{block}_block" in span.task), None)
            if colour is None:
                continue
            moves = episode.scene_state[min(span.end, len(episode) - 1)] - episode.scene_state[span.start]
            far = [float(np.abs(moves[6 + 6 * i : 12 + 6 * i]).sum()) for i in range(3)]
            assert BLOCK_ORDER[episode.scene][int(np.argmax(far))] == colour, (episode.scene, span, far)
            seen.add(episode.scene)
    assert seen == {"calvin_scene_A", "calvin_scene_B", "calvin_scene_C"}
