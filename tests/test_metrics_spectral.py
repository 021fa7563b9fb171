"""Spectra by octave and the weave of flat regions, against answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tavq.metrics.spectral import (
    PATCH_PX,
    flat_patches,
    octave_statistics,
    weave_statistics,
)
from tavq.metrics.spectral_scores import score_of

OCTAVES_OF_96_PX = {"1-3": 0.2, "3-6": 0.1, "6-12": 0.05, "12-24": 0.03, "24-48": 0.02}
"""And how far noise may be from its expectation: low octaves hold few frequencies."""


def grey(luma: Tensor) -> Tensor:
    """(n, H, W) -> (n, 3, H, W) uint8."""
    return luma.round().clamp(0, 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def noise(seed: int, deviation: float, n: int = 40, size: int = 96) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 128 + deviation * torch.randn(n, size, size, generator=rng, dtype=torch.float64)


def values(statistics: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(score_of(name)(rows.sum(axis=0), len(rows))) for name, rows in statistics.items()}


def weave(images: Tensor, photos: Tensor) -> dict[str, float]:
    flat = flat_patches(photos)
    return values(weave_statistics(images, flat, photos, flat))


def test_a_sinusoid_of_half_the_amplitude_and_another_phase():
    """Power is a quarter, correlation the cosine of the shift; other octaves are empty."""
    x = torch.arange(96, dtype=torch.float64) / 96
    shift = math.pi / 3
    original = grey(128 + 100 * torch.sin(2 * math.pi * 9 * x).expand(1, 96, 96))
    image = grey(128 + 50 * torch.sin(2 * math.pi * 9 * x + shift).expand(1, 96, 96))
    statistics = octave_statistics(image, original)
    found = values(statistics)
    assert found["power 6-12"] == pytest.approx(0.25, rel=0.01)
    assert found["correlation 6-12"] == pytest.approx(math.cos(shift), abs=0.01)
    elsewhere = sum(statistics[f"power {octave}"][0, 1] for octave in OCTAVES_OF_96_PX if octave != "6-12")
    assert elsewhere < 1e-4 * statistics["power 6-12"][0, 1]


def test_noise_of_the_originals_strength_doubles_the_power():
    original = noise(0, 20)
    found = values(octave_statistics(grey(original + noise(1, 20) - 128), grey(original)))
    for octave, tolerance in OCTAVES_OF_96_PX.items():
        assert found[f"power {octave}"] == pytest.approx(2, rel=tolerance), octave
        assert found[f"correlation {octave}"] == pytest.approx(math.sqrt(0.5), rel=tolerance), octave


def test_blur_has_the_power_of_its_transfer_function():
    """Of white noise blurred by (1, 2, 1) / 4 down and across, with wrapped borders."""
    original = noise(0, 20)
    down = (original.roll(1, 1) + 2 * original + original.roll(-1, 1)) / 4
    blurred = (down.roll(1, 2) + 2 * down + down.roll(-1, 2)) / 4
    found = values(octave_statistics(grey(blurred), grey(original)))

    cycles = torch.fft.fftfreq(96, 1 / 96)
    along_one_axis = torch.cos(math.pi * cycles / 96) ** 2
    transfer = along_one_axis[:, None] * along_one_axis[None, :]
    radius = torch.hypot(cycles[:, None], cycles[None, :])
    for octave in OCTAVES_OF_96_PX:
        low, high = map(int, octave.split("-"))
        inside = transfer[(radius >= low) & (radius < high)]
        power = float(inside.square().mean())
        assert found[f"power {octave}"] == pytest.approx(power, rel=0.05), octave
        correlation = float(inside.mean()) / math.sqrt(power)
        assert found[f"correlation {octave}"] == pytest.approx(correlation, rel=0.05), octave


def test_borders_that_do_not_match_have_no_power_at_high_frequencies():
    ramp = grey(torch.linspace(0, 255, 96).expand(1, 96, 96))
    statistics = octave_statistics(ramp, ramp)
    assert statistics["power 24-48"][0, 1] < 1e-4 * statistics["power 1-3"][0, 1]


def test_octaves_reach_to_the_nyquist_frequency_and_no_further():
    small = octave_statistics(grey(noise(0, 20, n=1)), grey(noise(0, 20, n=1)))
    large = octave_statistics(*[grey(noise(0, 20, n=1, size=192))] * 2)
    assert [name for name in small if name.startswith("power")] == [f"power {o}" for o in OCTAVES_OF_96_PX]
    assert set(large) - set(small) == {"power 48-96", "correlation 48-96"}
    assert values(large) == dict.fromkeys(large, pytest.approx(1))


def test_images_without_detail_have_none_of_the_originals():
    found = values(octave_statistics(grey(torch.full((2, 96, 96), 128.0)), grey(noise(0, 20, n=2))))
    assert found == dict.fromkeys(found, pytest.approx(0, abs=1e-9))


def test_white_noise_has_no_weave():
    found = weave(grey(noise(0, 4)), grey(noise(1, 4)))
    assert found == {f"weave {period} px": pytest.approx(1, abs=0.04) for period in (2, 4, 8)}


@pytest.mark.parametrize("directions", [1, 2])
def test_a_planted_grid_of_period_4_stands_out_as_worked_out_by_hand(directions):
    """A sinusoid of amplitude A along rows adds A^2 P / (12 sigma^2) to the figure of noise, 1: a Hann window
    passes the power (A P / 4)^2 of it and 3/8 P sigma^2 of the noise, in each of two directions."""
    photos = noise(0, 4)
    stripes = 2 * torch.cos(math.pi / 2 * torch.arange(96))
    images = photos + stripes + (stripes[:, None] if directions == 2 else 0)
    found = weave(grey(images), grey(photos))
    assert found["weave 4 px"] == pytest.approx(1 + directions * 2**2 * PATCH_PX / (12 * 4**2), rel=0.05)
    assert found["weave 2 px"] == pytest.approx(1, abs=0.02)
    assert found["weave 8 px"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_grid_does_not_take_its_patches_out_of_the_measurement(period):
    """Half of each image is flat: the same patches with a strong grid and without."""
    photos = torch.cat([noise(0, 2)[..., :48], noise(1, 60)[..., 48:]], dim=2)
    stripes = 30 * torch.cos(2 * math.pi / period * torch.arange(96))
    plain = flat_patches(grey(photos))
    assert plain.sum() == 40 * 5 * 2, "the two columns of patches that lie within the left half"
    assert torch.equal(flat_patches(grey(photos + stripes)), plain)
    assert torch.equal(flat_patches(grey(photos + stripes[:, None])), plain)


def test_regions_that_are_not_flat_do_not_count():
    photos = torch.cat([noise(0, 2)[..., :48], noise(1, 60)[..., 48:]], dim=2)
    stripes = 30 * torch.cos(math.pi / 2 * torch.arange(96))
    stripes[:48] = 0
    assert weave(grey(photos + stripes), grey(photos))["weave 4 px"] == pytest.approx(1, abs=0.01)


def test_regions_of_one_colour_count_as_rounding_noise():
    photos = torch.full((40, 96, 96), 255.0)
    found = weave(grey(photos), grey(photos - 128 + noise(0, 4)))
    assert found == dict.fromkeys(found, pytest.approx(1, abs=0.04)) and len(found) == 3


def test_every_flat_patch_counts_alike():
    """A grid in the quiet half of the images shows, though the noise of the other half has far more power."""
    photos = torch.cat([noise(0, 0.5, n=20), noise(1, 7, n=20)])
    images = photos.clone()
    images[:20] += torch.cos(math.pi / 2 * torch.arange(96))
    assert weave(grey(images), grey(photos))["weave 4 px"] > 1.5


def test_blur_is_no_weave():
    photos = noise(0, 4)
    blurred = (photos.roll(1, 2) + 2 * photos + photos.roll(-1, 2)) / 4
    blurred = (blurred.roll(1, 1) + 2 * blurred + blurred.roll(-1, 1)) / 4
    assert max(weave(grey(blurred), grey(photos)).values()) < 1.2


def test_too_few_flat_images_give_no_weave():
    rough = grey(noise(0, 60))
    with pytest.warns(UserWarning, match="0 images have a flat patch of 32 px where 20 are needed"):
        assert weave(rough, rough) == {}
    with pytest.warns(UserWarning, match="0 images"):
        assert weave(rough[..., :16, :16], rough[..., :16, :16]) == {}


def test_other_metrics_are_left_to_their_modules():
    assert score_of("PSNR") is None and score_of("distinct captions") is None


def test_refused_input():
    image = grey(noise(0, 4, n=1))
    with pytest.raises(TypeError, match="expected uint8"):
        octave_statistics(image.float(), image)
    with pytest.raises(ValueError, match="one shape"):
        octave_statistics(image, image[..., :48])
