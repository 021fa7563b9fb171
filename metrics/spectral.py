"""Figures of images that need no network: spectra by octave, and the weave of flat regions.

A discriminator on the features of an ImageNet network lowers Frechet distances in such features more than it
improves images (Kynkaanniemi et al. 2022, arXiv:2203.06026). These figures come from the pixels alone:

- power and correlation of a reconstruction with its original, by octave of spatial frequency: whether detail
  is there, and whether it is that of the original;
- weave: how far the spectrum of flat regions stands out at periods of 2, 4 and 8 px, where strided layers
  leave a regular pattern (Odena et al. 2016, https://distill.pub/2016/deconv-checkerboard).

Statistics are sums, one row for each image; a metric is a function of their sum over all images, since the
ratio of one image that has no detail, or no flat region, means nothing. All is computed in float64 on luma
(ITU-R BT.601), 0..255.

Shapes: n images, H W image size in px, P = 32 patch size in px, r c rows and columns of patches, O octaves.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

OCTAVES = ((1, 3), (3, 6), (6, 12), (12, 24), (24, 48), (48, 96))
"""Cycles an image, lower limit included, upper one not; the first is wider than an octave."""
PERIODS_PX = (2, 4, 8)
PATCH_PX = 32
"""Larger patches tell a weave from blur better, but few are flat: of 250 photos 179 have one of 32 px at 192
px, 42 one of 64 px, and at 96 px hardly any."""
PATCH_STRIDE_PX = 16
FLAT_LEVELS = 8.0
"""A patch is flat when the standard deviation of its luma is at most so many of 255 levels."""
MIN_FLAT_IMAGES = 20
"""With fewer images that have a flat patch, a bootstrap resample could hold none of them."""
WEAVE_FIELDS = {
    "periods_px": list(PERIODS_PX),
    "patch_px": PATCH_PX,
    "stride_px": PATCH_STRIDE_PX,
    "flat_levels": FLAT_LEVELS,
}
"""The definition of the weave, for the protocol of an evaluation."""

_LUMA = (0.299, 0.587, 0.114)
_CHUNK = 32  # images at a time: the patches of 32 images of 192 px take 32 MB in float64


def octave_statistics(images: Tensor, originals: Tensor) -> dict[str, np.ndarray]:
    """Measure how much of each octave's detail a reconstruction has, and how much of it is the original's.

    Each octave gives two metrics, such as "power 3-6", the power of the images over that of the originals
    (1 is best, less is blur, more is noise), and "correlation 3-6", in [-1, 1]. A window (Hann) takes the
    borders out, since the jump from one border to the opposite one has power at every frequency.

    Args:
        images: (n, 3, H, W) uint8.
        originals: likewise. Octaves that reach beyond the Nyquist frequency of the shorter side are left out.

    Returns:
        Metric name -> (n, 3) sums of the octave: power of the image, power of the original, and the real part
        of their cross spectrum. `score_of(name)` turns their sum over images into the value.
    """
    _check(images, originals)
    if not _octaves(*images.shape[-2:]):
        return {}
    pairs = zip(images.split(_CHUNK), originals.split(_CHUNK), strict=True)
    sums_nO3 = torch.cat([_octave_sums(_luma(a), _luma(b)) for a, b in pairs]).numpy()

    statistics: dict[str, np.ndarray] = {}
    for kind in ("power", "correlation"):
        for number, (low, high) in enumerate(_octaves(*images.shape[-2:])):
            statistics[f"{kind} {low}-{high}"] = sums_nO3[:, number]
    return statistics


def flat_patches(images: Tensor) -> Tensor:
    """Find the patches that are flat: (n, 3, H, W) uint8 -> (n, r, c) bool; none in images below 32 px.

    A pattern that repeats every 2, 4 or 8 px along a row or a column does not count. Otherwise the patches
    where a weave is strongest would leave the measurement.
    """
    _check(images, images)
    if min(images.shape[-2:]) < PATCH_PX:
        return torch.zeros(len(images), 0, 0, dtype=torch.bool)
    return torch.cat([_deviation(_patches(_luma(part))) <= FLAT_LEVELS for part in images.split(_CHUNK)])


def weave_statistics(
    images: Tensor, flat: Tensor, photos: Tensor, flat_in_photos: Tensor
) -> dict[str, np.ndarray]:
    """Measure how far flat regions stand out at periods of 2, 4 and 8 px, relative to those of photos.

    How far a patch stands out is its power at a period over the geometric mean of the power at the
    frequencies beside it. A metric such as "weave 4 px" is the geometric mean over the flat patches of the
    images, divided by that of the photos: 1 is like photos, 3 is a plain grid. Blur reads up to 1.2.

    Args:
        images: (n, 3, H, W) uint8.
        flat: (n, r, c) bool, the patches of `images` to measure: for reconstructions those that are flat in
            the original, for generated images those that are flat in themselves (see `flat_patches`).
        photos: (n, 3, H, W) uint8, which row i of `images` was made from or is compared with.
        flat_in_photos: (n, r, c) bool, likewise.

    Returns:
        Metric name -> (n, 4) sums over the flat patches of an image and of its photo: how far they stand out
        (natural logarithm) and their number, of both. `score_of(name)` turns their sum over images into the
        value. Empty where fewer than `MIN_FLAT_IMAGES` images, or photos, have a flat patch.
    """
    _check(images, photos)
    fewest = min(int(mask.flatten(1).any(dim=1).sum()) for mask in (flat, flat_in_photos))
    if fewest < MIN_FLAT_IMAGES:
        warnings.warn(
            f"{fewest} images have a flat patch of {PATCH_PX} px where {MIN_FLAT_IMAGES} are needed: the "
            "weave is not measured; evaluate more images",
            stacklevel=2,
        )
        return {}

    columns = []
    for pixels, mask in ((images, flat), (photos, flat_in_photos)):
        columns += [_prominence_sums(pixels, mask), mask.sum(dim=(1, 2)).double().expand(len(PERIODS_PX), -1)]
    sums_Ln4 = torch.stack(columns, dim=-1).numpy()
    return {f"weave {period} px": rows for period, rows in zip(PERIODS_PX, sums_Ln4, strict=True)}


def _luma(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, H, W) float64 in [0, 255]."""
    return torch.einsum("nchw,c->nhw", images.cpu().double(), torch.tensor(_LUMA, dtype=torch.float64))


def _octaves(height: int, width: int) -> list[tuple[int, int]]:
    """Return the octaves that an image of this size can show."""
    return [octave for octave in OCTAVES if octave[1] <= min(height, width) / 2]


def _octave_sums(images: Tensor, originals: Tensor) -> Tensor:
    """Sum power, power of the original and cross power by octave: (n, H, W) twice -> (n, O, 3)."""
    a = _windowed_spectrum(images)
    b = _windowed_spectrum(originals)
    products = torch.stack([a.abs() ** 2, b.abs() ** 2, (a * b.conj()).real], dim=1)

    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)
    columns = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)
    cycles = torch.hypot(rows[:, None], columns[None, :])

    octaves = [(cycles >= low) & (cycles < high) for low, high in _octaves(height, width)]
    return torch.einsum("nshw,ohw->nos", products, torch.stack(octaves).double())


def _windowed_spectrum(luma: Tensor) -> Tensor:
    """(n, H, W) -> (n, H, W) complex."""
    window = _hann(luma.shape[-2])[:, None] * _hann(luma.shape[-1])

    # The mean under the window, and not the plain one, leaves nothing that leaks into the first octave.
    mean = (luma * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2((luma - mean) * window)


def _hann(size: int) -> Tensor:
    return torch.hann_window(size, periodic=True, dtype=torch.float64)


def _patches(luma: Tensor) -> Tensor:
    """(n, H, W) -> (n, r, c, P, P), overlapping by half."""
    return luma.unfold(1, PATCH_PX, PATCH_STRIDE_PX).unfold(2, PATCH_PX, PATCH_STRIDE_PX)


def _deviation(patches: Tensor) -> Tensor:
    """Standard deviation without what repeats every 8 px (or 4, or 2): (n, r, c, P, P) -> (n, r, c)."""
    power = torch.fft.fft2(patches).abs() ** 2

    # Bin 4 of 32 is the period of 8 px, and its multiples are all that a pattern of 8 px consists of.
    step = PATCH_PX // max(PERIODS_PX)
    bins = torch.arange(PATCH_PX)
    regular = (bins % step == 0) & (bins > 0)
    power[..., regular, :] = 0
    power[..., :, regular] = 0
    power[..., 0, 0] = 0  # the mean
    return power.sum(dim=(-2, -1)).sqrt() / PATCH_PX**2


def _prominence_sums(images: Tensor, flat: Tensor) -> Tensor:
    """Sum over flat patches how far each period stands out: (n, 3, H, W) -> (len(PERIODS_PX), n)."""
    window = _hann(PATCH_PX)
    # Rounding to bytes adds a variance of 1/12; without it a patch of one colour gives the logarithm of 0.
    rounding = 2 * PATCH_PX * float(window.square().sum()) / 12

    sums = []
    for part, mask in zip(images.split(_CHUNK), flat.split(_CHUNK), strict=True):
        patches = _patches(_luma(part))
        patches = patches - patches.mean(dim=(-2, -1), keepdim=True)

        # A weave stands in rows and in columns: the sum of both directions.
        along_rows = torch.fft.rfft(patches * window, dim=-1).abs() ** 2
        along_columns = torch.fft.rfft(patches * window[:, None], dim=-2).abs() ** 2
        spectrum = (along_rows.sum(dim=-2) + along_columns.sum(dim=-1) + rounding).log()

        prominence = [_prominence(spectrum, PATCH_PX // period) for period in PERIODS_PX]
        sums.append(torch.stack([(values * mask).sum(dim=(1, 2)) for values in prominence]))
    return torch.cat(sums, dim=1)


def _prominence(log_spectrum: Tensor, line: int) -> Tensor:
    """How far the bin `line` lies above the two beside it: (..., P/2 + 1) -> (...).

    Beside it is two bins away, where a Hann window has no response to a sinusoid of the bin's frequency. The
    last bin, the Nyquist frequency, has one neighbour.
    """
    low = log_spectrum[..., line - 2]
    high = log_spectrum[..., line + 2] if line + 2 < log_spectrum.shape[-1] else low
    return log_spectrum[..., line] - (low + high) / 2


def _check(images: Tensor, originals: Tensor) -> None:
    for name, value in (("images", images), ("originals", originals)):
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 4:
            found = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} are {found}; expected uint8 (n, 3, H, W)")
    if images.shape != originals.shape or images.shape[1] != 3:
        shapes = f"{tuple(images.shape)} and {tuple(originals.shape)}"
        raise ValueError(f"images and originals of {shapes}; expected one shape (n, 3, H, W)")
