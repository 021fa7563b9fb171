"""PSNR and SSIM per image, against hand-worked values and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tavq.metrics.image import psnr, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 256, (3, 3, 24, 20), generator=generator)
    noise = torch.randint(-30, 31, target.shape, generator=generator)
    return (target + noise).clamp(0, 255).to(torch.uint8), target.to(torch.uint8)


def test_psnr_by_hand():
    """An error of 5 everywhere: 20 log10(255 / 5); of 255: 0 dB."""
    zeros = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = torch.stack([torch.full((3, 4, 4), 5), torch.full((3, 4, 4), 255)]).to(torch.uint8)
    np.testing.assert_allclose(psnr(other, zeros), [20 * np.log10(51), 0.0])
    assert np.isinf(psnr(zeros, zeros)).all()


def test_ssim_by_hand():
    """Two constant images have no structure: only the luminance term is left."""
    a = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    b = torch.full((1, 3, 16, 16), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b)[0] == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert ssim(a, a)[0] == pytest.approx(1)


def test_scikit_image(pair):
    reference = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": 0,
    }
    for image, target, ours, psnr_ in zip(*pair, ssim(*pair), psnr(*pair), strict=True):
        theirs = reference.structural_similarity(image.numpy(), target.numpy(), **options)
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert psnr_ == pytest.approx(reference.peak_signal_noise_ratio(target.numpy(), image.numpy()))


def test_refused_input(pair):
    with pytest.raises(TypeError, match="expected uint8"):
        psnr(pair[0].float(), pair[1])
    with pytest.raises(ValueError, match="one shape"):
        psnr(pair[0][:2], pair[1])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(pair[0][..., :8], pair[1][..., :8])
