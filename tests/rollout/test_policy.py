"""The trained model behind the policy protocol: when it describes the scene, and what it then reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.model.conftest import mini_model
from upvla.checkpoint import Bundle
from upvla.errors import Mismatch
from upvla.images import resize
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.play import Ask, answers
from upvla.rollout.policy import UPVLAPolicy, describe_frames
from upvla.types import CALVIN_RELATIVE, Observation, Prediction

TEXTS = ["open the drawer", "push the red block", "what do you see?", "the drawer is open"]


def make_bundle(**changes: Any) -> Bundle:
    text = TextTokenizer.train(TEXTS, 320)
    model = mini_model(eot_id=text.eot_id, backbone={"init_std": 0.2}, **changes)
    return Bundle(model.config, model, VQTokenizer(model.config.vq), text, CALVIN_RELATIVE, {})


def observation(value: int) -> Observation:
    rng = np.random.Generator(np.random.Philox(value))
    frames = {name: rng.integers(0, 255, (40, 40, 3), np.uint8) for name in ("static", "gripper")}
    return Observation(frames, np.zeros(15, np.float32))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Text ids of every prediction."""
    seen: list[list[int]] = []
    original = UPVLA.predict

    def predict(self: UPVLA, images: Any, codes: Any, text_ids: Any, text_len: Any, text_room: int) -> Any:
        seen.append(text_ids[0].tolist())
        return original(self, images, codes, text_ids, text_len, text_room)

    monkeypatch.setattr(UPVLA, "predict", predict)
    return seen


def test_without_a_description_the_prompt_is_the_instruction(read: list[list[int]]) -> None:
    bundle = make_bundle()
    policy = UPVLAPolicy(bundle)
    with pytest.raises(Mismatch, match="before reset"):
        policy.act(observation(0))
    policy.reset("open the drawer")
    prediction = policy.act(observation(0))
    assert read == [bundle.text.encode("open the drawer")] and policy.description == ""
    assert prediction.actions.shape == (4, 7) and prediction.future_codes is not None
    assert policy.picture(prediction.future_codes).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(("every_chunks", "described"), [(0, [0, 3]), (2, [0, 2, 3])])
def test_the_scene_is_described_once_an_instruction_or_every_few_chunks(
    read: list[list[int]], monkeypatch: pytest.MonkeyPatch, every_chunks: int, described: list[int]
) -> None:
    question = {"question": "what do you see?", "budget": 6, "every_chunks": every_chunks}
    bundle = make_bundle(description=question)
    policy = UPVLAPolicy(bundle)
    asked: list[int] = []
    original = UPVLA.describe
    monkeypatch.setattr(UPVLA, "describe", lambda *a, **k: (asked.append(len(read)), original(*a, **k))[1])
    policy.reset("open the drawer")
    for number in range(3):
        policy.act(observation(number))
    policy.reset("push the red block")
    policy.act(observation(3))
    assert asked == described
    images = torch.from_numpy(np.stack([observation(0).images[camera][4:36, 4:36] for camera in ("static", "gripper")]))
    assert images.shape == (2, 32, 32, 3)
    spoken = bundle.text.encode(policy.description)[:6]
    assert read[-1] == [*spoken, *bundle.text.encode("push the red block")]
    assert len(describe_frames(bundle, images[None])) == 1


def ask(value: int, instruction: str = "open the drawer", **memory: Any) -> Ask:
    return Ask(observation(value), instruction, dict(memory))


def same(a: Prediction, b: Prediction) -> bool:
    return np.array_equal(a.actions, b.actions) and np.array_equal(a.future_codes, b.future_codes)  # type: ignore[arg-type]


def test_an_answer_depends_on_neither_its_neighbours_nor_its_slot() -> None:
    """To the bit: sums depend on the shape of a batch, so the shape never changes, whoever asks."""
    bundle = make_bundle(text_budget=79)
    policy = UPVLAPolicy(bundle, slots=4)
    (alone,) = policy.act_many([ask(0)])
    rng = np.random.default_rng(0)
    for count in (2, 3, 4, 7):
        place = int(rng.integers(count))
        others = [ask(10 + i, str(rng.choice(["push the red block", "a", TEXTS[2] * 3]))) for i in range(count)]
        others[place] = ask(0)
        assert same(policy.act_many(others)[place], alone), (count, place)
    single = UPVLAPolicy(bundle)
    single.reset("open the drawer")
    np.testing.assert_allclose(single.act(observation(0)).actions, alone.actions, atol=1e-5)


def test_every_pass_has_all_its_slots_and_room_for_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    original = UPVLA.predict

    def predict(self: UPVLA, images: Any, codes: Any, text_ids: Any, text_len: Any, text_room: int) -> Any:
        shapes.append((len(images), text_room))
        return original(self, images, codes, text_ids, text_len, text_room)

    monkeypatch.setattr(UPVLA, "predict", predict)
    policy = UPVLAPolicy(make_bundle(text_budget=79), slots=4)
    long = "what do you see? the drawer is open " * 4
    found = policy.act_many([ask(0), ask(1, long), ask(2), *[ask(3 + i) for i in range(4)]])
    assert len(found) == 7 and sorted(shapes) == [(4, 16), (4, 16), (4, 64)]


def test_many_worlds_are_described_together_and_each_remembers_its_own() -> None:
    question = {"question": "what do you see?", "budget": 6, "every_chunks": 2}
    bundle = make_bundle(description=question)
    many, asks = UPVLAPolicy(bundle, slots=4), [ask(i) for i in range(3)]
    many.act_many(asks[:2])
    first = asks[0].memory["description"]
    many.act_many([asks[0], asks[2]])  # the first is not due yet, the third begins
    assert asks[0].memory == {"chunks": 2, "description": first} and asks[2].memory["chunks"] == 1
    for i, each in enumerate(asks):
        shown = [resize(image, bundle.config.vision_resize) for image in observation(i).images.values()]
        filled = torch.from_numpy(np.stack([np.stack(shown)] * 4))
        assert each.memory["description"] == describe_frames(bundle, filled)[0]


def test_a_world_whose_text_has_no_room_is_refused_alone() -> None:
    policy = UPVLAPolicy(make_bundle(), slots=4)
    answer, lanes = answers(policy)
    told = answer([ask(0), ask(1, "open the drawer " * 200)])
    assert lanes is None and isinstance(told[0], Prediction) and isinstance(told[1], Mismatch)
