"""Retrieval through the codes: how well the ids of an image find its text, and the reverse.

Shapes: n images, m texts, N tokens an image, K codes, M text width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tavq.alignment.config import NUM_LEVELS
from tavq.alignment.transport import single_unit_cost
from tavq.data.text_encoder import TextEncoder

from .model import TAVQTokenizer

IMAGES_AT_ONCE = 16


def text_encoder_of(tokenizer: TAVQTokenizer) -> TextEncoder:
    """The encoder whose texts the codes are aligned with, on the tokenizer's device.

    Raises:
        ValueError: the one of this name has other weights.
    """
    provenance = tokenizer.config.provenance
    device = tokenizer.codebook.device
    return TextEncoder.checked(provenance.text_encoder, provenance.text_encoder_hash, device)


@torch.inference_mode()
def alignment_scores(
    tokenizer: TAVQTokenizer, ids: Tensor, text_vectors: Tensor, level: int = NUM_LEVELS
) -> Tensor:
    """Score every image against every text: minus the transport cost of the text as one unit.

    Args:
        tokenizer: gives codebook and projection.
        ids: (n, h, w) or (n, N) int64, of `level`.
        text_vectors: (m, M), unit length.

    Returns:
        (n, m) float32 in [-2, 0]; larger fits better.
    """
    projected = tokenizer.project(torch.arange(tokenizer.num_codes, device=ids.device), level)
    return scores_of_codes(projected, ids, text_vectors, tokenizer.config.transport_temperature)


def scores_of_codes(projected: Tensor, ids: Tensor, text_vectors: Tensor, temperature: float) -> Tensor:
    """`alignment_scores` for any codebook.

    Args:
        projected: (K, M), every code in text space, unit length.
        ids: (n, ...) int64 in [0, K).
        text_vectors: (m, M), unit length.
        temperature: epsilon + relaxation of the alignment.
    """
    cost_Km = 1 - projected @ text_vectors.to(ids.device).T
    parts = ids.flatten(1).split(IMAGES_AT_ONCE)
    return torch.cat(
        [-single_unit_cost(cost_Km[part], epsilon=temperature, relaxation=0.0) for part in parts]
    )


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries whose answer has a rank below k; ranks (m,) int64 from 0."""
    return float((ranks < k).float().mean())


def text_to_image_ranks(scores: Tensor, own_image: Tensor) -> Tensor:
    """Rank of each text's own image among all images.

    Args:
        scores: (n, m).
        own_image: (m,) int64, the image that text j belongs to.

    Returns:
        (m,) int64 from 0; ties count against the query.
    """
    own = scores.gather(0, own_image.unsqueeze(0))
    return (scores >= own).sum(dim=0) - 1


def image_to_text_ranks(scores: Tensor, own_image: Tensor) -> Tensor:
    """Rank of the best of each image's own texts among all texts of other images: (n,) int64 from 0."""
    belongs = own_image.unsqueeze(0) == torch.arange(len(scores), device=scores.device).unsqueeze(1)
    best = scores.masked_fill(~belongs, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~belongs).sum(dim=1)
