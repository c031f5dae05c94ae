"""Presets, and the published geometry on the meta device."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from upvla.errors import ConfigError
from upvla.model.config import ModelConfig, preset
from upvla.model.presets import PRESETS
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_survive_json(name: str) -> None:
    config = preset(name)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_small_is_a_model_for_one_gpu() -> None:
    config = preset("small")
    with torch.device("meta"):
        model, vq = UPVLA(config), VQTokenizer(config.vq)
    assert sum(p.numel() for p in model.parameters()) == 66_024_593
    assert sum(p.numel() for p in vq.parameters()) == 13_740_167
    assert (config.num_views, config.codes_per_view, config.max_robot_length) == (2, 256, 772)


def test_a_preset_with_nested_changes() -> None:
    config = ModelConfig.model_validate({"preset": "tiny", "chunk": 6, "backbone": {"blocks": 3}})
    assert (config.chunk, config.backbone.blocks, config.backbone.width) == (6, 3, preset("tiny").backbone.width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"pool": (1,)}}, "vision.pool names 1 cameras"),
        ({"vision": {"image_size": 96, "pool": (1, 4)}}, "does not divide"),
        ({"vision": {"frozen": True}}, "random weights"),
        ({"vq": {"image_size": 60}}, "not a multiple of 8"),
        ({"vq": {"image_size": (64, 36)}}, "not a multiple of 8"),
        ({"eot_id": 5000}, "eot_id"),
        ({"text_budget": 4000}, "max_positions"),
        ({"backbone": {"width": 130}}, "attention heads"),
        ({"chunks": 6}, "chunks"),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        preset("tiny", **changes)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'tyni'; known: tiny, small, base"):
        preset("tyni")


def test_base_has_the_published_vocabulary_lengths_and_parameter_counts() -> None:
    config = preset("base")
    assert (config.pad_id, config.predict_id, config.action_id) == (50295, 50300, 50304)
    assert (config.image_offset, config.mask_id, config.vocab_size) == (50305, 58497, 58498)
    assert (config.max_robot_length, config.codes_per_view, config.num_patches) == (1613, 1024, 576)
    with torch.device("meta"):
        model, vq = UPVLA(config), VQTokenizer(config.vq)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.showo) == 1_448_176_770
    assert count(model.mm_projector) == 6_295_552
    assert count(model.token_learner) == 71_331_840
    assert count(model.to_logits) == 143_430
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_525_947_592
    assert 300e6 < count(model.vision) < 308e6
    assert (count(vq.encoder), count(vq.decoder)) == (55_439_171, 39_947_833)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["showo.model.layers.23.self_attn.q_layernorm.weight"] == (64,)
    assert shapes["showo.model.layers.0.mlp.fc1.weight"] == (8192, 2048)
    assert shapes["showo.lm_head.weight"] == shapes["showo.model.embed_tokens.weight"] == (58498, 2048)
    assert shapes["token_learner.mlp.0.project.weight"] == (16384, 2048)
