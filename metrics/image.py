"""PSNR and SSIM of reconstructions, one value per image.

Both compute in float64: the variances of SSIM are differences of nearly equal numbers.

Shapes: B images, C channels, H W image size in px.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

_CHUNK = 32  # images at a time through the filters of SSIM, whose float64 maps take much memory


def psnr(images: Tensor, targets: Tensor) -> np.ndarray:
    """Compute the peak signal-to-noise ratio of each image, 10 log10(255^2 / MSE).

    Args:
        images: (B, C, H, W) uint8.
        targets: likewise.

    Returns:
        (B,) float64, in dB; infinite where image and target are equal.
    """
    _check(images, targets)
    mse = (images.double() - targets.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(255.0**2 / mse)).numpy()


def ssim(images: Tensor, targets: Tensor) -> np.ndarray:
    """Compute the mean structural similarity of each image.

    Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment", sec. III-C: 11 x 11 Gaussian window
    of sigma 1.5, K1 = 0.01, K2 = 0.03, without borders; the mean over R, G and B.

    Args:
        images: (B, C, H, W) uint8, both sides at least 11 px.
        targets: likewise.

    Returns:
        (B,) float64, 1 where image and target are equal.
    """
    _check(images, targets)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(images.shape[-2:])} px; SSIM's window needs at least 11 x 11")
    pairs = zip(images.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.cat([_ssim_chunk(a.double(), b.double()) for a, b in pairs]).numpy()


def _ssim_chunk(a: Tensor, b: Tensor) -> Tensor:
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2

    mean_a = _blur(a)
    mean_b = _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b

    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Filter each channel with the Gaussian window: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    window = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    # A Gaussian is separable: a column and a row of 11 weights instead of 11 x 11.
    planes = x.flatten(0, 1)[:, None]
    planes = conv2d(conv2d(planes, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    return planes.view(*x.shape[:2], *planes.shape[-2:])


def _check(images: Tensor, targets: Tensor) -> None:
    for name, value in (("images", images), ("targets", targets)):
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 4:
            raise TypeError(
                f"{name} are {getattr(value, 'dtype', type(value).__name__)}; expected uint8 (B, C, H, W)"
            )
    if images.shape != targets.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and targets {tuple(targets.shape)}; expected one shape"
        )
