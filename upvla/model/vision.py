"""The understanding encoder E1 and its projector: frames to patch features to decoder tokens.

Legend: B observations, K cameras, P patches of all cameras, g patch grid of one camera, D encoder width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from upvla.errors import Mismatch
from upvla.model.config import VisionConfig
from upvla.model.vq import content_id

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module):
    """u8[B,K,H,W,3] -> patch features f[B,P,D]; cameras one after the other, each in raster order.

    A camera's `pool` averages squares of patches. A frozen tower's features, f[B,K,P/K,D] from a cache, pass through.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.tower: SmallViT | ClipTower | None = None
        if config.kind == "vit":
            self.tower = SmallViT(config)
            self.camera = nn.Parameter(torch.randn(len(config.pool), config.width) * 0.5)
        elif config.kind == "clip":
            self.tower = ClipTower(config)
        if config.frozen:
            self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.tower is None or images.is_floating_point():
            return images.flatten(1, 2).to(self.dtype)
        features = self.tower(images.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, images.shape[:2])
        cameras = [self._pooled(features[:, k], pool) for k, pool in enumerate(self.config.pool)]
        if self.config.kind == "vit":
            cameras = [tokens + self.camera[k] for k, tokens in enumerate(cameras)]
        return torch.cat(cameras, dim=1)

    def camera_features(self, frames_BHW3: Tensor) -> Tensor:
        """u8[B,H,W,3] of any camera -> f[B,P,D]: what a cache holds of a frozen tower."""
        if self.tower is None or not self.config.cacheable:
            raise Mismatch(
                f"vision.kind {self.config.kind!r} makes no features that could be kept: it learns, or has none"
            )
        return self._pooled(self.tower(frames_BHW3.permute(0, 3, 1, 2)), self.config.pool[0])

    def _pooled(self, tokens_BPD: Tensor, pool: int) -> Tensor:
        """Squares of `pool` x `pool` patches averaged; tokens behind the patches (keypoints) stay as they are."""
        if pool == 1:
            return tokens_BPD
        grid = self.config.grid
        patches, rest = tokens_BPD.split((grid**2, tokens_BPD.shape[1] - grid**2), dim=1)
        image = patches.transpose(1, 2).unflatten(2, (grid, grid))
        return torch.cat([F.avg_pool2d(image, pool).flatten(2).transpose(1, 2), rest], dim=1)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one observation: frames [K,H,W,3], or where the tower does not learn its features [K,P/K,D]."""
        cameras, config = len(self.config.pool), self.config
        frames = (cameras, config.image_size, config.image_size, 3)
        features = (cameras, config.patches_by_camera[0], config.width)
        if self.tower is None:
            return (features,)
        return (frames, features) if config.cacheable else (frames,)

    @property
    def id(self) -> str:
        """Content hash of geometry and weights: features made by two towers agree only if this does."""
        return content_id(self.config.model_dump_json(), self)


def make_projector(inner: int, outer: int) -> nn.Sequential:
    """Patch features to decoder tokens: Linear, exact GELU, Linear. No position embedding is added."""
    return nn.Sequential(nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer))


class SmallViT(nn.Module):
    """A ViT that learns from thousands of frames: early convolutions (Xiao et al. 2021), then pre-norm blocks.

    With `keypoints`, a last token tells where features are: pixels to positions without having to be learnt.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        widths = (*config.stem, config.width)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, stride=4, padding=3)]
        for inner, outer in pairwise(widths):
            layers += [nn.GroupNorm(8, inner), nn.ReLU(), nn.Conv2d(inner, outer, 3, stride=2, padding=1)]
        self.stem = nn.Sequential(*layers[:-1])  # at twice the patch grid
        self.patch = layers[-1]
        self.keypoints = Keypoints(widths[-2], config.keypoints, config.width) if config.keypoints else None
        self.position = nn.Parameter(_grid_waves(config.grid, config.width))
        self.blocks = nn.ModuleList(ViTBlock(config.width, config.heads, config.mlp) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, frames: Tensor) -> Tensor:
        fine = self.stem(frames.to(self.position.dtype) / 127.5 - 1.0)
        x = self.patch(fine).flatten(2).transpose(1, 2) + self.position
        if self.keypoints is not None:
            x = torch.cat([x, self.keypoints(fine)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Keypoints(nn.Module):
    """Spatial softmax (Levine et al. 2016): the expected column and row, in [-1, 1], of each of `count` features."""

    def __init__(self, channels: int, count: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, count, 1, bias=False)
        self.sharpness = nn.Parameter(torch.full((count, 1), 3.0))
        self.out = nn.Linear(2 * count, width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """[B,1,width]."""
        h, w = x_BChw.shape[2:]
        maps = self.maps(x_BChw).flatten(2)
        maps = F.layer_norm(maps, maps.shape[2:]) * self.sharpness
        weight = maps.softmax(-1).unflatten(2, (h, w))
        across = torch.linspace(-1, 1, w, device=maps.device, dtype=maps.dtype)
        down = torch.linspace(-1, 1, h, device=maps.device, dtype=maps.dtype)
        points = torch.cat([(weight.sum(2) * across).sum(-1), (weight.sum(3) * down).sum(-1)], dim=1)
        return self.out(points)[:, None]


def _grid_waves(grid: int, width: int) -> Tensor:
    """f[grid^2, width]: sines and cosines of row and column. A position must be readable from a patch's *values*:
    rotary angles only steer attention, and an action is a regression of where things are.
    """
    turns = torch.logspace(0, 1, width // 4, base=grid) / grid  # half a turn over the grid, to half a turn a cell
    angles = torch.pi * turns * torch.arange(grid)[:, None]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ClipTower(nn.Module):
    """CLIP's vision transformer as UP-VLA reads it: the output of the last block but one, class token dropped.

    Built with random weights; `upvla.model.weights` fills it. Frames arrive resized by the model's `vision_resize`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.clip = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.blocks,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch,
            )
        )
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = (frames.float() / 255.0 - self.mean) / self.std
        dtype = next(self.clip.parameters()).dtype
        states = self.clip(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states
        return states[-2][:, 1:]
