"""MAGVIT-v2-style image tokenizer (Yu et al. 2023; Show-o's 2-D variant): convolutions and look-up-free quantisation.

Legend: B frames, H W pixels, h w code grid, N = h*w codes in raster order, Z latent channels, C features.
Module and buffer names are those of the published checkpoint, so its weights load by name.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvla.errors import Mismatch
from upvla.model.config import VQConfig
from upvla.types import Losses, Term


class VQTokenizer(nn.Module):
    """Frames <-> image codes. Sides may be any multiple of `config.downsampling`; square where nothing else is said."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = LookupFreeQuantizer(config.z_channels)
        self.decoder = Decoder(config)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """f32[B,3,H,W] in [-1, 1] -> codes i64[B,N]."""
        self._check(pixels_B3HW.shape)
        return self.quantize.codes(self.encoder(pixels_B3HW)).flatten(1)

    def encode_frames(self, frames_BHW3: Tensor) -> Tensor:
        """u8[B,H,W,3] -> codes i64[B,N]."""
        return self.encode(to_pixels(frames_BHW3, self.encoder.conv_in.weight.dtype))

    def decode(self, codes_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes i64[B,N] -> f32[B,3,H,W], about [-1, 1]. `grid` (h, w) is needed where it is not square."""
        num = codes_BN.shape[1]
        h, w = grid or (round(num**0.5), round(num**0.5))
        if h * w != num:
            raise Mismatch(f"vq.decode: {num} codes do not fill a {h} x {w} grid; pass grid=(h, w)")
        z_BNZ = self.quantize.embedding[codes_BN]
        return self.decoder(z_BNZ.transpose(1, 2).reshape(-1, self.config.z_channels, h, w))

    @property
    def id(self) -> str:
        """Content hash of geometry and weights: codes made by two tokenizers agree only if this does."""
        return content_id(self.config.model_dump_json(exclude={"loss"}), self)

    def _check(self, shape: torch.Size) -> None:
        step = self.config.downsampling
        if len(shape) != 4 or shape[1] != 3 or shape[2] % step or shape[3] % step:
            raise Mismatch(f"vq.encode: expected [B, 3, H, W] with sides divisible by {step}, got {list(shape)}")


@torch.no_grad()
def reconstructions(vq: VQTokenizer, frames_BHW3: Tensor) -> Tensor:
    """What a person looks at: frames u8[B,H,W,3] side by side over what their codes keep, u8[2H,B*W,3]."""
    height, width = frames_BHW3.shape[1:3]
    grid = (height // vq.config.downsampling, width // vq.config.downsampling)
    decoded = to_frames(vq.decode(vq.encode_frames(frames_BHW3), grid))
    return torch.cat([torch.cat(list(row), dim=1) for row in (frames_BHW3, decoded)])


class VQTraining(nn.Module):
    """The tokenizer with its loss: reconstruction + commitment + entropy, per frame."""

    def __init__(self, vq: VQTokenizer) -> None:
        super().__init__()
        self.vq = vq

    def forward(self, frames_BHW3: Tensor) -> Losses:
        """u8[B,H,W,3] -> Losses with objective `vq`, a sum over frames.

        Pixels that stand out from their neighbourhood (a lamp, a block, the gripper) weigh more: they are few, and an
        even mean lets them dissolve into the table. The diversity part of the entropy term is taken over the
        micro-batch: it is the one part of the loss that depends on how a batch is split.
        """
        config = self.vq.config.loss
        pixels = to_pixels(frames_BHW3, self.vq.encoder.conv_in.weight.dtype)
        z = self.vq.encoder(pixels)
        quantized, commitment, entropy, diversity = self.vq.quantize(z)
        error = (self.vq.decoder(quantized) - pixels).float()
        with torch.no_grad():
            contrast = (pixels - _neighbourhood(pixels, 9)).float().abs().amax(1, True)
            weight = 1 + config.contrast * contrast
            weight = weight / weight.mean()
        squared = error.square()
        reconstruction = (weight * (config.l1 * error.abs() + config.l2 * squared)).mean()
        loss = reconstruction + config.commitment * commitment + config.entropy * (entropy - diversity)
        count = torch.tensor(float(len(pixels)), device=pixels.device)
        watched = {"vq_mse": squared.mean(), "vq_l1": error.abs().mean(), "vq_diversity": diversity}
        return Losses(
            objectives={"vq": Term(loss * count, count)},
            watched={name: Term(value.detach() * count, count) for name, value in watched.items()},
        )

    def counts(self, frames_BHW3: Tensor) -> dict[str, float]:
        """Supervised elements by objective, without a forward pass."""
        return {"vq": float(len(frames_BHW3))}


def content_id(geometry: str, module: nn.Module) -> str:
    """Identity of a module that others' data is made with: its geometry and every tensor."""
    digest = hashlib.sha256(geometry.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def to_pixels(frames_BHW3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """u8[B,H,W,3] -> [B,3,H,W] in [-1, 1]."""
    return frames_BHW3.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0


def to_frames(pixels_B3HW: Tensor) -> Tensor:
    """[B,3,H,W] in [-1, 1] -> u8[B,H,W,3]."""
    return ((pixels_B3HW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class LookupFreeQuantizer(nn.Module):
    """One bit a channel, its sign; channel 0 is the most significant bit. No codebook is learnt."""

    embedding: Tensor  # +-1, f32[2^Z,Z]
    power_vals: Tensor  # i64[Z]

    def __init__(self, z_channels: int) -> None:
        super().__init__()
        powers = 2 ** torch.arange(z_channels - 1, -1, -1)
        bits = (torch.arange(2**z_channels)[:, None] // powers) % 2
        self.register_buffer("embedding", bits.float() * 2 - 1)
        self.register_buffer("power_vals", powers)

    def codes(self, z_BZhw: Tensor) -> Tensor:
        """i64[B,h,w]."""
        return ((z_BZhw > 0) * self.power_vals[:, None, None]).sum(1)

    def forward(self, z_BZhw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signs with a straight-through gradient, then three means: ||sign - z||^2, bit entropy, entropy of the mean.

        Published quantiser loss: 0.125 x the first + 0.1 x (the second - the third), p(bit) = sigmoid(4 z).
        """
        sign = torch.where(z_BZhw > 0, 1.0, -1.0).to(z_BZhw.dtype)
        z = z_BZhw.float()
        probability = torch.sigmoid(4 * z)
        entropy = _binary_entropy(probability).mean()
        diversity = _binary_entropy(probability.mean((0, 2, 3))).mean()
        commitment = (sign.float() - z).square().mean()
        return z_BZhw + (sign - z_BZhw).detach(), commitment, entropy, diversity


def _binary_entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())


def _neighbourhood(pixels: Tensor, side: int) -> Tensor:
    """Mean over side x side pixels, those outside of the frame left out; by rows, then by columns, which is faster."""
    for kernel in ((side, 1), (1, side)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        pixels = F.avg_pool2d(pixels, kernel, 1, padding, count_include_pad=False)
    return pixels


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = _norm(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = _norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """Single head over all grid cells, scale C^-1/2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BChw: Tensor) -> Tensor:
        n = self.norm(x_BChw)
        q, k, v = (part(n).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y_BNC = F.scaled_dot_product_attention(q, k, v)
        return x_BChw + self.proj_out(y_BNC.transpose(1, 2).reshape(x_BChw.shape))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Stride-2 convolution with the published asymmetric zero padding: right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution unless it is the last level on the way."""

    def __init__(self, inner: int, outer: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer) for i in range(blocks))
        self.width = outer if blocks else inner
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        last = len(config.encoder_multipliers) - 1
        for i, (multiplier, blocks) in enumerate(zip(config.encoder_multipliers, config.encoder_blocks, strict=True)):
            level = Level(width, config.channels * multiplier, blocks)
            width = level.width
            if i < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """`up[i]` is indexed by resolution level, 0 = full, and run from the deepest to 0."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.channels * config.decoder_multipliers[-1]
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels: list[Level] = []
        for i in reversed(range(len(config.decoder_multipliers))):
            level = Level(width, config.channels * config.decoder_multipliers[i], config.decoder_blocks[i])
            width = level.width
            if i > 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
