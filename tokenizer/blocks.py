"""The layers that encoder, decoder and discriminator are built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.processes import drawn_for_rows

NORM_GROUP = 16  # channels a group of GroupNorm


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // NORM_GROUP), channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind GroupNorm and SiLU, added to the input. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class UpsampleBlock(nn.Module):
    """Double the resolution, then convolve. (B, C, h, w) -> (B, C', 2h, 2w).

    Nearest neighbour and a convolution leave no checkerboard, as strided deconvolutions and pixel shuffles do
    (Odena et al. 2016, https://distill.pub/2016/deconv-checkerboard).

    Args:
        noise_size: side of the map that this block gives for a whole image, to add noise to it; 0 adds none.
    """

    def __init__(self, channels: int, out_channels: int, noise_size: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.noise = NoiseInjection(out_channels, noise_size) if noise_size else nn.Identity()
        self.block = ResidualBlock(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.noise(self.conv(F.interpolate(x, scale_factor=2))))


class NoiseInjection(nn.Module):
    """Add one map of noise to all channels, each with a learned strength. (B, C, H, W) -> (B, C, H, W).

    StyleGAN's noise inputs (Karras et al. 2019, arXiv:1812.04948, sec. 3.2). Without them a decoder that must
    invent texture can make it from positions alone, and those are periodic: ridges on sand and water. In
    training the noise is new in each step; in eval mode it is one fixed map, so that the same ids always give
    the same image, alone and in a batch.
    """

    fixed: Tensor

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(channels, 1, 1))
        noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(size))
        self.register_buffer("fixed", noise, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            noise = drawn_for_rows(torch.randn, len(x), 1, *x.shape[-2:], dtype=x.dtype, device=x.device)
        else:
            noise = self.fixed[..., : x.shape[-2], : x.shape[-1]]
        return x + self.strength * noise


class AttentionBlock(nn.Module):
    """Pre-norm self-attention over all positions and an MLP. (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        for last in (self.out, down):
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def to_sequence(maps_BCHW: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), rows first."""
    return maps_BCHW.flatten(2).transpose(1, 2)


def to_map(sequence_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), the inverse of `to_sequence`."""
    return sequence_BNC.transpose(1, 2).unflatten(2, grid)
