"""PSNR and SSIM of reconstructions, one value an image.

Legend: `B` images, `C` channels, `H W` size in px.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

_CHUNK = 32  # images at a time through the float64 filters of SSIM


def psnr(images: Tensor, targets: Tensor) -> np.ndarray:
    """Return 10 log10(255^2 / MSE) of each pair of uint8 images (B, C, H, W); infinite where equal."""
    _check(images, targets)
    error = (images.double() - targets.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(255.0**2 / error)).numpy()


def ssim(images: Tensor, targets: Tensor) -> np.ndarray:
    """Return the mean structural similarity of each pair of uint8 images (B, C, H, W), both sides at least 11
    px.

    Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment", sec. III-C: 11 x 11 Gaussian window
    of sigma 1.5, K1 = 0.01, K2 = 0.03, without borders; the mean over the channels of R, G and B.
    """
    _check(images, targets)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(images.shape[-2:])} px; SSIM's window needs at least 11 x 11")
    pairs = zip(images.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.cat([_ssim_chunk(a.double(), b.double()) for a, b in pairs]).numpy()


def _ssim_chunk(a: Tensor, b: Tensor) -> Tensor:
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Filter each channel with the Gaussian window, valid positions only, to (B, C, H-10, W-10)."""
    window = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
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
