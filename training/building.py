"""Models are built on the meta device first, so that an absurd configuration takes no memory.

A tensor there has a shape and no values. The build is watched tensor by tensor, and stops as soon as it asks
for more than the weights file holds, or than this machine does.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

MADE_PER_STORED = 2  # tied matrices are made apart before they are shared
FREE_NUMBERS = 2**20  # for layers that are made and thrown away
FREE_TENSORS = 1000
MAX_TABLE_NUMBERS = 2**28  # of buffers, which are computed and need not lie in the file
TRAINING_BYTES = 16  # a parameter in float32: value, gradient, and two moments of the optimizer
_one_build = threading.Lock()  # the hooks below see every module of the process


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a build may ask for."""

    numbers: int
    tensors: int
    excess: str
    """What is said of a build that asks for more."""


def check_fits(
    model_class: Callable[[Any], nn.Module], config: Any, weights: Path, todays_name: Callable[[str], str]
) -> None:
    """Raise ValueError unless `model_class(config)` takes just the tensors of the safetensors file `weights`.

    Args:
        model_class: builds the model from `config` alone.
        config: from a file that may be hostile.
        weights: only the header is read.
        todays_name: takes a key of the file to one of the state dict.
    """
    stored = {todays_name(name): tensor for name, tensor in _tensors_on_meta(weights).items()}
    numbers = sum(tensor.numel() for tensor in stored.values())
    limits = Limits(
        numbers=MADE_PER_STORED * numbers + FREE_NUMBERS,
        tensors=MADE_PER_STORED * len(stored) + FREE_TENSORS,
        excess=f"it asks for more than the {numbers:,} numbers of the file",
    )
    try:
        _built_on_meta(model_class, config, limits).load_state_dict(stored)
    except Exception as error:  # whatever a constructor says of values that nobody foresaw
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{weights} and the configuration do not fit each other: {reason}") from error


def check_memory(model_class: Callable[[Any], nn.Module], config: Any) -> None:
    """Raise ValueError where training `model_class(config)` needs more memory than this machine has."""
    total = psutil.virtual_memory().total
    needed = f"training it needs more than this machine's {total / 2**30:.0f} GB of memory"
    _built_on_meta(model_class, config, Limits(total // TRAINING_BYTES, 2**20, needed))


def _built_on_meta(model_class: Callable[[Any], nn.Module], config: Any, limits: Limits) -> nn.Module:
    numbers = tensors = table_numbers = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers, tensors
        if tensor is not None and tensor.is_meta:  # other threads may build for real meanwhile
            numbers += tensor.numel()
            tensors += 1
            if numbers > limits.numbers or tensors > limits.tensors:
                raise ValueError(limits.excess)

    def count_table(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal table_numbers
        if tensor is not None and tensor.is_meta:
            table_numbers += tensor.numel()
            if table_numbers > MAX_TABLE_NUMBERS:
                raise ValueError(f"its tables take more than {MAX_TABLE_NUMBERS:,} numbers")

    with _one_build:
        handles = [
            register_module_parameter_registration_hook(count),
            register_module_buffer_registration_hook(count_table),
        ]
        try:
            with torch.device("meta"):
                return model_class(config)
        finally:
            for handle in handles:
                handle.remove()


def _tensors_on_meta(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it anew") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
