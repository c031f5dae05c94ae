"""Parity tensors of the published classes: any folder of that format becomes our configs, batches and modules."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upvla.model.config import ModelConfig
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.types import Batch

ROOT = Path(__file__).resolve().parent.parent


def default_folder() -> Path:
    return Path(os.environ.get("UPVLA_SHARED", ROOT.parent / "shared")) / "golden"


class Golden:
    """One golden folder; every size comes from its `config.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / "config.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @cached_property
    def batch_tensors(self) -> dict[str, Tensor]:
        return self.tensors("train_batch")

    def config(self, **changes: Any) -> ModelConfig:
        """The published row layout at the folder's sizes: fixed text budget, full-vocabulary softmax."""
        v, vq = self.values, self.values["vq"]
        values = {
            "preset": "golden",
            "text_vocab_size": v["tok_vocab"],
            "eot_id": v["eot_id"],
            "text_budget": v["max_text"],
            "qa_budget": v["mmu_text_len"],
            "system_ids": tuple(self.batch_tensors["mmu_system_ids"][0].tolist()),
            "vision_cameras": ("static",),
            "code_cameras": ("static", "gripper")[: v["views"]],
            "vision_prompt": False,
            "image_softmax": "full",
            "chunk": v["act_step"],
            "action_dims": 7,
            "trim": False,
            "backbone": {
                "width": v["hidden"],
                "blocks": v["layers"],
                "heads": v["heads"],
                "mlp": v["inter"],
                "rotary_fraction": v["prf"],
                "rotary_base": v["theta"],
                "norm_eps": v["layer_norm_eps"],
            },
            "vision": {"kind": "features", "image_size": 1, "width": v["clip_dim"], "num_patches": v["n_clip"]},
            "vq": {
                "image_size": vq["image"],
                "channels": vq["ch"],
                "encoder_multipliers": vq["enc_mult"],
                "encoder_blocks": vq["enc_blk"],
                "decoder_multipliers": vq["dec_mult"],
                "decoder_blocks": vq["dec_blk"],
                "z_channels": v["z"],
            },
            "action_head": {"heads": v["map_heads"]},
        }
        return ModelConfig.model_validate(values | changes)

    def model(self, **changes: Any) -> UPVLA:
        model = UPVLA(self.config(**changes))
        model.load_state_dict(self.tensors("model_state"))
        return model

    def vq(self) -> VQTokenizer:
        vq = VQTokenizer(self.config().vq)
        vq.load_state_dict(self.tensors("vq_state"))
        return vq

    def text(self) -> TextTokenizer:
        return TextTokenizer((self.folder / "tokenizer.json").read_text(), self.values["tok_vocab"])

    def batch(self) -> Batch:
        t, config = self.batch_tensors, self.config()
        rows = self.values["B_pre"]
        texts = [t[f"pre_text_ids_{i}"] for i in range(rows)]
        shape = (rows, config.num_views, config.codes_per_view)
        return Batch(
            text_ids=pad_sequence(texts, batch_first=True, padding_value=config.pad_id),
            text_len=torch.tensor([len(text) for text in texts]),
            images=t["mmu_clip_features"].new_zeros(rows, 1, *t["mmu_clip_features"].shape[1:]),
            codes=(t["pre_image_tokens"] - config.image_offset).view(shape),
            future_codes=(t["pre_target_tokens"] - config.image_offset).view(shape),
            actions=t["actions"],
            action_is_pad=torch.zeros(t["actions"].shape[:2], dtype=torch.bool),
            qa_images=t["mmu_clip_features"][:, None],
            qa_ids=t["mmu_text_ids"],
            qa_labels=t["mmu_text_labels"],
            positions=torch.arange(rows + self.values["B_mmu"]),
        )
