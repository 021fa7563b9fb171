"""What the training loop is told: how long and how fast, and which of the three models it trains."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, how often."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Examples a forward pass and process."""
    accumulation_steps: int = 1
    """Forward passes an optimiser step."""
    learning_rate: float = 3e-4
    """Peak; linear warm-up, then a cosine down to a tenth."""
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: AdamW, but Muon for the matrices inside the network, at the same learning rate."""
    grad_clip_norm: float = 1.0
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones evaluated and saved."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_minutes: float = 10.0
    evaluate_every: int = 1000
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0 never stops early."""
    keep_evaluated: bool = False
    """Also keep the weights of every evaluation, in training/evaluated/step-000200 and so on."""
    log_every: int = 50
    num_workers: int = 0
    """Processes that read and augment the data."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation_steps", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected 0 <= ema_decay < 1")

    def learning_rate_at(self, step: int) -> float:
        """The factor on the peak learning rate in step `step` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass
class StepOutput:
    """What a forward pass of a task's model gives the loop."""

    loss: Tensor
    report: dict[str, Tensor | float]
    """Scalars to log."""
    for_discriminator: Any = None
    """Detached tensors that the discriminator's forward takes."""


Trainer = TypeVar("Trainer", bound=nn.Module)
Shipped = TypeVar("Shipped", bound=nn.Module)


class Task(ABC, Generic[Trainer, Shipped]):
    """One of the models as the loop sees it; subclasses live beside their models.

    Attributes:
        name: what is trained, as the model card calls it: "tokenizer", "generator" or "captioner".
        model: called as `model(batch, step)`, or `model(batch, step, discriminator)` where there is one;
            returns StepOutput. It holds the losses too.
        earlier_card: model card of the weights that training starts from; "" from scratch.
        shipped: the part of `model` that is averaged, evaluated and saved.
        discriminator: optional second player, called as `discriminator(output.for_discriminator, step)`,
            returns StepOutput.
        discriminator_rate: its peak learning rate; None takes that of the model.
        muon_modules: parts of the names of the modules whose matrices Muon may train: blocks, not what
            enters or leaves them.
        dataset: `dataset[(index, draw_seed)]` gives an example, `len(dataset)` their number.
        monitor: the metric of `evaluate` that decides which weights are best, and its direction; None keeps
            the last.
    """

    name: str
    earlier_card: str = ""
    model: Trainer
    shipped: Shipped
    discriminator: nn.Module | None = None
    discriminator_rate: float | None = None
    muon_modules: frozenset[str] = frozenset()
    dataset: Dataset
    monitor: tuple[str, Literal["min", "max"]] | None = ("loss", "min")

    def collate(self, examples: list[Any]) -> Any:
        return torch.utils.data.default_collate(examples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Matrices decay, vectors (biases, norms) do not; a group may have an `lr_scale` of its own."""
        matrices, others, vectors = [], [], []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif self.muon_modules & set(name.split(".")):
                matrices.append(parameter)
            else:
                others.append(parameter)

        muon = config.optimizer == "muon"
        if muon and not matrices:
            raise ValueError(f"the {self.name} names no matrices for Muon; use --training.optimizer adamw")
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": config.weight_decay, "muon": muon},
            {"params": others, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def evaluate(self, model: Shipped, step: int) -> dict[str, float]:
        """Metrics of `model`, the averaged weights of `shipped` in eval mode, on the validation split."""

    def finish(self, model: Shipped) -> None:
        """Change the averaged weights once after the last step, before they are evaluated and saved."""

    def sample_images(self, model: Shipped) -> dict[str, Any]:
        """Named uint8 arrays (H, W, 3) to look at in TensorBoard; made after each evaluation."""
        return {}

    @abstractmethod
    def save(self, model: Shipped, directory: Path, card: str) -> None:
        """Write the checkpoint that people load from the averaged weights `model`, with its model card."""
