"""The understanding encoder: patch order, pooling, and CLIP weights from a local folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.model.conftest import mini_config
from upvla.errors import ConfigError
from upvla.model.config import VisionConfig
from upvla.model.vision import CLIP_MEAN, CLIP_STD, VisionEncoder, load_clip

CLIP = VisionConfig(kind="clip", image_size=28, width=32, patch=14, blocks=3, heads=2, mlp=64, frozen=True)


def test_cameras_follow_each_other_and_the_second_is_pooled() -> None:
    torch.manual_seed(0)
    config = mini_config(vision={"image_size": 64}).vision
    encoder = VisionEncoder(config)
    images = torch.randint(0, 256, (3, 2, 64, 64, 3)).byte()
    patches = encoder(images)
    assert patches.shape == (3, 16 + 4, config.width) and config.patches_by_camera == (16, 4)
    swapped = encoder(images.flip(1))
    second = (swapped[:, :16] - encoder.camera[0]).unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(patches[:, 16:] - encoder.camera[1], second)


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
