"""The text units of a split as tensors, encoded once before training, and what a step samples from them.

Shapes: n examples, m distinct texts, B batch, U units of one image, M text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tavq.data.dataset import ImageTextDataset
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.text_encoder import TextEncoder

from .units import split_units

KINDS = ("captions", "words", "phrases", "sentences")  # the index is the level; 0 is no level of the encoder
LEVELS = (1, 2, 3)


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
class Ragged:
    """Lists of unlike length: example i owns members[offsets[i] : offsets[i + 1]], rows of the vectors."""

    offsets: Tensor
    members: Tensor


@dataclass(frozen=True)
class UnitIndex:
    """Words, phrases and sentences of every example of a split, each distinct text stored once.

    Attributes:
        ids: example ids, in the order of the dataset.
        texts: the m distinct texts.
        vectors: (m, M) float16, unit length.
        kinds: one Ragged a level: 0 the human captions alone, 1 words, 2 phrases, 3 sentences (each caption,
            and those of the long text where there is one).
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: Tensor
    kinds: tuple[Ragged, ...]

    @classmethod
    def build(
        cls, dataset: ImageTextDataset, encoder: TextEncoder | EmbeddingCache, *, long_text: bool = True
    ) -> UnitIndex:
        """Split and encode all texts of `dataset`, or its captions alone (minutes for Flickr8k, seconds once
        cached)."""
        texts = [(e.captions, e.long_text if long_text else None) for e in dataset.examples]
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
        cls,
        ids: tuple[str, ...],
        texts: Sequence[tuple[tuple[str, ...], str | None]],
        encoder: TextEncoder | EmbeddingCache,
    ) -> UnitIndex:
        rows: dict[str, int] = {}
        lists: list[list[list[int]]] = [[] for _ in KINDS]
        for captions, long_text in texts:
            for level, units in enumerate(units_of(captions, long_text)):
                lists[level].append([rows.setdefault(unit, len(rows)) for unit in units])
        vectors = encoder.encode(list(rows)).to(torch.float16)
        return cls(ids, tuple(rows), vectors, tuple(_ragged(members) for members in lists))

    def sample(
        self,
        example_indices: Sequence[int] | Tensor,
        rng: torch.Generator,
        *,
        max_units: int,
        bank_size: int,
    ) -> SampledTexts:
        """Draw at most `max_units` words, phrases and sentences of each example, and `bank_size`
        negatives."""
        units = tuple(TextUnits(*self.batch(example_indices, level, rng, max_units)) for level in LEVELS)
        banks = tuple(NegativeBank(*self.bank(example_indices, level, rng, bank_size)) for level in LEVELS)
        return SampledTexts(units, banks if bank_size else ())

    def count(self, level: int) -> Tensor:
        """(n,) int64: how many units each example has."""
        return self.kinds[level].offsets.diff()

    def units(self, index: int, level: int) -> tuple[str, ...]:
        """Return the unit texts of one example, as a reader sees them."""
        ragged = self.kinds[level]
        start, end = ragged.offsets[index : index + 2].tolist()
        return tuple(self.texts[row] for row in ragged.members[start:end].tolist())

    def sample_rows(
        self, example_indices: Sequence[int] | Tensor, level: int, rng: torch.Generator, max_units: int
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
        keys = torch.rand(len(examples), width, generator=rng)
        keys = keys.masked_fill(places >= counts[:, None], -1.0)
        drawn = keys.topk(max_units, dim=1).indices
        mask = torch.arange(max_units) < counts[:, None].clamp(max=max_units)
        rows = ragged.members[(starts[:, None] + drawn).clamp(max=len(ragged.members) - 1)]
        return rows.masked_fill(~mask, 0), mask

    def batch(
        self, example_indices: Sequence[int] | Tensor, level: int, rng: torch.Generator, max_units: int
    ) -> tuple[Tensor, Tensor]:
        """Draw units as in `sample_rows` and look their vectors up.

        Returns:
            units (B, max_units, M) float32, zero where masked; mask (B, max_units) bool.
        """
        rows, mask = self.sample_rows(example_indices, level, rng, max_units)
        return self.vectors[rows].float() * mask[..., None], mask

    def bank(
        self, example_indices: Sequence[int] | Tensor, level: int, rng: torch.Generator, size: int
    ) -> tuple[Tensor, Tensor]:
        """Draw units of any example, as negatives.

        Returns:
            units (size, M) float32; own (B, size) bool, True where a unit is also one of that example's own.
        """
        members = self.kinds[level].members
        rows = members[torch.randint(len(members), (size,), generator=rng)]
        offsets = self.kinds[level].offsets
        own = [
            torch.isin(rows, members[offsets[i] : offsets[i + 1]]) for i in torch.as_tensor(example_indices)
        ]
        return self.vectors[rows].float(), torch.stack(own)


def units_of(captions: Sequence[str], long_text: str | None = None) -> tuple[tuple[str, ...], ...]:
    """Captions, words, phrases and sentences of one image's texts, each without repeats."""
    captions = tuple(dict.fromkeys(captions))
    parts = [split_units(caption) for caption in captions]
    if long_text:
        parts.append(split_units(long_text))

    words = tuple(dict.fromkeys(word for part in parts for word in part.words))
    phrases = tuple(dict.fromkeys(phrase for part in parts for phrase in part.phrases))
    # A caption counts as one sentence, whatever its full stops; the long text as several.
    sentences = captions + (parts[-1].sentences if long_text else ())
    return captions, words, phrases, tuple(dict.fromkeys(sentences))


def _ragged(lists: list[list[int]]) -> Ragged:
    lengths = torch.tensor([0] + [len(members) for members in lists])
    return Ragged(
        lengths.cumsum(0), torch.tensor([row for members in lists for row in members], dtype=torch.int64)
    )
