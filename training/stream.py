"""The order of a training set, a pure function of the seed: any place in it can be taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from tavq.base.seeding import mixed_seed

if TYPE_CHECKING:
    from .task import Task


class Draws(NamedTuple):
    """The examples of one batch of all processes."""

    items: list[tuple[int, int]]
    """`(index, draw_seed)` of each: which example, and the seed of its augmentation."""
    own_rows: slice
    """Those of this process."""


class ShuffledStream(Sampler[Draws]):
    """Endless shuffled passes over a dataset, started at any batch.

    Pass `p` is a permutation seeded by (seed, p), and batch `b` the `b`-th part of the passes, so that it is
    the same whether or not the run was interrupted. The processes take equal parts of each batch, so that it
    is also the same for every number of processes.

    Args:
        length: examples in the dataset; at least 1.
        batch_size: examples a batch and process.
        start: the first batch to yield.
        seed: of the run.
        rank, world_size: which process this is, and of how many.
    """

    def __init__(
        self, length: int, batch_size: int, *, start: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if length < 1:
            raise ValueError("the dataset is empty; nothing to train on")
        self.length, self.seed, self.start = length, seed, start
        self.size = batch_size * world_size
        self.own_rows = slice(rank * batch_size, (rank + 1) * batch_size)

    def __iter__(self) -> Iterator[Draws]:
        batch, epoch, order = self.start, -1, torch.empty(0)
        while True:
            items = []
            for place in range(batch * self.size, (batch + 1) * self.size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                    order = torch.randperm(self.length, generator=generator)
                items.append((int(order[place % self.length]), mixed_seed(self.seed, epoch, place)))
            yield Draws(items, self.own_rows)
            batch += 1


class Batches(Dataset):
    """What a DataLoader reads: the batches of a task, by the draws of a `ShuffledStream`."""

    def __init__(self, task: Task):
        self.task = task

    def __getitem__(self, item: tuple[int, int]) -> Any:
        return self.task.dataset[item]

    def __getitems__(self, draws: Draws) -> Any:
        """One batch; the DataLoader prefers this method to reading examples one by one."""
        return self.task.collate([self[item] for item in draws.items[draws.own_rows]], draws)
