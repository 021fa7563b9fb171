"""Bootstrap intervals: deterministic, right in simulation, tight when paired."""

from __future__ import annotations

import numpy as np
import pytest

from tavq.metrics.bootstrap import bootstrap_interval, difference_over_seeds, paired_difference
from tavq.metrics.captions import bleu_score


def ratio(sums: np.ndarray, n: int) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def test_nominal_coverage_of_a_mean():
    """95 % intervals of the mean of 80 skewed values cover the truth in about 95 of 100 draws."""
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = bootstrap_interval(draw.exponential(size=80), resamples=300, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.975


def test_nominal_coverage_of_a_ratio_of_sums():
    """The same for a corpus score, which is no mean of per-image scores: sum(matched) / sum(length)."""
    draw = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        lengths = draw.integers(5, 20, size=80)
        interval = bootstrap_interval(
            np.stack([draw.binomial(lengths, 0.3), lengths], 1), ratio, resamples=300, seed=trial
        )
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_paired_difference_is_tighter_and_covers():
    draw = np.random.default_rng(2)
    shared = draw.normal(size=200) * 5
    a, b = shared + draw.normal(size=200), shared + 0.5 + draw.normal(size=200)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(b.mean() - a.mean())
    assert difference.low < 0.5 < difference.high
    assert difference.excludes_zero
    alone = bootstrap_interval(a)
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    assert not paired_difference(a, a).excludes_zero


def test_seed_decides():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_corpus_bleu_of_the_whole_set():
    rows = np.array([[4, 4, 4, 3, 2, 1, 4, 3, 2, 1], [4, 4, 4, 3, 2, 1, 2, 0, 0, 0]], dtype=float)
    interval = bootstrap_interval(rows, lambda sums, n: bleu_score(sums, 1), resamples=100)
    assert interval.value == pytest.approx(6 / 8, abs=1e-6)
    assert interval.low == pytest.approx(0.5, abs=1e-6) and interval.high == pytest.approx(1, abs=1e-6)


def test_refused_input():
    with pytest.raises(ValueError, match="n >= 1"):
        bootstrap_interval(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="pair the same images"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_a_difference_over_seeds_covers_what_another_training_would_change():
    draw = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        of_seeds = draw.normal(scale=0.3, size=(8, 1))
        b = 0.2 + of_seeds + draw.normal(size=(8, 60))
        interval = difference_over_seeds(np.zeros((8, 60)), b, resamples=200, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.86 <= covered / 200 <= 0.99
    assert interval.value == pytest.approx(b.mean())
    pooled = paired_difference(np.zeros(480), b.ravel())
    assert interval.high - interval.low > 1.4 * (pooled.high - pooled.low)


def test_one_seed_leaves_the_images():
    a, b = np.random.default_rng(5).normal(size=(2, 100))
    over, paired = difference_over_seeds(a[None], b[None]), paired_difference(a, b)
    assert over.value == pytest.approx(paired.value)
    assert (over.low, over.high) == pytest.approx((paired.low, paired.high))
    with pytest.raises(ValueError, match="seeds, images"):
        difference_over_seeds(a, b)
