"""What `--dry-run` shows: shapes, parameters, memory and time, measured in a few steps that are not kept."""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .loop import Trainer, duration
from .task import Task

MEASURED_STEPS = 3
LATE = 0.9  # fraction of training at which every loss is on
GIB = 2**30


def dry_run(task: Task, config: TrainingConfig, resolved: Any) -> None:
    """Print what training `task` takes. Nothing is written, and no model is kept.

    Args:
        task: model, data and evaluation.
        config: how long and how fast.
        resolved: the dataclass of the whole run.
    """
    with tempfile.TemporaryDirectory(prefix="tavq-dry-run-") as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # the configuration, which belongs to a real run
            trainer = Trainer(task, config, Path(folder), resolved)
        batch = next(iter(trainer.loader()))
        seconds = [_seconds_a_step(trainer, round(place * (config.steps - 1))) for place in (0.0, LATE)]

    for name, shape in batch_shapes(batch):
        print(f"{name:<12}{shape}")
    shipped, trained = num_parameters(task.shipped), num_parameters(task.model)
    if task.discriminator is not None:
        trained += num_parameters(task.discriminator)
    print(f"{'parameters':<12}{shipped:,} in the {task.name}, {trained:,} with all that is trained beside it")
    print(f"{'memory':<12}{_peak_gib():.1f} GiB at the peak, with data, gradients and optimizer")
    print(f"{'time':<12}{seconds[0]:.2f} s a step at the start, {seconds[1]:.2f} s with every loss on")
    total = config.steps * sum(seconds) / len(seconds)
    device = trainer.accelerator.device.type
    print(
        f"{'in all':<12}about {duration(total)} for {config.steps:,} steps on {device}, without evaluations"
    )


def batch_shapes(batch: Any, name: str = "batch") -> Iterator[tuple[str, str]]:
    """Yield name, and shape and type, of every tensor in a batch."""
    if isinstance(batch, Tensor):
        yield name, f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    elif isinstance(batch, dict):
        for key, value in batch.items():
            yield from batch_shapes(value, str(key))
    elif isinstance(batch, list | tuple):
        for number, value in enumerate(batch):
            yield from batch_shapes(value, f"{name}[{number}]")


def num_parameters(model: nn.Module) -> int:
    """Return the number of values that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _seconds_a_step(trainer: Trainer, first_step: int) -> float:
    """Run a step to warm up and some more from `first_step` on, and return the mean time of those."""
    trainer.state.step = first_step
    batches = iter(trainer.loader())
    trainer.train_step(batches)
    started = time.monotonic()
    for _ in itertools.repeat(None, MEASURED_STEPS):
        trainer.state.step += 1
        trainer.train_step(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.monotonic() - started) / MEASURED_STEPS


def _peak_gib() -> float:
    """Return the most memory that this process has taken: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
