"""The pointing game: does a map peak where the named thing is? (Zhang et al. 2016, arXiv:1608.00507)

Shapes: h w grid of a map. Boxes are left, top, right, bottom as shares of the image's side.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def cells_inside(boxes: Iterable[tuple[float, float, float, float]], grid: tuple[int, int]) -> np.ndarray:
    """Return which cells of the grid lie in any of the boxes: (h, w) bool.

    A cell does if its centre is in the box, or the centre of the box in the cell: a box may be smaller than a
    cell. The mean is the chance of a random cell, which is the boxes' share of the area as the grid sees it.
    """
    h, w = grid
    y = (np.arange(h)[:, None] + 0.5) / h
    x = (np.arange(w) + 0.5) / w
    inside = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
        row, column = int((top + bottom) / 2 * h), int((left + right) / 2 * w)
        inside[min(row, h - 1), min(column, w - 1)] = True
    return inside


def pointing_score(heat: np.ndarray, inside: np.ndarray) -> float:
    """Return 1 if the map peaks inside, else 0; of several cells that share the peak, the share inside.

    So a uniform map scores exactly chance, wherever an argmax would break the tie.

    Args:
        heat: (h, w), any real values; differences below a millionth of the range are ties.
        inside: (h, w) bool, as `cells_inside` gives it.
    """
    if heat.shape != inside.shape:
        raise ValueError(f"a map of {heat.shape} and cells of {inside.shape}; expected one grid")
    peak = heat >= heat.max() - 1e-6 * max(float(np.abs(heat).max()), 1e-12)
    return float(inside[peak].mean())
