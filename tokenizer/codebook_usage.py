"""Use of a codebook: how many codes are in use, how evenly, how they move, how near they lie to text.

Shapes: B batch, n images, N tokens an image, K codes, E code width, U text units, M text width.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.alignment.config import LEVEL_NAMES
from tavq.alignment.unit_index import UnitIndex
from tavq.base.processes import process_index

from .blocks import to_sequence
from .heatmaps import text_plan
from .model import TAVQTokenizer

SAMPLE_TOKENS = 65_536
COLLAPSED_USAGE = 0.2  # below this usage a warning is given
IMAGES_AT_ONCE = 50
MAX_UNITS = 32
CHART_PX = (512, 160)
BAR_COLOUR = (35, 87, 201)


@dataclasses.dataclass(frozen=True)
class CodebookUsage:
    """How often each code occurs among `tokens` ids."""

    counts: Tensor
    """(K,) int64."""

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def dead(self) -> int:
        """Codes that do not occur."""
        return int((self.counts == 0).sum())

    @property
    def usage(self) -> float:
        """Fraction of codes that occur."""
        return 1 - self.dead / len(self.counts)

    @property
    def perplexity(self) -> float:
        return float(perplexity(self.counts))


def codebook_usage(ids: Tensor, num_codes: int) -> CodebookUsage:
    """Count the codes of `SAMPLE_TOKENS` ids, sampled with a fixed seed; of all ids where there are fewer.

    Usage and perplexity grow with the number of tokens counted, so that number is fixed.

    Args:
        ids: any shape, int64 in [0, num_codes).
    """
    flat = ids.flatten().cpu()
    if len(flat) > SAMPLE_TOKENS:
        flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:SAMPLE_TOKENS]]
    return CodebookUsage(torch.bincount(flat, minlength=num_codes))


def perplexity(counts: Tensor) -> Tensor:
    """The exponential of the entropy of code use: as many evenly used codes would have the same entropy.

    Args:
        counts: (K,), at least 0; counts or a running mean.

    Returns:
        Scalar in [1, K].
    """
    probabilities = counts / counts.sum()
    return torch.exp(-torch.special.xlogy(probabilities, probabilities).sum())


class CodebookMonitor:
    """Follows a codebook from one evaluation to the next, and warns or stops when its use collapses.

    Args:
        min_usage: usage below which training ends; 0 only warns.

    Attributes:
        previous: (K, E) codebook of the last evaluation, None before the first.
    """

    def __init__(self, min_usage: float = 0.0):
        self.min_usage = min_usage
        self.previous: Tensor | None = None
        self.usage: CodebookUsage | None = None

    def update(self, ids: Tensor, codebook: Tensor, step: int) -> dict[str, float]:
        """Measure the ids (n, ...) of the validation split and the codebook (K, E) after `step` steps.

        Returns:
            usage, perplexity, dead_codes and, from the second call on, drift: one minus the mean cosine
            between each code and itself at the call before.

        Raises:
            ValueError: usage lies below `min_usage`.
        """
        self.usage = codebook_usage(ids, len(codebook))
        _check_usage(self.usage.usage, step, self.min_usage)
        metrics = {
            "usage": self.usage.usage,
            "perplexity": self.usage.perplexity,
            "dead_codes": float(self.usage.dead),
        }

        codebook = codebook.detach().cpu().clone()
        if self.previous is not None:
            metrics["drift"] = 1 - float(F.cosine_similarity(self.previous, codebook).mean())
        self.previous = codebook
        return metrics


def _check_usage(usage: float, step: int, min_usage: float) -> None:
    advice = (
        "lower --training.learning-rate or --losses.align, "
        "or train with --model.quantizer.name simvq or cvq, which keep all codes in use"
    )
    if usage < min_usage:
        raise ValueError(
            f"codebook usage is {usage:.1%} at step {step}, expected at least min_usage, {min_usage:.1%}; "
            f"{advice}"
        )
    if usage < COLLAPSED_USAGE and process_index() == 0:
        warnings.warn(
            f"codebook usage is only {usage:.1%} at step {step}: the codebook collapses; {advice}",
            stacklevel=3,
        )


def level_ids(tokenizer: TAVQTokenizer, latents: Sequence[Tensor]) -> Tensor:
    """Ids of every level from the latents (B, E, h, w) of a forward pass: (B, 3, N)."""
    nearest = (tokenizer.quantizer.nearest(to_sequence(level).flatten(0, 1)) for level in latents)
    return torch.stack([ids.view(len(latents[0]), -1) for ids in nearest], dim=1)


@torch.inference_mode()
def level_costs(
    tokenizer: TAVQTokenizer, ids: Tensor, texts: UnitIndex, rows: Sequence[int]
) -> dict[str, float]:
    """Mean transport cost of images to the words, phrases and sentences of their own texts, and how much more
    the next image's texts cost.

    Args:
        ids: (n, 3, N), all levels.
        texts: units of the split.
        rows: the examples that the images belong to.

    Returns:
        `words_cost`, `words_gap`, and so on; a gap of 0 means codes that know nothing of the text.
    """
    metrics: dict[str, float] = {}
    for kind, level in tokenizer.aligned_levels.items():
        rng = torch.Generator().manual_seed(0)
        vectors, mask = texts.batch(rows, kind, rng, MAX_UNITS)
        present = mask.any(dim=1)  # a text may have no phrase
        level_ids = ids[present.to(ids.device), level - 1]
        vectors = vectors[present]
        mask = mask[present]

        matched = _mean_cost(tokenizer, level_ids, vectors, mask, level)
        mismatched = _mean_cost(tokenizer, level_ids, vectors.roll(1, 0), mask.roll(1, 0), level)
        name = LEVEL_NAMES[kind - 1]
        metrics[f"{name}_cost"] = matched
        metrics[f"{name}_gap"] = mismatched - matched
    return metrics


def _mean_cost(tokenizer: TAVQTokenizer, ids: Tensor, vectors: Tensor, mask: Tensor, level: int) -> float:
    costs = []
    for start in range(0, len(ids), IMAGES_AT_ONCE):
        batch = slice(start, start + IMAGES_AT_ONCE)
        plan, cost = text_plan(
            tokenizer, ids[batch], vectors[batch].to(ids.device), mask[batch].to(ids.device), level
        )
        costs.append((plan * cost).sum(dim=(1, 2)))
    return float(torch.cat(costs).mean())


def usage_chart(usage: CodebookUsage) -> np.ndarray:
    """How often each code occurs, most used first, as bars on a log scale: uint8 (H, W, 3)."""
    width, height = CHART_PX
    counts = usage.counts.sort(descending=True).values.float().add(1).log2().numpy()
    columns = np.interp(np.linspace(0, len(counts) - 1, width), np.arange(len(counts)), counts)
    filled = columns / max(columns.max(), 1e-6) * height
    below = np.arange(height)[::-1, None] < filled[None]
    return np.where(below[..., None], np.array(BAR_COLOUR), 255).astype(np.uint8)
