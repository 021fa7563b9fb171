"""What the training loop is told: how long, how fast, how often.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


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
