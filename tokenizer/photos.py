"""The photos of a data set as a tokenizer trains on them and is evaluated on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tavq.data.examples import ImageTextDataset, readable_images
from tavq.data.images import UnreadableImageError, from_pixels, to_pixels, to_tensor

EVALUATION_BATCH = 50
CACHE_BYTES = 2**31

Box = tuple[float, float, float, float]
"""Left, top, width and height of a crop, as shares of the image."""


class TrainingImages(Dataset):
    """Photos as the tokenizer trains on them: cropped at random, squashed to the square, flipped half of the
    time.

    `self[(index, draw_seed)]` gives a dict with `image` (3, H, W), `index`, `box`, `flipped` and `draw`. An
    image that cannot be read is named once, and the next one takes its place. Squashed photos stay in memory
    up to `CACHE_BYTES`, so that a file is decoded once.

    Args:
        dataset: the photos.
        size_px: side of the square.
        smallest_crop: share of width and of height that is kept at least; 1 crops nothing.
    """

    def __init__(self, dataset: ImageTextDataset, size_px: int, smallest_crop: float = 1.0):
        self.dataset, self.size_px, self.smallest_crop = dataset, size_px, smallest_crop
        self.kept_px = math.ceil(size_px / smallest_crop)  # so that no crop is enlarged
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
        box, flipped = (0.0, 0.0, 1.0, 1.0), draw % 2 == 1
        if self.smallest_crop < 1:
            image, box = self._cropped(image, draw)
        return {
            "image": image.flip(-1) if flipped else image,
            "index": index,
            "box": box,
            "flipped": flipped,
            "draw": draw,
        }

    def _cropped(self, image: Tensor, draw: int) -> tuple[Tensor, Box]:
        random, side = np.random.default_rng(draw), self.kept_px
        width, height = (round(side * share) for share in random.uniform(self.smallest_crop, 1, size=2))
        left, top = int(random.integers(side - width + 1)), int(random.integers(side - height + 1))
        part = image[None, :, top : top + height, left : left + width]
        size = (self.size_px, self.size_px)
        image = F.interpolate(part, size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        return image, (left / side, top / side, width / side, height / side)

    def _read(self, index: int) -> Tensor | None:
        if index in self.unreadable:
            return None
        try:
            if index not in self.kept:
                pixels = to_pixels(self.dataset.load_image(index), self.kept_px)
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


def cut(map_CHW: Tensor, box: Box) -> Tensor:
    """The part of a map that a crop of its image shows, at the map's own size (bilinear)."""
    left, top, width, height = box
    turn = torch.tensor([[width, 0.0, 2 * left + width - 1], [0.0, height, 2 * top + height - 1]])
    grid = F.affine_grid(turn[None], [1, *map_CHW.shape], align_corners=False)
    return F.grid_sample(map_CHW[None].float(), grid, padding_mode="border", align_corners=False)[0]


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
