"""Bootstrap intervals over images, for metrics that are a function of summed per-image statistics.

A mean is one such function; corpus BLEU and METEOR are others. CIDEr's document frequencies stay those of the
whole evaluated set. (Efron 1979, "Bootstrap methods"; percentile interval; for the paired form Koehn 2004,
"Statistical significance tests for machine translation evaluation".)

Legend: `n` images, `k` statistics an image, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Score = Callable[[np.ndarray, int], np.ndarray]
"""(sums (..., k) over the images, n) -> (...) values."""

_CHUNK = 200  # resamples drawn at a time: (200, n) counts


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval over `n` images."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is judged real."""
        return self.low > 0 or self.high < 0


def mean_score(sums: np.ndarray, n: int) -> np.ndarray:
    """The score that is a plain mean of one statistic."""
    return sums[..., 0] / n


def bootstrap_interval(
    rows: np.ndarray, score: Score = mean_score, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the score of all images and the percentile interval of its resamples.

    Args:
        rows: (n,) or (n, k) statistics, one row an image.
        score: turns summed statistics into the metric.
        level: coverage of the interval.
        resamples: R; the same `seed` gives the same interval.
    """
    rows = _as_rows(rows)
    draws = np.concatenate(
        [score(counts @ rows, len(rows)) for counts in _counts(len(rows), resamples, seed)]
    )
    return _interval(float(score(rows.sum(axis=0), len(rows))), draws, level, len(rows))


def paired_difference(
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    score: Score = mean_score,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return score(b) - score(a) and its interval; every resample takes the same images from both."""
    rows_a, rows_b = _as_rows(rows_a), _as_rows(rows_b)
    if rows_a.shape != rows_b.shape:
        raise ValueError(
            f"per-image statistics of shapes {rows_a.shape} and {rows_b.shape}; pair the same images"
        )
    n = len(rows_a)
    draws = np.concatenate(
        [score(counts @ rows_b, n) - score(counts @ rows_a, n) for counts in _counts(n, resamples, seed)]
    )
    return _interval(float(score(rows_b.sum(axis=0), n) - score(rows_a.sum(axis=0), n)), draws, level, n)


def _as_rows(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"per-image statistics of shape {rows.shape}; expected (n,) or (n, k) with n >= 1")
    return rows


def _counts(n: int, resamples: int, seed: int):
    """Yield (<= 200, n) counts of how often each image is drawn."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        picks = generator.integers(0, n, size=(size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(picks.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _interval(value: float, draws: np.ndarray, level: float, n: int) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)
