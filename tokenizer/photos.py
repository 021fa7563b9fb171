"""The photos of a data set as a tokenizer trains on them and is evaluated on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tavq.data.examples import ImageTextDataset, readable_images
from tavq.data.images import UnreadableImageError, from_pixels, grid, to_pil, to_pixels, to_tensor

from .model import TAVQTokenizer

EVALUATION_BATCH = 50
SHEET_COLUMNS = 16
CACHE_BYTES = 2**31


class TrainingImages(Dataset):
    """Photos as the tokenizer trains on them: squashed to the square, flipped half of the time.

    `self[(index, draw_seed)]` gives a dict with `image` (3, H, W), `index`, `flipped` and `draw`. An image
    that cannot be read is named once, and the next one takes its place. Squashed photos stay in memory up to
    `CACHE_BYTES`, so that a file is decoded once.
    """

    def __init__(self, dataset: ImageTextDataset, size_px: int):
        self.dataset, self.size_px = dataset, size_px
        self.unreadable: set[int] = set()
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        image = self._read(index)
        while image is None:
            index = (index + 1) % len(self.dataset)
            image = self._read(index)
        flipped = draw % 2 == 1
        return {
            "image": image.flip(-1) if flipped else image,
            "index": index,
            "flipped": flipped,
            "draw": draw,
        }

    def _read(self, index: int) -> Tensor | None:
        if index in self.unreadable:
            return None
        try:
            if index not in self.kept:
                pixels = to_pixels(self.dataset.load_image(index), self.size_px)
                if len(self.kept) * pixels.numel() >= CACHE_BYTES:
                    return from_pixels(pixels)
                self.kept[index] = pixels
            return from_pixels(self.kept[index])
        except UnreadableImageError as error:
            self.unreadable.add(index)
            print(f"warning: skipped {self.dataset[index].id}: {error}", flush=True)
            if len(self.unreadable) > max(1, len(self.dataset) // 100):
                raise ValueError(
                    f"{len(self.unreadable)} images cannot be read; repair {self.dataset.name}"
                ) from error
            return None


def photo_batches(dataset: ImageTextDataset, size_px: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of (images (B, 3, H, W), their indices) over a split, unreadable images left out."""
    images, indices = [], []
    for index, image in readable_images(dataset):
        images.append(to_tensor(image, size_px))
        indices.append(index)
        if len(images) == EVALUATION_BATCH:
            yield torch.stack(images), indices
            images, indices = [], []
    if images:
        yield torch.stack(images), indices


@torch.inference_mode()
def reconstruction_sheet(tokenizer: TAVQTokenizer, dataset: ImageTextDataset) -> np.ndarray:
    """The first photos of a split above their reconstructions, (H, W, 3) uint8."""
    images, _ = next(photo_batches(dataset, tokenizer.image_size_px))
    images = images[:SHEET_COLUMNS].to(tokenizer.codebook.device)
    both = to_pil(images) + to_pil(tokenizer.decode(tokenizer.encode(images)))
    return np.asarray(grid(both, columns=len(images)))
