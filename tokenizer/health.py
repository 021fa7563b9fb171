"""Health of a codebook: how many codes are in use, how evenly, how they move, how near they lie to text.

Legend: n images, N tokens an image, K codes, E code width.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.alignment.aligner import LEVEL_NAMES
from tavq.alignment.unit_index import UnitIndex

from .blocks import to_sequence
from .heatmaps import text_plan
from .model import TAVQTokenizer

SAMPLE_TOKENS = 65_536
COLLAPSED_USAGE = 0.2  # a smaller share of codes in use is warned of
IMAGES_AT_ONCE = 50
MAX_UNITS = 32
CHART_PX = (512, 160)
BAR_COLOUR = (35, 87, 201)


@dataclasses.dataclass(frozen=True)
class CodeUse:
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
        """Share of codes that occur."""
        return 1 - self.dead / len(self.counts)

    @property
    def perplexity(self) -> float:
        return float(perplexity(self.counts))


def code_use(ids: Tensor, num_codes: int) -> CodeUse:
    """Count the codes of `SAMPLE_TOKENS` ids drawn with a fixed seed; of all, where there are fewer.

    Usage and perplexity grow with the number of tokens counted, so that number is fixed.

    Args:
        ids: any shape, int64 in [0, num_codes).
    """
    flat = ids.flatten().cpu()
    if len(flat) > SAMPLE_TOKENS:
        flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:SAMPLE_TOKENS]]
    return CodeUse(torch.bincount(flat, minlength=num_codes))


def perplexity(use: Tensor) -> Tensor:
    """How many codes would be in use if all were used alike: use (K,), counts or a running mean -> scalar in
    [1, K]."""
    shares = use / use.sum()
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


class CodebookMonitor:
    """Follows a codebook from one evaluation to the next, and raises the alarm when its use collapses.

    After a resume the first evaluation has no drift: what lies before is not stored.

    Args:
        min_usage: share of codes in use below which training ends; 0 only warns.
    """

    def __init__(self, min_usage: float = 0.0):
        self.min_usage = min_usage
        self.before: Tensor | None = None
        self.use: CodeUse | None = None

    def look(self, ids: Tensor, codebook: Tensor, step: int) -> dict[str, float]:
        """Measure the ids (n, ...) of the validation split and the codebook (K, E) after `step` steps.

        Returns:
            usage, perplexity, dead_codes and, from the second call on, drift: one minus the mean cosine
            between each code and itself at the call before.

        Raises:
            ValueError: usage lies below `min_usage`.
        """
        self.use = code_use(ids, len(codebook))
        _alarm(self.use.usage, step, self.min_usage)
        found = {
            "usage": self.use.usage,
            "perplexity": self.use.perplexity,
            "dead_codes": float(self.use.dead),
        }
        codebook = codebook.detach().cpu().clone()
        if self.before is not None:
            found["drift"] = 1 - float(F.cosine_similarity(self.before, codebook).mean())
        self.before = codebook
        return found


def _alarm(usage: float, step: int, min_usage: float) -> None:
    advice = (
        "lower --training.learning-rate or --losses.align, "
        "or train with --model.quantizer.name simvq or cvq, which leave no code behind"
    )
    if usage < min_usage:
        raise ValueError(
            f"codebook usage is {usage:.1%} at step {step}, expected at least min_usage, {min_usage:.1%}; "
            f"{advice}"
        )
    if usage < COLLAPSED_USAGE:
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
    """Mean transport cost of images and their own words, phrases and sentences, each on its level; and how
    much more the next image's cost.

    Args:
        ids: (n, 3, N), all levels.
        texts: units of the split.
        rows: the examples that the images belong to.

    Returns:
        `words_cost`, `words_gap`, and so on; a gap of 0 means codes that know nothing of the text.
    """
    found = {}
    for kind, level in tokenizer.aligned_levels.items():
        name, generator = LEVEL_NAMES[kind - 1], torch.Generator().manual_seed(0)
        vectors, mask = texts.batch(rows, kind, generator, MAX_UNITS)
        present = mask.any(dim=1)
        own_ids, vectors, mask = ids[present.to(ids.device), level - 1], vectors[present], mask[present]
        own = _mean_cost(tokenizer, own_ids, vectors, mask, level)
        other = _mean_cost(tokenizer, own_ids, vectors.roll(1, 0), mask.roll(1, 0), level)
        found |= {f"{name}_cost": own, f"{name}_gap": other - own}
    return found


def _mean_cost(tokenizer: TAVQTokenizer, ids: Tensor, vectors: Tensor, mask: Tensor, level: int) -> float:
    costs = []
    for part in range(0, len(ids), IMAGES_AT_ONCE):
        some = slice(part, part + IMAGES_AT_ONCE)
        plan, cost = text_plan(
            tokenizer, ids[some], vectors[some].to(ids.device), mask[some].to(ids.device), level
        )
        costs.append((plan * cost).sum(dim=(1, 2)))
    return float(torch.cat(costs).mean())


def use_chart(use: CodeUse) -> np.ndarray:
    """How often each code occurs, most used first, as bars on a log scale: uint8 (H, W, 3)."""
    width, height = CHART_PX
    counts = use.counts.sort(descending=True).values.float().add(1).log2().numpy()
    columns = np.interp(np.linspace(0, len(counts) - 1, width), np.arange(len(counts)), counts)
    filled = columns / max(columns.max(), 1e-6) * height
    below = np.arange(height)[::-1, None] < filled[None]
    return np.where(below[..., None], np.array(BAR_COLOUR), 255).astype(np.uint8)
