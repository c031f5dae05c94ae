"""The causal LM, from transformers. Phi with layer-normed queries and keys is Show-o's and the default.

Legend: B rows, L tokens, D width, n selected positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from upvla.model.config import BackboneConfig

Cache = transformers.Cache
"""Keys and values of what was read already."""


class SlicedHead(nn.Linear):
    """An LM head that can score a range of ids. The slice is taken inside `forward`, where ZeRO-3 has the weight."""

    def forward(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        bias = None if self.bias is None else self.bias[ids]
        return F.linear(hidden, self.weight[ids], bias)


class Backbone(nn.Module):
    """Embeddings in, final-norm states out. The head is separate: it is run where something is supervised, only.

    For `phi` the state dict is Show-o's: `model.embed_tokens`, `model.layers.*`, `model.final_layernorm`, `lm_head`.
    """

    def __init__(self, config: BackboneConfig, vocab_size: int) -> None:
        super().__init__()
        self.model = transformers.AutoModel.from_config(_lm_config(config, vocab_size))
        self.flex = config.attention == "flex"
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.lm_head = SlicedHead(config.width, vocab_size, bias=config.family == "phi")
        nn.init.normal_(self.lm_head.weight, std=config.init_std)
        if self.lm_head.bias is not None:
            nn.init.zeros_(self.lm_head.bias)

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.model.embed_tokens(ids_BL)

    def forward(self, embeds_BLD: Tensor, allowed: Tensor, positions_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """States after the final norm, [B,L,D].

        `allowed` bool[B,1,L,K] is used as it is (transformers returns 4-D masks untouched), K > L with a `cache` of
        earlier keys. No row of it may be empty.
        """
        return self.model(
            inputs_embeds=embeds_BLD,
            attention_mask=self._mask(allowed, embeds_BLD.dtype),
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _mask(self, allowed_B1LK: Tensor, dtype: torch.dtype) -> Tensor | BlockMask:
        if self.flex:
            batch, _, queries, keys = allowed_B1LK.shape

            def visible(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return allowed_B1LK[b, 0, q, k]

            return create_block_mask(visible, batch, None, queries, keys, device=str(allowed_B1LK.device))
        return torch.zeros_like(allowed_B1LK, dtype=dtype).masked_fill_(~allowed_B1LK, torch.finfo(dtype).min)

    def new_cache(self) -> Cache:
        """An empty store of keys and values for `forward`."""
        return transformers.DynamicCache(config=self.model.config)


def _lm_config(config: BackboneConfig, vocab_size: int) -> transformers.PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "use_cache": False,
        # A pad id would freeze its embedding row, which the published model trains.
        "pad_token_id": None,
        "attn_implementation": "flex_attention" if config.attention == "flex" else config.attention,
    }
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.family == "phi":
        rope["partial_rotary_factor"] = config.rotary_fraction
        values |= {"hidden_act": "gelu_pytorch_tanh", "qk_layernorm": True, "layer_norm_eps": config.norm_eps}
    else:
        values |= {"rms_norm_eps": config.norm_eps, "head_dim": config.width // config.heads}
    return transformers.AutoConfig.for_model(config.family, rope_parameters=rope, **values)
