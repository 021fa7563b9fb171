"""The text units of a split as tensors, encoded once before training.

Letters: n examples, M distinct texts, B batch, U units of one image, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.examples import Example, ImageTextDataset
from tavq.data.text_encoder import TextEncoder

from .units import split_units

KINDS = ("captions", "words", "phrases", "sentences")  # the place is the level; 0 is no level of the encoder


@dataclass(frozen=True)
class Ragged:
    """Lists of unlike length: example i owns members[offsets[i] : offsets[i + 1]], rows of the vectors."""

    offsets: Tensor
    members: Tensor


@dataclass(frozen=True)
class UnitIndex:
    """Words, phrases and sentences of every example of a split, each distinct text stored once.

    Attributes:
        ids: example ids, in the order of the data set.
        texts: the M distinct texts.
        vectors: (M, D) float16, unit length.
        kinds: one Ragged a level: 0 the human captions alone, 1 words, 2 phrases, 3 sentences (each caption,
            and those of the long text where there is one).
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: Tensor
    kinds: tuple[Ragged, ...]

    @classmethod
    def build(cls, dataset: ImageTextDataset, encoder: TextEncoder | EmbeddingCache) -> UnitIndex:
        """Split and encode all texts of `dataset` (minutes for Flickr8k, seconds once cached)."""
        rows: dict[str, int] = {}
        lists: list[list[list[int]]] = [[] for _ in KINDS]
        for example in dataset.examples:
            for level, texts in enumerate(units_of(example)):
                lists[level].append([rows.setdefault(text, len(rows)) for text in texts])
        vectors = encoder.encode(list(rows)).to(torch.float16)
        return cls(dataset.ids, tuple(rows), vectors, tuple(_ragged(members) for members in lists))

    def count(self, level: int) -> Tensor:
        """(n,) int64: how many units each example has."""
        return self.kinds[level].offsets.diff()

    def units(self, index: int, level: int) -> tuple[str, ...]:
        """Return the unit texts of one example, as a reader sees them."""
        ragged = self.kinds[level]
        start, end = ragged.offsets[index : index + 2].tolist()
        return tuple(self.texts[row] for row in ragged.members[start:end].tolist())

    def sample_rows(
        self, example_indices: Sequence[int] | Tensor, level: int, generator: torch.Generator, max_units: int
    ) -> tuple[Tensor, Tensor]:
        """Draw min(M_i, max_units) units of each example without replacement.

        Returns:
            rows (B, max_units) int64 into `vectors` and `texts` (0 where masked), mask (B, max_units) bool.
        """
        ragged = self.kinds[level]
        examples = torch.as_tensor(example_indices)
        starts, counts = ragged.offsets[examples], self.count(level)[examples]
        width = max(int(counts.max()), max_units)
        places = torch.arange(width)
        keys = torch.rand(len(examples), width, generator=generator)
        keys = keys.masked_fill(places >= counts[:, None], -1.0)
        drawn = keys.topk(max_units, dim=1).indices
        mask = torch.arange(max_units) < counts[:, None].clamp(max=max_units)
        rows = ragged.members[(starts[:, None] + drawn).clamp(max=len(ragged.members) - 1)]
        return rows.masked_fill(~mask, 0), mask

    def batch(
        self, example_indices: Sequence[int] | Tensor, level: int, generator: torch.Generator, max_units: int
    ) -> tuple[Tensor, Tensor]:
        """Draw units as in `sample_rows` and look their vectors up.

        Returns:
            units (B, max_units, D) float32, zero where masked; mask (B, max_units) bool.
        """
        rows, mask = self.sample_rows(example_indices, level, generator, max_units)
        return self.vectors[rows].float() * mask[..., None], mask

    def bank(
        self, example_indices: Sequence[int] | Tensor, level: int, generator: torch.Generator, size: int
    ) -> tuple[Tensor, Tensor]:
        """Draw units of any example, as negatives.

        Returns:
            units (size, D) float32; own (B, size) bool, True where a unit is also one of that example's own.
        """
        members = self.kinds[level].members
        rows = members[torch.randint(len(members), (size,), generator=generator)]
        offsets = self.kinds[level].offsets
        own = [
            torch.isin(rows, members[offsets[i] : offsets[i + 1]]) for i in torch.as_tensor(example_indices)
        ]
        return self.vectors[rows].float(), torch.stack(own)


def units_of(example: Example) -> tuple[tuple[str, ...], ...]:
    """Return captions, words, phrases and sentences of an example, each without repeats."""
    captions = tuple(dict.fromkeys(example.captions))
    parts = [split_units(caption) for caption in captions]
    if example.long_text:
        parts.append(split_units(example.long_text))
    words = tuple(dict.fromkeys(word for part in parts for word in part.words))
    phrases = tuple(dict.fromkeys(phrase for part in parts for phrase in part.phrases))
    sentences = captions + (parts[-1].sentences if example.long_text else ())
    return captions, words, phrases, tuple(dict.fromkeys(sentences))


def _ragged(lists: list[list[int]]) -> Ragged:
    lengths = torch.tensor([0] + [len(members) for members in lists])
    return Ragged(
        lengths.cumsum(0), torch.tensor([row for members in lists for row in members], dtype=torch.int64)
    )
