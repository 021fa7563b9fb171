"""Which of the objects of an image a text names: rightly, invented, left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """Counts of one text."""

    right: int
    """Named objects that the image has; as often as it has them."""
    invented: int
    left_out: int

    @property
    def precision(self) -> float:
        """Share of the named objects that the image has; 0 where none is named."""
        return self.right / max(self.right + self.invented, 1)

    @property
    def recall(self) -> float:
        """Share of the image's objects that are named."""
        return self.right / max(self.right + self.left_out, 1)


def compare_objects(named: Sequence[Hashable], present: Sequence[Hashable]) -> Named:
    """Match the objects that a text names with those of its image, each at most once.

    What an object is, is the caller's choice: a noun, or a noun with all its adjectives.
    """
    right = (Counter(named) & Counter(present)).total()
    return Named(right, len(named) - right, len(present) - right)
