"""Sequences that are made or read one item at a time, instead of held in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Column(Sequence[T]):
    """One thing of every image of a dataset, made or read when it is asked for.

    Args:
        read: index -> the thing.
        length: number of images.
    """

    def __init__(self, read: Callable[[int], T], length: int):
        self.read = read
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.read(number) for number in range(self.length)[index]]
        return self.read(range(self.length)[index])
