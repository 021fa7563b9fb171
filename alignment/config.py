"""Settings of the alignment and of the baseline LG-VQ.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

NUM_LEVELS = 3

LEVEL_NAMES = ("words", "phrases", "sentences")

Method = Literal["ot", "gaussian", "filip"]
FILIP_TEMPERATURE = 0.01
"""Temperature of the softmin over positions by which codes aligned by filip are searched: nearly the best
position."""


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """How codes are aligned with text."""

    level_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of words, phrases and sentences; 0 leaves them out. Where the whole loss is balanced by its
    gradient, as in training the tokenizer, only their ratios count."""
    pairing: tuple[int, int, int] = (1, 2, 3)
    """The encoder's level, 1 the shallowest, that words, phrases and sentences are aligned with."""
    samples: int = 32
    """Codes sampled from an image (S)."""
    max_units: int = 16
    """Units sampled from a text, at most (U)."""
    epsilon: float = 0.05
    """Entropic regularisation relative to the mean cost of the batch."""
    relaxation: float = 0.5
    """Penalty on the image marginal, relative to the mean cost too. Large values spread a text over the whole
    image."""
    iterations: int = 5
    """Sinkhorn iterations."""
    lookup: Literal["soft", "straight-through"] = "soft"
    """How the gradient passes the quantiser: `soft` to codebook and encoder, `straight-through` to the
    encoder alone (as in LG-VQ's code)."""
    lookup_temperature: float = 0.1
    """Temperature of the soft look-up, relative to the mean squared distance between latents and codes."""
    bank_size: int = 1024
    """Units of other training images that serve each image as further negatives."""
    long_text: bool = True
    """Align with the long texts of the dataset, too, where it has some; else with its captions alone."""
    per_code_embedding: bool = True
    """Learn what each code means besides its place in code space (m_k of docs/method.md)."""
    transport_weight: float = 1.0
    """Weight of the matched pairs' cost beside the InfoNCE loss."""

    @property
    def transport_temperature(self) -> float:
        """Temperature of the softmin over positions that scores an image against a text of one unit."""
        return self.epsilon + self.relaxation

    def retrieval_temperature(self, method: str) -> float:
        """Temperature of the softmin over positions that scores an image aligned by `method`."""
        return FILIP_TEMPERATURE if method == "filip" else self.transport_temperature

    @property
    def aligned_levels(self) -> tuple[int, int, int]:
        """Levels that words, phrases and sentences are aligned with; 0 for those that are left out."""
        words, phrases, sentences = (
            level if weight else 0 for level, weight in zip(self.pairing, self.level_weights, strict=True)
        )
        return words, phrases, sentences

    def __post_init__(self) -> None:
        positive = ("samples", "max_units", "epsilon", "iterations", "lookup_temperature")
        for name in (*positive, "relaxation", "bank_size", "transport_weight"):
            value, least = getattr(self, name), "above 0" if name in positive else "0 or more"
            if value < 0 or (value == 0 and name in positive):
                raise ValueError(f"{name} is {value}, expected {least}")
        if min(self.level_weights) < 0 or not any(self.level_weights):
            raise ValueError(f"level_weights are {self.level_weights}, expected none below 0 and one above")
        if not set(self.pairing) <= set(range(1, NUM_LEVELS + 1)):
            raise ValueError(f"pairing is {self.pairing}, expected levels from 1 to {NUM_LEVELS}")


@dataclasses.dataclass(frozen=True)
class LGVQConfig:
    """The three losses with the weights published for CelebA-HQ and TextCaps (CUB-200: 1e-3 each)."""

    global_weight: float = 1e-3
    """Weight of the global alignment loss: the image finds its caption in the batch."""
    word_weight: float = 1e-2
    """Weight of the masked text prediction loss."""
    relation_weight: float = 1e-4
    """Weight of the relation loss: two words are as similar as the codes they are matched with."""
    width: int = 256
    """Width of the transformer over the quantised map."""
    layers: int = 2
    """Layers of that transformer, and of the one that predicts words."""
    max_text_tokens: int = 30
    """Longer captions are left out of training, as in the release."""
    mask_mean: float = 0.5
    mask_deviation: float = 0.1
    mask_range: tuple[float, float] = (0.1, 0.3)
    """The masked fraction is normal(mean, deviation), restricted to this range (0.26 on average)."""
    label_smoothing: float = 0.1
    """Label smoothing of the predicted words."""
