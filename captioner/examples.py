"""What the captioner trains on: tokens of an image with its captions as padded ids.

Legend: B batch, N image tokens, C captions an image, T positions a caption.
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

Agreement = Sequence[np.ndarray]
"""The alignment scores of each image with its captions, in the order of a token set."""


class TokenCaptions(Dataset):
    """`self[(index, draw_seed)]`: a variant of the tokens of an image, and C of its captions as padded ids.

    A captioner with a long style gets, in half of the draws of an image with dense text, that text alone.
    """

    def __init__(
        self, tokens: TokenSet, captioner: Captioner, per_image: int, buckets: list[list[int]] | None = None
    ):
        self.tokens, self.per_image, self.buckets = tokens, per_image, buckets
        shape = captioner.config.shape
        self.limit, self.pad_id = max(shape.max_words, shape.long_words), captioner.text.pad_id
        self.start_id = captioner.start_id()
        self.encoded = [[captioner.text.encode(text) for text in captions] for captions in tokens.captions]
        self.long: list[list[int] | None] = [None] * len(tokens)
        if shape.long_words:
            self.long_start_id = captioner.start_id("long")
            self.long = [text and captioner.text.encode(text) for text in tokens.long_texts]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = item
        generator = torch.Generator().manual_seed(mixed_seed(draw, 1))
        variants = self.tokens.ids[index]
        variant = int(torch.randint(len(variants), (1,), generator=generator))
        example = {
            "ids": variants[variant].flatten().long(),
            "words": torch.full((self.per_image, self.limit), self.pad_id),
            "lengths": torch.full((self.per_image,), -1),
            "starts": torch.full((self.per_image,), self.start_id),
            "index": torch.tensor(index),
        }
        for row, (caption, start) in enumerate(self._texts(index, generator)):
            cut = torch.tensor(caption[: self.limit])
            example["words"][row, : len(cut)] = cut
            example["lengths"][row], example["starts"][row] = len(caption), start
        return example

    def _texts(self, index: int, generator: torch.Generator) -> list[tuple[list[int], int]]:
        """Texts to learn in this draw, and the start of each."""
        captions, buckets = self.encoded[index], self.buckets
        long_turn = bool(torch.randint(2, (1,), generator=generator))
        if long_turn and self.long[index]:
            return [(self.long[index], self.long_start_id)]
        chosen = torch.randperm(len(captions), generator=generator)[: self.per_image].tolist()
        return [(captions[i], self.start_id if buckets is None else buckets[index][i]) for i in chosen]


def caption_targets(words: Tensor, lengths: Tensor, end_id: int) -> Tensor:
    """What follows each position of (B, C, T) words: (B, C, T + 1), the end behind the last word, then -1.

    A caption longer than T has no end; length -1 marks an empty place, all of it -1.
    """
    targets = F.pad(words, (0, 1), value=end_id)
    place = torch.arange(targets.shape[-1], device=words.device)
    targets = targets.masked_fill(place == lengths[..., None], end_id)
    cut = (lengths > words.shape[-1])[..., None] & (place == words.shape[-1])
    return targets.masked_fill((place > lengths[..., None]) | cut, -1)


def quality_buckets(agreement: Agreement, count: int) -> list[list[int]]:
    """Bucket of each training caption's alignment score, 0 the worst; each bucket holds as many pairs."""
    edges = np.quantile(np.concatenate(agreement), np.arange(1, count) / count)
    return [np.searchsorted(edges, scores).tolist() for scores in agreement]
