"""The trained model behind the policy protocol: when it describes the scene, and what it then reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.model.conftest import mini_model
from upvla.checkpoint import Bundle
from upvla.errors import Mismatch
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.policy import UPVLAPolicy, describe_frames
from upvla.types import CALVIN_RELATIVE, Observation

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

    def predict(self: UPVLA, images: Any, codes: Any, text_ids: Any, text_len: Any) -> Any:
        seen.append(text_ids[0].tolist())
        return original(self, images, codes, text_ids, text_len)

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
