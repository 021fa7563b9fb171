"""What a process knows of the others that train with it: their number, their rows, and common random numbers.

All of it does nothing in a process by itself: rows stay as they are, and random numbers come from torch's own
generators.

Shapes: R rows of this process, P processes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_with_gradient
from torch import Tensor

T = TypeVar("T")


class _Common(NamedTuple):
    seed: int
    generators: dict[str, torch.Generator]
    """By device."""


_common: _Common | None = None


def num_processes() -> int:
    """Return how many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


@torch.no_grad()
def of_all_processes(rows: Tensor) -> Tensor:
    """The rows (R, ...) of every process, one process after the other: (P R, ...), without a gradient."""
    if num_processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def of_all_processes_with_gradient(rows: Tensor) -> Tensor:
    """`of_all_processes`, and the gradient of every process reaches the rows of each.

    Where all compute the same loss of these rows, each gets P times its gradient. The mean over processes,
    which DDP takes, makes that right again.
    """
    return rows if num_processes() == 1 else torch.cat(dist_with_gradient.all_gather(rows.contiguous()))


@torch.no_grad()
def sum_of_all(value: Tensor) -> Tensor:
    """The sum of `value` over the processes, without a gradient."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def weighted_mean(mean: Tensor, weight: Tensor | int) -> Tensor:
    """The mean over all processes of means that stand for unlike numbers of things, without a gradient.

    Args:
        mean: scalar, of this process; may be NaN where `weight` is 0.
        weight: number of things that it is the mean of.
    """
    if num_processes() == 1:
        return mean
    weight = torch.as_tensor(weight, device=mean.device).to(mean.dtype)
    total = sum_of_all(torch.stack([mean.detach().nan_to_num() * weight, weight]))
    return total[0] / total[1].clamp_min(1)


def part_of_mean(mean: Tensor, count: Tensor | int) -> Tensor:
    """This process's part of a mean over all processes: the mean of the parts, which DDP takes, is that mean.

    A mean of means would weigh a word of short captions more than one of long ones.

    Args:
        mean: scalar with its gradient.
        count: number of things that it is the mean of, unlike in each process.
    """
    if num_processes() == 1:
        return mean
    count = torch.as_tensor(count, device=mean.device).to(mean.dtype)
    return mean * (count * num_processes() / sum_of_all(count).clamp_min(1))


@torch.no_grad()
def agree_with_first_process(value: Tensor) -> None:
    """Copy process 0's `value` to the others, in place."""
    if num_processes() > 1:
        dist.broadcast(value.detach(), src=0)


def own_share(items: Sequence[T]) -> list[T]:
    """Every P-th item, from this process's own place on: each item has exactly one process."""
    return list(items[process_index() :: num_processes()])


def shares_of_all(own: list[T]) -> list[T]:
    """What all processes made of the items of `own_share`, in the order of the items."""
    if num_processes() == 1:
        return own
    parts: list[Any] = [None] * num_processes()
    dist.all_gather_object(parts, own)
    nothing = object()
    in_turns = itertools.zip_longest(*parts, fillvalue=nothing)
    return [item for turn in in_turns for item in turn if item is not nothing]


def sum_of_counts(counts: Counter[str]) -> Counter[str]:
    """The sums of all processes' counts."""
    total: Counter[str] = Counter()
    for part in shares_of_all([counts]):
        total.update(part)  # unlike +, this keeps zeros
    return total


@contextlib.contextmanager
def common_random_numbers(seed: int) -> Iterator[None]:
    """Let all processes draw the same from `common_generator` while the block runs.

    Torch's own generators stay each process's own, such as for dropout: what they have drawn depends on the
    lengths of a process's texts, so that they would fall out of step.
    """
    global _common
    _common = _Common(seed, {})
    try:
        yield
    finally:
        _common = None


def common_generator(device: torch.device | str = "cpu") -> torch.Generator | None:
    """The generator that is in the same state in all processes; None, torch's own, in one by itself and
    outside of `common_random_numbers`."""
    if num_processes() == 1 or _common is None:
        return None
    name = str(device)
    if name not in _common.generators:
        _common.generators[name] = torch.Generator(device).manual_seed(_common.seed)
    return _common.generators[name]


def drawn_for_rows(
    draw: Callable[..., Tensor], rows: int, *shape: int, device: torch.device | str = "cpu", **options: Any
) -> Tensor:
    """Random numbers (R, ...) for this process's rows: those that one process would draw for the same ones.

    All rows are drawn everywhere, which costs P times the numbers and no message.

    Args:
        draw: `torch.rand`, or what takes a size, a generator and a device like it.
        rows: R, as many in each process.
        shape: of a row.
        device: of the numbers.
        options: for `draw`, such as a dtype.
    """
    generator = common_generator(device)
    drawn = draw((rows * num_processes(), *shape), generator=generator, device=device, **options)
    return drawn.view(num_processes(), rows, *shape)[process_index()]
