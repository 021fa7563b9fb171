"""Bootstrap confidence intervals over images, for metrics that are a function of summed per-image statistics.

A mean is such a function; corpus BLEU and METEOR are others. The intervals are percentile intervals (Efron
1979, "Bootstrap methods"), for paired differences after Koehn 2004 ("Statistical significance tests for
machine translation evaluation").

CIDEr is resampled as a mean of per-image scores: its document frequencies stay those of the whole evaluated
set. If they were counted anew in each resample, an image that is drawn twice would make its own n-grams look
common.

Shapes: n images, k statistics per image, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Score = Callable[[np.ndarray, int], np.ndarray]
"""Turns statistics (..., k) that are summed over n images, and n, into values (...)."""

_CHUNK = 200  # resamples at a time: their counts (200, n) and not (R, n) lie in memory


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap confidence interval over `n` images."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is significant at its level."""
        return self.low > 0 or self.high < 0


def mean_score(sums: np.ndarray, n: int) -> np.ndarray:
    """Compute the score that is a plain mean of one statistic."""
    return sums[..., 0] / n


def bootstrap_interval(
    rows: np.ndarray, score: Score = mean_score, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Compute the score of all images and its percentile interval.

    Args:
        rows: (n,) or (n, k) statistics, one row per image.
        score: turns summed statistics into the metric.
        level: nominal coverage of the interval.
        resamples: R.
        seed: of the resamples; the same seed gives the same interval.
    """
    rows = _as_rows(rows)
    n = len(rows)
    value = float(score(rows.sum(axis=0), n))
    resampled = np.concatenate([score(counts @ rows, n) for counts in _counts(n, resamples, seed)])
    return _interval(value, resampled, level, n)


def paired_difference(
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    score: Score = mean_score,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Compute score(b) - score(a) and its percentile interval; see `bootstrap_interval`.

    Every resample takes the same images from both: what makes an image hard for both cancels out, and the
    interval is narrower than that of two independent sets.

    Raises:
        ValueError: `rows_a` and `rows_b` differ in shape.
    """
    rows_a = _as_rows(rows_a)
    rows_b = _as_rows(rows_b)
    if rows_a.shape != rows_b.shape:
        raise ValueError(
            f"per-image statistics of shapes {rows_a.shape} and {rows_b.shape}; pair the same images"
        )
    n = len(rows_a)
    value = float(score(rows_b.sum(axis=0), n) - score(rows_a.sum(axis=0), n))
    resampled = np.concatenate(
        [score(counts @ rows_b, n) - score(counts @ rows_a, n) for counts in _counts(n, resamples, seed)]
    )
    return _interval(value, resampled, level, n)


def difference_over_seeds(
    rows_a: np.ndarray, rows_b: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Compute the mean of b - a over training seeds and images, and its percentile interval.

    Seeds and images are resampled, so that the interval covers both what another training and what other
    images would change. With one seed it covers the images alone.

    Args:
        rows_a, rows_b: (s, n) scores; row i of both was trained with one seed.

    Raises:
        ValueError: `rows_a` and `rows_b` differ in shape.
    """
    if rows_a.shape != rows_b.shape or rows_a.ndim != 2:
        raise ValueError(
            f"scores of shapes {rows_a.shape} and {rows_b.shape}; expected (seeds, images) twice"
        )
    difference = np.asarray(rows_b, dtype=np.float64) - rows_a
    num_seeds, n = difference.shape
    of_seeds = _counts(num_seeds, resamples, seed + 1)
    of_images = _counts(n, resamples, seed)
    resampled = [
        np.einsum("rs,sn,rn->r", seeds, difference, images) / (num_seeds * n)
        for seeds, images in zip(of_seeds, of_images, strict=True)
    ]
    return _interval(float(difference.mean()), np.concatenate(resampled), level, n)


def _as_rows(rows: np.ndarray) -> np.ndarray:
    """Return the statistics as (n, k) float64: sums over thousands of images lose digits in float32."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"per-image statistics of shape {rows.shape}; expected (n,) or (n, k) with n >= 1")
    return rows


def _counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (at most 200, n) float64: how often each resample draws each image.

    Statistics are summed, so counts are all that a resample has to say: counts @ rows are its sums.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        images = rng.integers(0, n, size=(size, n))

        # One bincount for all resamples: resample r counts its images in the range from r * n on.
        images += np.arange(size)[:, None] * n
        yield np.bincount(images.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _interval(value: float, resampled: np.ndarray, level: float, n: int) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)
