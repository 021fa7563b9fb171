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
from tavq.data.images import UnreadableImageError, from_pixels, grid, to_pil, to_pixels, to_tensor

from .model import TAVQTokenizer

EVALUATION_BATCH = 50
SHEET_COLUMNS = 16
CACHE_BYTES = 2**31
SMALLEST_CROP = 0.8  # of a side
WHOLE = (0.0, 0.0, 1.0, 1.0)


class TrainingImages(Dataset):
    """Photos as the tokenizer trains on them: squashed to the square, half of them cropped, half mirrored.

    `self[(index, draw_seed)]` gives a dict with `image` (3, H, W), `index`, `box` (what of the photo it
    shows: left, top, right, bottom in [0, 1], before mirroring), `flipped` and `draw`. An image that cannot
    be read is named once, and the next one takes its place. Squashed photos stay in memory up to
    `CACHE_BYTES`, so that a file is decoded once.
    """

    def __init__(self, dataset: ImageTextDataset, size_px: int):
        self.dataset, self.size_px = dataset, size_px
        self.source_px = math.ceil(size_px / SMALLEST_CROP)  # the smallest crop is not enlarged
        self.unreadable: set[int] = set()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        photo = self._read(index)
        while photo is None:
            index = (index + 1) % len(self.dataset)
            photo = self._read(index)
        whole, source = photo
        image, box, flipped = from_pixels(whole), WHOLE, draw % 2 == 1
        if draw // 2 % 2:
            left, top, right, bottom = random_crop(self.source_px, np.random.default_rng(draw))
            box = tuple(side / self.source_px for side in (left, top, right, bottom))
            crop = from_pixels(source[:, top:bottom, left:right])[None]
            image = F.interpolate(crop, whole.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)
        image = image.flip(-1) if flipped else image
        return {"image": image, "index": index, "box": box, "flipped": flipped, "draw": draw}

    def _read(self, index: int) -> tuple[Tensor, Tensor] | None:
        """The photo as bytes: at the size of the tokenizer, and larger, to be cropped."""
        if index in self.unreadable:
            return None
        try:
            if index in self.kept:
                return self.kept[index]
            picture = self.dataset.load_image(index)
            pixels = to_pixels(picture, self.size_px), to_pixels(picture, self.source_px)
            if len(self.kept) * sum(part.numel() for part in pixels) < CACHE_BYTES:
                self.kept[index] = pixels
            return pixels
        except UnreadableImageError as error:
            self.unreadable.add(index)
            print(f"warning: skipped {self.dataset[index].id}: {error}", flush=True)
            if len(self.unreadable) > max(1, len(self.dataset) // 100):
                raise ValueError(
                    f"{len(self.unreadable)} images cannot be read; repair {self.dataset.name}"
                ) from error
            return None


def random_crop(side_px: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop of a square: each side `SMALLEST_CROP` to all of it, anywhere."""
    width, height = (round(side_px * random.uniform(SMALLEST_CROP, 1)) for _ in range(2))
    left, top = random.integers(side_px - width + 1), random.integers(side_px - height + 1)
    return int(left), int(top), int(left) + width, int(top) + height


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
