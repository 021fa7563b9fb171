"""The images of a dataset as a tokenizer trains on them and is evaluated on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tavq.base.processes import common_generator, own_share, shares_of_all
from tavq.base.seeding import mixed_seed
from tavq.data.dataset import ImageTextDataset, max_unreadable, readable_images
from tavq.data.images import UnreadableImageError, from_pixels, grid, to_pil, to_pixels, to_tensor
from tavq.training.stream import Draws

from .model import TAVQTokenizer, Window

EVALUATION_BATCH = 50
SHEET_COLUMNS = 16
CACHE_BYTES = 2**31
DISCRIMINATOR_EXAMPLES = 64  # by which its maps are standardised
SMALLEST_CROP = 0.8  # of a side
WHOLE = (0.0, 0.0, 1.0, 1.0)

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class View:
    """Which part of an image a draw shows, and whether it is mirrored; a function of the draw alone."""

    crop: tuple[int, int, int, int] | None
    """Left, top, right, bottom in pixels of the source; None shows the whole image."""
    flipped: bool

    @classmethod
    def of(cls, draw: int, source_px: int) -> View:
        """Half of all draws are cropped, half are mirrored."""
        cropped = draw // 2 % 2 == 1
        crop = random_crop(source_px, np.random.default_rng(draw)) if cropped else None
        return cls(crop, flipped=draw % 2 == 1)

    def box(self, source_px: int) -> Box:
        """The part shown, left, top, right and bottom in [0, 1]."""
        if self.crop is None:
            return WHOLE
        left, top, right, bottom = (side / source_px for side in self.crop)
        return left, top, right, bottom


class TrainingImages(Dataset):
    """Images as the tokenizer trains on them: squashed to the square, half of them cropped, half mirrored.

    `self[(index, draw_seed)]` gives a dict with `image` (3, H, W), which the encoder reads, `target`
    (3, H', W'), which the decoder shall give, `index`, `box` (what of the image they show: left, top, right,
    bottom in [0, 1], before mirroring), `flipped` and `draw`. An image that cannot be read is named once,
    and the next one takes its place. Squashed images stay in memory up to `CACHE_BYTES`, so that a file is
    decoded once.

    Args:
        dataset: the training split.
        size_px: side of `image`, H and W.
        target_px: side of `target`, H' and W'; `size_px` if None.
        views: how many different views of an image there are; 0 makes each draw another one. A trainer that
            keeps the ids of what it has encoded wants few.
    """

    def __init__(self, dataset: ImageTextDataset, size_px: int, target_px: int | None = None, views: int = 0):
        self.dataset = dataset
        self.size_px = size_px
        self.target_px = target_px or size_px
        self.views = views
        self.source_px = max(self.size_px, self.target_px)
        if views not in (1, 2):  # which are never cropped
            self.source_px = math.ceil(self.source_px / SMALLEST_CROP)  # the smallest crop is not enlarged
        self.unreadable: set[int] = set()
        self.squashed: dict[int, dict[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        squashed = self._read(index)
        while squashed is None:
            index = (index + 1) % len(self.dataset)
            squashed = self._read(index)
        if self.views:
            number = draw % self.views
            # Numbers 0 and 1 are the whole image and its mirror image; the crops differ from image to image.
            draw = number if number < 2 else mixed_seed(index, number) // 4 * 4 + 2 + number % 2

        view = View.of(draw, self.source_px)
        image = self._shown(view, squashed, self.size_px)
        same = self.target_px == self.size_px
        return {
            "image": image,
            "target": image if same else self._shown(view, squashed, self.target_px),
            "index": index,
            "box": view.box(self.source_px),
            "flipped": view.flipped,
            "draw": draw,
        }

    def _shown(self, view: View, squashed: dict[int, Tensor], size_px: int) -> Tensor:
        """One view of an image, (3, size_px, size_px) in [-1, 1]."""
        if view.crop is None:
            image = from_pixels(squashed[size_px])
        else:
            left, top, right, bottom = view.crop
            crop = from_pixels(squashed[self.source_px][:, top:bottom, left:right])[None]
            image = F.interpolate(crop, (size_px, size_px), mode="bicubic", antialias=True)[0].clamp(-1, 1)
        return image.flip(-1) if view.flipped else image

    def _read(self, index: int) -> dict[int, Tensor] | None:
        """The image as bytes, by its side in px: large, to be cropped; as it is read; as it is decoded."""
        if index in self.unreadable:
            return None
        if index in self.squashed:
            return self.squashed[index]
        try:
            image = self.dataset.load_image(index)
        except UnreadableImageError as error:
            self._skip(index, error)
            return None
        squashed = {size: to_pixels(image, size) for size in {self.source_px, self.size_px, self.target_px}}
        if (len(self.squashed) + 1) * sum(pixels.numel() for pixels in squashed.values()) < CACHE_BYTES:
            self.squashed[index] = squashed
        return squashed

    def _skip(self, index: int, error: UnreadableImageError) -> None:
        self.unreadable.add(index)
        print(f"warning: skipped {self.dataset[index].id}: {error}", flush=True)
        if len(self.unreadable) > max_unreadable(len(self.dataset)):
            raise ValueError(
                f"{len(self.unreadable)} images cannot be read; repair {self.dataset.name}"
            ) from error


def draws_of_texts(
    examples: list[dict[str, Any]], draws: Draws | None
) -> tuple[list[int], torch.Generator, slice]:
    """What the texts of a batch are drawn with: the images of all processes, a generator, and which of the
    images are those of this process. `draws` is None where no others share the batch."""
    indices = [example["index"] for example in examples]
    first_draw, own = examples[0]["draw"], slice(None)
    if draws is not None:
        own = draws.own_rows
        first_draw = draws.items[0][1]
        every_index = [index for index, _ in draws.items]
        every_index[own] = indices  # they differ where an image could not be read
        indices = every_index
    return indices, torch.Generator().manual_seed(mixed_seed(first_draw, len(indices))), own


def random_crop(side_px: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop of a square: each side `SMALLEST_CROP` to all of it, anywhere."""
    width, height = (round(side_px * random.uniform(SMALLEST_CROP, 1)) for _ in range(2))
    left = int(random.integers(side_px - width + 1))
    top = int(random.integers(side_px - height + 1))
    return left, top, left + width, top + height


def random_window(tokenizer: TAVQTokenizer, window_px: int) -> Window | None:
    """A random part of the decoder's map that becomes about `window_px` pixels; None where it would be all
    of it."""
    cells = tokenizer.config.map_size
    side = window_px // tokenizer.decoder.pixels_per_cell
    if not tokenizer.config.upsample_channels or not 0 < side < cells:
        return None
    top, left = torch.randint(cells - side + 1, (2,), generator=common_generator()).tolist()
    return Window(top, left, side)


def originals(images: TrainingImages, window_px: int) -> Tensor:
    """Some training images as the losses compare them: (n, 3, side, side), a window's side where there is
    one."""
    examples = range(min(DISCRIMINATOR_EXAMPLES, len(images)))
    targets = torch.stack([images[(index, 0)]["target"] for index in examples])
    side = min(window_px or images.target_px, images.target_px)
    return targets[..., :side, :side]


def shared_image_batches(
    dataset: ImageTextDataset, *sizes_px: int
) -> Iterator[tuple[list[Tensor], list[int]]]:
    """`image_batches` of this process's share of a split."""
    return image_batches(dataset, *sizes_px, only=own_share(range(len(dataset))))


def of_whole_split(found: list[tuple[list[int], list[Tensor]]]) -> tuple[list[int], list[Tensor]]:
    """Join what all processes found for `shared_image_batches`, in the order of the split.

    Args:
        found: for each batch its indices, and tensors with a row for each image, on the CPU.

    Returns:
        The indices of all images, and each tensor of all.
    """
    found = shares_of_all(found)
    indices = torch.tensor([index for batch, _ in found for index in batch])
    order = indices.argsort()
    columns = zip(*(tensors for _, tensors in found), strict=True)
    return indices[order].tolist(), [torch.cat(column)[order] for column in columns]


def image_batches(
    dataset: ImageTextDataset, *sizes_px: int, only: Sequence[int] | None = None
) -> Iterator[tuple[list[Tensor], list[int]]]:
    """Batches over a split or `only` these of its images, unreadable ones left out: for each size the images
    (B, 3, H, W), and the indices."""
    images: list[list[Tensor]] = [[] for _ in sizes_px]
    indices: list[int] = []

    def batch() -> tuple[list[Tensor], list[int]]:
        return [torch.stack(tensors) for tensors in images], list(indices)

    for index, image in readable_images(dataset, indices=only):
        for tensors, size in zip(images, sizes_px, strict=True):
            tensors.append(to_tensor(image, size))
        indices.append(index)
        if len(indices) == EVALUATION_BATCH:
            yield batch()
            indices.clear()
            for tensors in images:
                tensors.clear()
    if indices:
        yield batch()


@torch.inference_mode()
def reconstruction_sheet(tokenizer: TAVQTokenizer, dataset: ImageTextDataset) -> np.ndarray:
    """The first images of a split above their reconstructions, (H, W, 3) uint8."""
    size, decode_size = tokenizer.image_size_px, tokenizer.decode_size_px
    (images, targets), _ = next(image_batches(dataset.take(SHEET_COLUMNS), size, decode_size))
    decoded = tokenizer.decode(tokenizer.encode(images.to(tokenizer.codebook.device)))
    return np.asarray(grid(to_pil(targets) + to_pil(decoded), columns=len(targets)))
