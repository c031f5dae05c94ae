"""The understanding encoder: patch order, pooling, and CLIP weights from a local folder."""

from __future__ import annotations

import pytest
import torch

from tests.model.conftest import mini_config
from upvla.errors import Mismatch
from upvla.model.config import VisionConfig
from upvla.model.vision import CLIP_MEAN, CLIP_STD, ClipTower, Keypoints, VisionEncoder

CLIP = VisionConfig(kind="clip", image_size=28, width=32, patch=14, blocks=3, heads=2, mlp=64, frozen=True)


def test_cameras_follow_each_other_and_the_second_is_pooled() -> None:
    torch.manual_seed(0)
    config = mini_config(vision={"image_size": 64}).vision
    encoder = VisionEncoder(config)
    images = torch.randint(0, 256, (3, 2, 64, 64, 3)).byte()
    first, second = encoder(images).split(config.patches_by_camera, dim=1)
    assert config.patches_by_camera == (16 + 1, 4 + 1) and first.shape[2] == config.width
    unpooled = encoder(images.flip(1))[:, :17] - encoder.camera[0]  # the second camera in the first one's place
    pooled = unpooled[:, :16].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(second - encoder.camera[1], torch.cat([pooled, unpooled[:, 16:]], 1))


def test_keypoints_follow_a_feature_across_the_image() -> None:
    keypoints = Keypoints(1, 1, 2)
    with torch.no_grad():
        keypoints.maps.weight.fill_(1)
        keypoints.out.weight.copy_(torch.eye(2))
        keypoints.out.bias.zero_()
        field = torch.zeros(2, 1, 9, 9)
        field[0, 0, 0, 8] = field[1, 0, 4, 4] = 1
        found = keypoints(field)[:, 0]
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [0.0, 0.0]]), atol=0.01, rtol=0)


def test_clip_gives_the_state_before_its_last_block_and_takes_cached_features() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(CLIP)
    images = torch.randint(0, 256, (2, 1, 28, 28, 3)).byte()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (images[:, 0].permute(0, 3, 1, 2) / 255 - mean) / std
    assert isinstance(encoder.tower, ClipTower)
    expected = encoder.tower.clip(pixel_values=pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    found = encoder(images)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and found.shape == (2, 4, 32)
    assert torch.equal(encoder(found[:, None]), found)
    torch.testing.assert_close(encoder.camera_features(images[:, 0]), found)
    assert encoder.input_shapes == ((1, 28, 28, 3), (1, 4, 32))


def test_a_tower_that_learns_takes_frames_only() -> None:
    encoder = VisionEncoder(mini_config().vision)
    assert encoder.input_shapes == ((2, 32, 32, 3),)
    with pytest.raises(Mismatch, match="makes no features that could be kept"):
        encoder.camera_features(torch.zeros(1, 32, 32, 3).byte())
