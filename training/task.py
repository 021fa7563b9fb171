"""What the training loop is told: how long and how fast, and which of the three models it trains."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

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
    """Of the averaged weights, which are the ones evaluated and saved."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_minutes: float = 10.0
    evaluate_every: int = 1000
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0 never stops early."""
    keep_evaluated: bool = False
    """Also keep the weights of every evaluation, in training/kept/step-000200 and so on."""
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
    for_critic: Any = None
    """Detached tensors that the critic's forward takes."""


class Task(ABC):
    """One of the three models as the loop sees it; subclasses live beside their models.

    Attributes:
        name: what is trained, as the model card calls it: "tokenizer", "generator" or "captioner".
        model: called as `model(batch, step)`, returns StepOutput.
        critic: optional second player, called as `critic(output.for_critic, step)`, returns StepOutput.
        hidden: parts of the names of the modules whose matrices Muon may train: blocks, not what enters or
            leaves them.
        dataset: `dataset[(index, draw_seed)]` gives an example, `len(dataset)` their number.
        rests: whether some steps leave a part of the model without a gradient, which several processes must
            know beforehand.
        watch: the metric of `evaluate` that decides which weights are best, and its direction; None keeps the
            last.
    """

    name: str
    model: nn.Module
    critic: nn.Module | None = None
    hidden: frozenset[str] = frozenset()
    rests: bool = False
    dataset: Dataset
    watch: tuple[str, Literal["min", "max"]] | None = ("loss", "min")

    def collate(self, examples: list[Any]) -> Any:
        return torch.utils.data.default_collate(examples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Matrices decay, vectors (biases, norms) do not; a group may have an `lr_scale` of its own."""
        named = [(set(name.split(".")), p) for name, p in self.model.named_parameters() if p.requires_grad]
        hidden = [p for parts, p in named if p.ndim >= 2 and parts & self.hidden]
        if config.optimizer == "muon" and not hidden:
            raise ValueError(f"the {self.name} names no matrices for Muon; use --training.optimizer adamw")
        others = [p for parts, p in named if p.ndim >= 2 and not parts & self.hidden]
        groups = [
            {"params": hidden, "weight_decay": config.weight_decay, "muon": config.optimizer == "muon"},
            {"params": others, "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Metrics of `model` (the averaged weights, in eval mode) on the validation split."""

    def pictures(self, model: nn.Module) -> dict[str, Any]:
        """Named uint8 arrays (H, W, 3) to look at in TensorBoard; drawn after each evaluation."""
        return {}

    @abstractmethod
    def save(self, model: nn.Module, directory: Path, card: str) -> None:
        """Write the checkpoint that people load from the averaged weights `model`, with its model card."""
