"""What the training loop is told: how long and how fast, and which of the three models it trains."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import TrainingConfig
from .stream import Draws


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

    def collate(self, examples: list[Any], draws: Draws | None = None) -> Any:
        """Make a batch of the examples of this process; `draws` are those of all processes, for what is drawn
        for the batch as a whole. None: these are all."""
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
        """Metrics of `model`, the averaged weights of `shipped` in eval mode, on the validation split.

        All processes call it, may share the work (`own_share`, `shares_of_all`), and return the same.
        """

    def memory(self) -> dict[str, Tensor]:
        """What the next `evaluate` needs of the last one; saved with the state."""
        return {}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Take back what `memory` gave, in a run that is resumed; empty where nothing was saved."""

    def finish(self, model: Shipped) -> None:
        """Change the averaged weights once after the last step, before they are evaluated and saved: in all
        processes alike."""

    def sample_images(self, model: Shipped) -> dict[str, Any]:
        """Named uint8 arrays (H, W, 3) to look at in TensorBoard; made after each evaluation."""
        return {}

    @abstractmethod
    def save(self, model: Shipped, directory: Path, card: str) -> None:
        """Write the checkpoint that people load from the averaged weights `model`, with its model card."""
