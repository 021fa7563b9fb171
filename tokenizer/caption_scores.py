"""Scores of training captions by their alignment with their images, for the captioner's quality buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tavq.alignment.config import NUM_LEVELS
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.tokens import open_tokens

from .heatmaps import check_aligned
from .model import TAVQTokenizer
from .retrieval import alignment_scores, text_encoder_of


def caption_alignment_scores(tokenizer: TAVQTokenizer, tokens: Path) -> list[np.ndarray]:
    """Score each training caption by its alignment with its image, for quality buckets.

    Returns:
        For each image of the training split the scores of its captions, (C,) float32.

    Raises:
        ValueError: the tokenizer is not aligned with text.
    """
    check_aligned(tokenizer, NUM_LEVELS)
    cache = EmbeddingCache(text_encoder_of(tokenizer))
    train_set = open_tokens(tokens, "train")
    vectors = cache.encode([caption for captions in train_set.captions for caption in captions])
    vectors_by_image = vectors.split([len(captions) for captions in train_set.captions])
    return [
        alignment_scores(tokenizer, ids[:1], own)[0].numpy()  # variant 0 is the image as it is
        for ids, own in zip(train_set.ids.long(), vectors_by_image, strict=True)
    ]
