"""A model small enough to build in milliseconds, and batches for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upvla.model.config import ModelConfig, preset
from upvla.model.upvla import UPVLA
from upvla.types import Batch

MINI: dict[str, Any] = {
    "text_vocab_size": 320,
    "text_budget": 15,
    "qa_budget": 24,
    "chunk": 4,
    "backbone": {"width": 32, "blocks": 2, "heads": 2, "mlp": 64},
    "vision": {
        "image_size": 32,
        "patch": 16,
        "width": 16,
        "blocks": 1,
        "heads": 2,
        "mlp": 32,
        "stem": (8, 8),
        "pool": (1, 2),
        "keypoints": 8,
    },
    "vq": {"image_size": 32, "channels": 8, "z_channels": 5},
}


def mini_config(**changes: Any) -> ModelConfig:
    """MINI with changes; a nested section is changed key by key."""
    nested = {k: {**MINI[k], **v} if isinstance(v, dict) and k in MINI else v for k, v in changes.items()}
    return preset("tiny", **MINI | nested)


def mini_model(seed: int = 0, **changes: Any) -> UPVLA:
    torch.manual_seed(seed)
    return UPVLA(mini_config(**changes))


def mini_batch(config: ModelConfig, rows: int = 5, questions: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g)

    side, cameras = config.vision.image_size, len(config.vision_cameras)
    codes = (rows, config.num_views, config.codes_per_view)
    text_len = integers(0, 9, rows)
    text_ids = integers(1, config.text_vocab_size, rows, 9)
    text_ids[torch.arange(9)[None] >= text_len[:, None]] = config.pad_id
    qa_len = integers(6, 15, questions)
    qa_ids = integers(1, config.text_vocab_size, questions, 15)
    qa_ids[torch.arange(15)[None] >= qa_len[:, None]] = config.pad_id
    supervised = (torch.arange(15)[None] >= 4) & (qa_ids != config.pad_id)
    return Batch(
        text_ids=text_ids,
        text_len=text_len,
        images=integers(0, 256, rows, cameras, side, side, 3).byte(),
        codes=integers(0, config.vq.codebook_size, *codes),
        future_codes=integers(0, config.vq.codebook_size, *codes),
        actions=torch.rand(rows, config.chunk, config.action_dims, generator=g) * 2 - 1,
        action_is_pad=integers(0, 3, rows, config.chunk) == 0,
        pre_mask=torch.ones(rows, dtype=torch.bool),
        act_mask=torch.ones(rows, dtype=torch.bool),
        qa_images=integers(0, 256, questions, cameras, side, side, 3).byte(),
        qa_ids=qa_ids,
        qa_labels=torch.where(supervised, qa_ids, -100),
        positions=torch.arange(rows + questions),
    )


def take(batch: Batch, robot: slice, qa: slice) -> Batch:
    """Some rows of a batch."""
    names = ("qa_images", "qa_ids", "qa_labels")
    split = {n: getattr(batch, n)[qa if n in names else robot] for n in batch._fields if n != "positions"}
    rows = len(batch.codes)
    return Batch(**split, positions=torch.cat([batch.positions[:rows][robot], batch.positions[rows:][qa]]))


@pytest.fixture
def config() -> ModelConfig:
    return mini_config()


@pytest.fixture
def batch(config: ModelConfig) -> Batch:
    return mini_batch(config)
