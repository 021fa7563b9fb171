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

IMAGES_AT_ONCE = 1000  # whose captions are encoded together


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
    scores = []
    for start in range(0, len(train_set), IMAGES_AT_ONCE):
        group = train_set.captions[start : start + IMAGES_AT_ONCE]
        vectors = cache.encode([caption for captions in group for caption in captions])
        own_vectors = vectors.split([len(captions) for captions in group])
        for index, own in enumerate(own_vectors, start):
            ids = train_set.ids[index, :1].long()  # variant 0 is the image as it is
            scores.append(alignment_scores(tokenizer, ids, own)[0].numpy())
    return scores
