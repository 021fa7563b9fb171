"""Token-wise contrast of codes and text units: FILIP (Yao et al. 2021, arXiv:2111.07783).

Shapes: B images, B' texts, S codes of an image, U text units, M text width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def late_interaction_costs(codes: Tensor, units: Tensor, unit_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every image with every text, token by token, in both directions.

    Image to text, each code looks for the unit that is nearest to it, and the image's cost is the mean over
    its codes. Text to image, each unit looks for its nearest code. The two differ: a code that shows nothing
    of the text counts in the first alone, a unit that no code shows in the second.

    Args:
        codes: (B, S, M), unit length.
        units: (B', U, M), unit length.
        unit_mask: (B', U) bool, at least one True a row.

    Returns:
        Costs (B, B') image to text, and (B, B') text to image, each in [0, 2].
    """
    similarity = torch.einsum("isd,jud->ijsu", codes, units)
    mask = unit_mask[None, :, None, :]
    of_codes = similarity.masked_fill(~mask, -torch.inf).amax(dim=3).mean(dim=2)
    best_codes = similarity.amax(dim=2).masked_fill(~unit_mask, 0.0)
    of_units = best_codes.sum(dim=2) / unit_mask.sum(dim=1)
    return 1 - of_codes, 1 - of_units


def late_interaction_unit_cost(codes: Tensor, units: Tensor) -> Tensor:
    """Cost text to image of each unit by itself: codes (B, S, M), units (B, U, M) or (U, M) -> (B, U)."""
    return 1 - (codes @ units.transpose(-2, -1)).amax(dim=1)
