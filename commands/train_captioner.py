"""tavq train captioner --tokens DIR --out DIR: train the captioner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tavq.alignment.projections import NUM_LEVELS
from tavq.base.arguments import parse, run_main
from tavq.captioner.train import RUN_PRESETS, CaptionerRun, train_captioner
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.tokens import open_tokens, read_meta
from tavq.tokenizer.heatmaps import check_aligned
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores, text_encoder_of


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionerRun, argv, prog="tavq train captioner", presets=RUN_PRESETS)
    if run.tokenizer is None:
        train_captioner(run)
        return
    tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
    if tokenizer.codebook_hash != read_meta(run.tokens).codebook_hash:
        raise ValueError(f"{run.tokens} was made by another tokenizer than {run.tokenizer}; give that one")
    scores = caption_alignment_scores(tokenizer, run.tokens) if run.model.quality_buckets else None
    train_captioner(run, tokenizer.codebook, scores)


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
