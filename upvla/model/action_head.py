"""Attention pooling over the action queries' states (Voltron's MAP block; upvla.md 1.6). Names are the published ones.

Legend: B rows, C action queries, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """g * x / max(||x|| * D^-1/2, 1e-8)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True) * self.scale
        return x / norm.clamp(min=1e-8) * self.g


class GatedProjection(nn.Module):
    """[u, g] = split(Linear(x)); u * SiLU(g)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.project = nn.Linear(inner, 2 * outer)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.project(x).chunk(2, dim=-1)
        return u * F.silu(g)


class PoolingAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, latent_B1D: Tensor, x_BCD: Tensor) -> Tensor:
        def split(part: Tensor) -> Tensor:
            return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.kv(x_BCD).chunk(2, dim=-1)
        y_BH1d = F.scaled_dot_product_attention(split(self.q(latent_B1D)), split(k), split(v))
        return self.proj(y_BH1d.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """f[B,C,D] -> f[B,D]: one latent query, post-norm, with twice `heads` attention heads as published."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, width) * 0.02)
        self.projection = nn.Linear(width, width)
        self.attn = PoolingAttention(width, 2 * heads)
        self.attn_norm = RMSNorm(width)
        self.mlp = nn.Sequential(GatedProjection(width, 4 * width), nn.Linear(4 * width, width))
        self.mlp_norm = RMSNorm(width)

    def forward(self, x_BCD: Tensor) -> Tensor:
        latent_B1D = self.latents.expand(x_BCD.shape[0], 1, -1)
        latent_B1D = self.attn_norm(latent_B1D + self.attn(latent_B1D, self.projection(x_BCD)))
        return self.mlp_norm(latent_B1D + self.mlp(latent_B1D)).squeeze(1)
