"""How the summed statistics of `spectral.py` become values. Nothing here imports torch."""

from __future__ import annotations

import numpy as np

from .bootstrap import Score


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _power(sums: np.ndarray, n: int) -> np.ndarray:
    return _ratio(sums[..., 0], sums[..., 1])


def _correlation(sums: np.ndarray, n: int) -> np.ndarray:
    # Images without any detail in an octave have none of the originals': 0, not the ratio of round-off.
    images, originals, cross = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.where(images > 1e-20 * originals, _ratio(cross, np.sqrt(images * originals)), 0.0)


def _weave(sums: np.ndarray, n: int) -> np.ndarray:
    return np.exp(sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3])


SCORES: dict[str, Score] = {"power": _power, "correlation": _correlation, "weave": _weave}


def score_of(metric: str) -> Score | None:
    """Return the function that turns the summed statistics of a metric into its value.

    None if the metric is none of this module's.
    """
    return SCORES.get(metric.split()[0])
