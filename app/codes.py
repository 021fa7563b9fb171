"""What a code of the codebook means: its nearest words, the patches that have it, and what the decoder draws.

Shapes: n images, h w token grid, K codes, V words, M text width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from tavq.data.embedding_cache import EmbeddingCache
from tavq.pipeline import Pipeline
from tavq.tokenizer.contact_sheet import nearest_words, occurrences, patch_in_context

from .gallery import drawn_tokens

WORDS_PER_CODE = 6
PATCHES_PER_CODE = 8
CONTEXT = 1  # tokens around a patch that are shown with it
MIN_WORD_LETTERS = 3  # shorter ones ("a", "of") say nothing of an image
KEPT_IMAGES = 64


class Codes:
    """Looks codes up, with the models of a pipeline.

    Args:
        pipeline: its captioner's words are those that are searched.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.levels = tuple(sorted(set(pipeline.tokenizer.aligned_levels.values())))
        """Those that are aligned with text; none for a plain tokenizer."""

    @functools.cached_property
    def drawn(self) -> Tensor | None:
        """Ids (n, h, w) of images that the shipped weights generated, if these are loaded."""
        return drawn_tokens(self.pipeline.tokenizer.codebook_hash)

    @functools.cached_property
    def nearest(self) -> dict[int, dict[int, list[str]]]:
        """Level -> code -> its nearest words, nearest first.

        Takes seconds when it is first read on a machine: all words are encoded.
        """
        if not self.levels:
            return {}
        tokenizer = self.pipeline.tokenizer
        words = [word for word in self.pipeline.captioner.config.words if len(word) >= MIN_WORD_LETTERS]
        vectors = EmbeddingCache(self.pipeline.alignment_encoder).encode(words).to(self.pipeline.device)
        every = torch.arange(tokenizer.num_codes, device=self.pipeline.device)
        return {
            level: {
                code: [words[number] for number in numbers]
                for code, numbers in nearest_words(
                    tokenizer, every.tolist(), every, vectors, level, WORDS_PER_CODE
                ).items()
            }
            for level in self.levels
        }

    def words(self, code: int, level: int) -> list[str]:
        return self.nearest[level][code]

    def patches(self, code: int) -> list[Image.Image]:
        """Return patches of generated images that have the code; its token is framed."""
        if self.drawn is None:
            return []
        found = occurrences(self.drawn, code, PATCHES_PER_CODE, seed=0)
        grid_size = self.pipeline.tokenizer.grid_size
        return [
            patch_in_context(self._drawn_image(image), (y, x), grid_size, CONTEXT) for image, y, x in found
        ]

    def count(self, code: int) -> int:
        """Count the tokens of the generated images that have the code."""
        return 0 if self.drawn is None else int((self.drawn == code).sum())

    @property
    def drawn_total(self) -> int:
        return 0 if self.drawn is None else self.drawn.numel()

    @functools.lru_cache(maxsize=KEPT_IMAGES)  # noqa: B019  one instance lives as long as the page
    def _drawn_image(self, number: int) -> Image.Image:
        if self.drawn is None:
            raise ValueError("no generated images belong to this codebook")
        return self.pipeline.decode(self.drawn[number : number + 1].to(self.pipeline.device))[0]

    @functools.lru_cache(maxsize=KEPT_IMAGES)  # noqa: B019
    def alone(self, code: int) -> Image.Image:
        """Return what the decoder draws where every token is this code: the middle, the size of a patch."""
        h, w = self.pipeline.tokenizer.grid_size
        image = self.pipeline.decode(torch.full((1, h, w), code, device=self.pipeline.device))[0]
        return patch_in_context(image, (h // 2, w // 2), (h, w), CONTEXT)

    def similar(self, code: int, count: int) -> list[int]:
        """Return the nearest other codes of the codebook, by cosine."""
        codebook = torch.nn.functional.normalize(self.pipeline.tokenizer.codebook.float(), dim=-1)
        cosines = codebook @ codebook[code]
        cosines[code] = -torch.inf
        return cosines.topk(min(count, len(codebook) - 1)).indices.tolist()


def mixed(first: Tensor, second: Tensor, share: float, seed: int = 0) -> Tensor:
    """Replace a share of the tokens of one image by those of another, at the same positions.

    The positions are random, but a larger share holds those of a smaller one.

    Args:
        first: (h, w) int64.
        second: (h, w) int64.
        share: 0 gives `first`, 1 gives `second`.
    """
    order = torch.randperm(first.numel(), generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(first.numel(), dtype=torch.bool)
    taken[order[: round(share * first.numel())]] = True
    return torch.where(taken.view_as(first), second, first)


def where_else(ids: Tensor, cell: int) -> list[tuple[int, int]]:
    """List the other positions (row, column) of `ids` (h, w) that have the code of a cell."""
    same = (ids == ids.flatten()[cell]).nonzero().tolist()
    width = ids.shape[1]
    return [(row, column) for row, column in same if row * width + column != cell]


def positions_line(positions: Sequence[tuple[int, int]]) -> str:
    """Write positions for people, who count from 1."""
    return ", ".join(f"row {row + 1} column {column + 1}" for row, column in positions)
