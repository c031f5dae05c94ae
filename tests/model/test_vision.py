"""The understanding encoder: patch order, pooling, and CLIP weights from a local folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.model.conftest import mini_config
from upvla.errors import ConfigError
from upvla.model.config import VisionConfig
from upvla.model.vision import CLIP_MEAN, CLIP_STD, Keypoints, VisionEncoder, load_clip

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


def test_clip_from_a_folder_gives_the_state_before_its_last_block(tmp_path: Path) -> None:
    source = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    source.save_pretrained(tmp_path)
    encoder = VisionEncoder(CLIP)
    load_clip(encoder, str(tmp_path))
    images = torch.randint(0, 256, (2, 1, 28, 28, 3)).byte()
    pixels = (images[:, 0].permute(0, 3, 1, 2) / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    expected = source(pixel_values=pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    found = encoder(images)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and found.shape == (2, 4, 32)


def test_what_holds_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_clip(VisionEncoder(CLIP), str(tmp_path))
    with pytest.raises(ConfigError, match="only 'clip' loads CLIP weights"):
        load_clip(VisionEncoder(mini_config().vision), str(tmp_path))
