"""How candidates of one prompt are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

RankBy = Literal["likelihood", "alignment", "sum"]


def combine_scores(scores: Sequence[Tensor]) -> Tensor:
    """Add up several kinds of scores of the same candidates.

    Args:
        scores: one or more kinds of scores (..., G).

    Returns:
        (..., G). One kind is returned as it is. Several are standardised over the candidates first, since
        nats and alignment scores have no common unit.
    """
    if len(scores) == 1:
        return scores[0]
    total = scores[0] * 0
    for score in scores:
        deviation = score.std(-1, keepdim=True).clamp_min(1e-6)
        total = total + (score - score.mean(-1, keepdim=True)) / deviation
    return total
