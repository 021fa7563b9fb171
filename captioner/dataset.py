"""The captioner's training set: image tokens with padded captions, and the targets of the cross-entropy loss.

Shapes: B images, N image tokens, G captions of each image (a group), T words of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tavq.base.seeding import mixed_seed
from tavq.data.tokens import TokenSet

from .model import Captioner

AlignmentScores = Sequence[np.ndarray]
"""The alignment score of each caption with its image: one array per image, in the order of a token set."""


class CaptionDataset(Dataset):
    """Image tokens with G captions each, as padded word ids.

    `self[(index, draw_seed)]` samples a variant of the image's tokens, and G of its captions. If the
    captioner has the long style, half of the draws of an image with dense text hold that text instead.

    Args:
        tokens: the training split.
        captioner: gives the vocabulary, the start tokens and the maximum lengths.
        captions_per_image: G.
        buckets: the quality bucket of each caption of each image, as `quality_buckets` gives them.
    """

    def __init__(
        self,
        tokens: TokenSet,
        captioner: Captioner,
        captions_per_image: int,
        buckets: list[list[int]] | None = None,
    ):
        self.tokens = tokens
        self.captions_per_image = captions_per_image
        self.buckets = buckets
        text = captioner.text
        shape = captioner.config.shape
        self.max_words = max(shape.max_words, shape.long_words)
        self.pad_id = text.pad_id
        self.start_id = captioner.start_id()

        # Tokenized once, not anew in every draw.
        self.captions = [[text.encode(caption) for caption in captions] for captions in tokens.captions]
        self.long_texts: list[list[int] | None] = [None] * len(tokens)
        if shape.long_words:
            self.long_start_id = captioner.start_id("long")
            self.long_texts = [text.encode(long) if long else None for long in tokens.long_texts]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        index, draw_seed = item
        rng = torch.Generator().manual_seed(mixed_seed(draw_seed, 1))
        variants = self.tokens.ids[index]
        variant = int(torch.randint(len(variants), (1,), generator=rng))

        # Images with fewer than G captions leave rows empty: length -1, which no target is made from.
        rows = self.captions_per_image
        example = {
            "ids": variants[variant].flatten().long(),
            "words": torch.full((rows, self.max_words), self.pad_id),
            "lengths": torch.full((rows,), -1),
            "starts": torch.full((rows,), self.start_id),
            "index": torch.tensor(index),
        }
        for row, (words, start) in enumerate(self._sample_texts(index, rng)):
            truncated = torch.tensor(words[: self.max_words])
            example["words"][row, : len(truncated)] = truncated
            # The full length, so that `caption_targets` sees that the end was cut off.
            example["lengths"][row] = len(words)
            example["starts"][row] = start
        return example

    def _sample_texts(self, index: int, rng: torch.Generator) -> list[tuple[list[int], int]]:
        """Sample the texts of one draw; return the word ids and the start token of each."""
        # Drawn even where there is no long text, so that the captions of a seed do not depend on it.
        use_long_text = bool(torch.randint(2, (1,), generator=rng))
        long_text = self.long_texts[index]
        if use_long_text and long_text:
            return [(long_text, self.long_start_id)]

        captions = self.captions[index]
        sampled = torch.randperm(len(captions), generator=rng)[: self.captions_per_image].tolist()
        if self.buckets is None:
            return [(captions[i], self.start_id) for i in sampled]
        return [(captions[i], self.buckets[index][i]) for i in sampled]


def caption_targets(words: Tensor, lengths: Tensor, end_id: int) -> Tensor:
    """Make the targets of the cross-entropy loss: what follows each position, -1 where nothing is learned.

    Args:
        words: (B, G, T) word ids, padded.
        lengths: (B, G) words of each caption; more than T where it was truncated, -1 for an empty row.
        end_id: the end token, which follows the last word of a caption that was not truncated.

    Returns:
        (B, G, T + 1) int64.
    """
    targets = F.pad(words, (0, 1), value=end_id)
    position = torch.arange(targets.shape[-1], device=words.device)
    targets = targets.masked_fill(position == lengths[..., None], end_id)

    # A truncated caption does not end behind its last word; to learn that it does would teach breaking off.
    truncated = lengths > words.shape[-1]
    no_end = truncated[..., None] & (position == words.shape[-1])
    return targets.masked_fill((position > lengths[..., None]) | no_end, -1)


def quality_buckets(alignment_scores: AlignmentScores, count: int) -> list[list[int]]:
    """Sort all captions into `count` equally full buckets by their alignment score; bucket 0 is the worst."""
    edges = np.quantile(np.concatenate(alignment_scores), np.arange(1, count) / count)
    return [np.searchsorted(edges, scores).tolist() for scores in alignment_scores]
