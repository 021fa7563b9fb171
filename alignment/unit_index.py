"""The text units of a split as tensors, encoded once before training, and what a step samples from them.

Shapes: n examples, m distinct texts, B batch, U units of one image, M text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tavq.base.arrays import DiskArray, DiskTexts, Ragged, open_arrays, open_ragged
from tavq.data.column import Column
from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.text_encoder import TextEncoder

from .unit_files import KINDS, Texts, build_units

LEVELS = (1, 2, 3)
ALL = slice(None)


@dataclass(frozen=True)
class TextUnits:
    """Words, phrases or sentences of a batch of texts."""

    vectors: Tensor
    """(B, U, M), unit length."""
    mask: Tensor
    """(B, U) bool, True where a unit exists."""


@dataclass(frozen=True)
class NegativeBank:
    """Units of other images' texts, drawn from the whole training set."""

    vectors: Tensor
    """(n, M), unit length."""
    own: Tensor
    """(B, n) bool, True where a unit belongs to the image's own text and must not count against it."""


@dataclass(frozen=True)
class SampledTexts:
    """What `TextAligner` compares a batch of images with: one entry for words, phrases and sentences each."""

    units: tuple[TextUnits, ...]
    banks: tuple[NegativeBank, ...] = ()
    """Empty where the other texts of the batch are the only negatives."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SampledTexts:
        """A copy on `device`; the training loop moves batches by this."""
        units = tuple(
            TextUnits(u.vectors.to(device, non_blocking=non_blocking), u.mask.to(device)) for u in self.units
        )
        banks = tuple(
            NegativeBank(b.vectors.to(device, non_blocking=non_blocking), b.own.to(device))
            for b in self.banks
        )
        return SampledTexts(units, banks)


@dataclass(frozen=True)
class UnitIndex:
    """Words, phrases and sentences of every example of a split, each distinct text stored once.

    All but the ids stays in files of the cache directory, which are made at the first call.

    Attributes:
        ids: example ids, in the order of the dataset.
        texts: the m distinct texts.
        vectors: (m, M) float16, unit length.
        kinds: the rows of each example's units, one Ragged a level: 0 the human captions alone, 1 words, 2
            phrases, 3 sentences (each caption, and those of the long text where there is one).
    """

    ids: Sequence[str]
    texts: Sequence[str]
    vectors: DiskArray
    kinds: tuple[Ragged, ...]

    @classmethod
    def build(
        cls, dataset: ImageTextDataset, encoder: TextEncoder | EmbeddingCache, *, long_text: bool = True
    ) -> UnitIndex:
        """Split and encode all texts of `dataset`, or its captions alone (minutes for Flickr8k, at once when
        it was done before)."""
        texts = Column(lambda i: _texts_of(dataset[i], long_text), len(dataset))
        return cls._of(dataset.ids, texts, encoder)

    @classmethod
    def from_captions(
        cls, captions: Sequence[Sequence[str]], encoder: TextEncoder | EmbeddingCache
    ) -> UnitIndex:
        """Split and encode the captions of n images, some texts for each image."""
        ids = tuple(str(number) for number in range(len(captions)))
        return cls._of(ids, [(tuple(texts), None) for texts in captions], encoder)

    @classmethod
    def _of(
        cls, ids: Sequence[str], texts: Sequence[Texts], encoder: TextEncoder | EmbeddingCache
    ) -> UnitIndex:
        folder = build_units(texts, encoder)
        kinds = tuple(open_ragged(folder / f"{kind}.safetensors", "rows") for kind in KINDS)
        vectors = open_arrays(folder / "vectors.safetensors")["vectors"]
        return cls(ids, DiskTexts(open_ragged(folder / "texts.safetensors", "texts")), vectors, kinds)

    def vectors_of(self, rows: Tensor) -> Tensor:
        """Return the vectors of some texts, float32."""
        return torch.from_numpy(self.vectors[rows.numpy()]).float()

    def sample(
        self,
        example_indices: Sequence[int] | Tensor,
        rng: torch.Generator,
        *,
        max_units: int,
        bank_size: int,
        wanted: slice = ALL,
    ) -> SampledTexts:
        """Draw at most `max_units` words, phrases and sentences of each example, and `bank_size` negatives.

        `wanted` are the examples to return. The others count for the draws alone, so that processes which
        share a batch draw what one process would.
        """
        units = tuple(
            TextUnits(*self.batch(example_indices, level, rng, max_units, wanted)) for level in LEVELS
        )
        own = example_indices[wanted]
        banks = tuple(NegativeBank(*self.bank(own, level, rng, bank_size)) for level in LEVELS)
        return SampledTexts(units, banks if bank_size else ())

    def count(self, level: int) -> Tensor:
        """(n,) int64: how many units each example has."""
        return torch.from_numpy(np.diff(self.kinds[level].starts[:]))

    def units(self, index: int, level: int) -> tuple[str, ...]:
        """Return the unit texts of one example, as a reader sees them."""
        return tuple(self.texts[row] for row in self.kinds[level][index].tolist())

    def sample_rows(
        self,
        example_indices: Sequence[int] | Tensor,
        level: int,
        rng: torch.Generator,
        max_units: int,
        wanted: slice = ALL,
    ) -> tuple[Tensor, Tensor]:
        """Draw min(M_i, max_units) units of each example without replacement; `wanted` as in `sample`.

        Returns:
            rows (B, max_units) int64 into `vectors` and `texts` (0 where masked), mask (B, max_units) bool.
        """
        ragged = self.kinds[level]
        examples = np.asarray(example_indices)
        starts = torch.from_numpy(ragged.starts[examples])
        counts = torch.from_numpy(ragged.starts[examples + 1]) - starts
        width = max(int(counts.max()), max_units)
        keys = torch.rand(len(examples), width, generator=rng)[wanted]
        starts, counts = starts[wanted], counts[wanted]
        keys = keys.masked_fill(torch.arange(width) >= counts[:, None], -1.0)
        drawn = keys.topk(max_units, dim=1).indices
        mask = torch.arange(max_units) < counts[:, None].clamp(max=max_units)
        places = (starts[:, None] + drawn).clamp(max=len(ragged.values) - 1)
        return torch.from_numpy(ragged.values[places.numpy()]).masked_fill(~mask, 0), mask

    def batch(
        self,
        example_indices: Sequence[int] | Tensor,
        level: int,
        rng: torch.Generator,
        max_units: int,
        wanted: slice = ALL,
    ) -> tuple[Tensor, Tensor]:
        """Draw units as in `sample_rows` and look their vectors up.

        Returns:
            units (B, max_units, M) float32, zero where masked; mask (B, max_units) bool.
        """
        rows, mask = self.sample_rows(example_indices, level, rng, max_units, wanted)
        return self.vectors_of(rows) * mask[..., None], mask

    def bank(
        self, example_indices: Sequence[int] | Tensor, level: int, rng: torch.Generator, size: int
    ) -> tuple[Tensor, Tensor]:
        """Draw units of any example, as negatives.

        Returns:
            units (size, M) float32; own (B, size) bool, True where a unit is also one of that example's own.
        """
        ragged = self.kinds[level]
        rows = torch.from_numpy(
            ragged.values[torch.randint(len(ragged.values), (size,), generator=rng).numpy()]
        )
        own = [
            torch.isin(rows, torch.from_numpy(ragged[i])) for i in torch.as_tensor(example_indices).tolist()
        ]
        return self.vectors_of(rows), torch.stack(own)


def _texts_of(example: Example, long_text: bool) -> Texts:
    return example.captions, example.long_text if long_text else None
