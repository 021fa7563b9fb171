"""The moving average of the weights: it is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .optimizer import whole

Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that averages its weights exponentially, with a decay that grows to `decay`; the
    first weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))

    return AveragedModel(model, multi_avg_fn=update)


class Whole(nn.Module):
    """What `AveragedModel` reads of a model whose weights may be sharded. The average is whole everywhere."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (cast("nn.Parameter", whole(parameter)) for parameter in self.model.parameters(recurse))
