"""The order of a training set, a pure function of the seed: any place in it can be taken up again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from tavq.base.seeding import mixed_seed


class ShuffledStream(Sampler[list[tuple[int, int]]]):
    """Endless shuffled passes over a dataset, started at any batch.

    Yields lists of `(index, draw_seed)`: which example, and the seed of its augmentation. Pass `p` is a
    permutation seeded by (seed, p), so batch `b` is the same whether or not the run was interrupted.

    Args:
        length: examples in the dataset; at least 1.
        batch_size: examples a batch and process.
        start: the first batch to yield.
        seed: of the run.
        rank, world_size: the processes take batches in turn.
    """

    def __init__(
        self, length: int, batch_size: int, *, start: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if length < 1:
            raise ValueError("the dataset is empty; nothing to train on")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.stride = start * world_size + rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, epoch, order = self.first, -1, []
        while True:
            items = []
            for place in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                items.append((order[place % self.length], mixed_seed(self.seed, epoch, place)))
            yield items
            batch += self.stride
